"""Traced programs: their steps, replaced or counted, and their memory."""

import collections
import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

from jaxensemble.compat import JaxprEqn, Literal, Program, is_program, jaxpr_as_fun, replace_steps

CONVOLUTION, PRODUCT, MAXIMA = "conv_general_dilated", "dot_general", "reduce_window_max"


def primitives(function: Callable[..., Any], *args: Any) -> collections.Counter[str]:
    """Counts each JAX primitive in the program of one call, nested programs included.

    The program is traced, not run; `args` may be `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> primitives(lambda x: jnp.sin(x).T + 1, jnp.ones((2, 3)))["transpose"]
    1
    """
    return collections.Counter(step.primitive.name for step in equations(jax.make_jaxpr(function)(*args)))


def rewrite_steps(function: Callable[..., Any], replacements: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Replaces some steps of a function, everywhere in its program: in loops and branches, too.

    A replacement takes a step's operands and parameters, and returns a result of the same shape and dtype.

    >>> import jax.numpy as jnp
    >>> rewrite_steps(lambda x: jnp.sin(x) + 1, {"sin": lambda x, **params: 2 * x})(3.0)
    Array(7., dtype=float32, weak_type=True)
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.disable_jit(False):  # or nested programs would be inlined, and replacements be several steps
            program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
            program = _Rewriting(replacements).of(program)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(args)))

    return run


class _Rewriting:
    """The rewriting of one program. A program that it calls several times is rewritten once, and stays one program."""

    def __init__(self, replacements: Mapping[str, Callable[..., Any]]):
        self._replacements = replacements
        self._known: dict[int, tuple[Any, Any]] = {}
        self._steps: dict[Any, JaxprEqn] = {}

    def of(self, program: Program) -> Program:
        """A program with its steps replaced; the same object if there is none to replace."""
        before, after = self._known.get(id(program), (None, None))
        if before is not program:
            steps = list(map(self._step, program.eqns))
            same = all(map(operator.is_, steps, program.eqns))
            after = program if same else replace_steps(program, steps)
            self._known[id(program)] = program, after
        return after

    def _step(self, step: JaxprEqn) -> JaxprEqn:
        if step.primitive.name == "shard_map":  # its steps say which devices' parts differ; replacements do not
            return step
        replacement = self._replacements.get(step.primitive.name)
        if replacement is None:
            params = {name: self._param(param) for name, param in step.params.items()}
            same = all(params[name] is param for name, param in step.params.items())
            return step if same else step.replace(params=params)
        key = step.primitive.name, tuple(step.params.items()), tuple(var.aval for var in step.invars)
        if key not in self._steps:
            function = jax.jit(functools.partial(replacement, **step.params))
            (self._steps[key],) = jax.make_jaxpr(function)(*key[2]).eqns
        other = self._steps[key]
        for var, wanted in zip(other.outvars, step.outvars, strict=True):
            got, kept = var.aval, wanted.aval
            assert (got.shape, got.dtype) == (kept.shape, kept.dtype), f"{step.primitive}: {got} for {kept}"  # type: ignore[attr-defined]
        return other.replace(invars=step.invars, outvars=step.outvars, source_info=step.source_info)

    def _param(self, param: Any) -> Any:
        if is_program(param):
            return self.of(param)
        if isinstance(param, tuple) and any(map(is_program, param)):
            items = map(self._param, param)
            return type(param)(*items) if hasattr(param, "_fields") else tuple(items)
        return param


def equations(program: Program) -> Iterator[JaxprEqn]:
    """The steps of a program, and those of the programs nested in it."""
    for equation in program.eqns:
        yield equation
        for inner in nested_programs(equation):
            yield from equations(inner)


def peak_bytes(program: Program) -> int:
    """The bytes of intermediate arrays that are alive at once, if every step makes its results and nothing is fused.

    The program's inputs are not counted, but its outputs are.

    >>> import jax.numpy as jnp
    >>> peak_bytes(jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(x) + 1))(jnp.ones(100)))
    800
    """
    last = {
        var: k for k, equation in enumerate(program.eqns) for var in equation.invars if not isinstance(var, Literal)
    }
    kept = {var for var in program.outvars if not isinstance(var, Literal)}
    alive: dict[Any, int] = {}
    peak = 0
    for k, equation in enumerate(program.eqns):
        inside = max((peak_bytes(inner) for inner in nested_programs(equation)), default=0)
        made = {var: array_bytes(var) for var in equation.outvars}
        peak = max(peak, sum(alive.values()) + max(inside, sum(made.values())))
        alive |= made
        for var in [var for var in alive if last.get(var, -1) <= k and var not in kept]:
            del alive[var]
    return peak


def largest_step(program: Program, given: Collection[Any] | None = None) -> int:
    """The bytes of the operands and results of the largest step, without the program's inputs.

    >>> import jax.numpy as jnp
    >>> largest_step(jax.make_jaxpr(lambda x: jax.jit(jnp.cos)(jnp.sin(x)))(jnp.ones(100)))
    800
    """
    given = {*(program.invars if given is None else given), *program.constvars}
    sizes = [0]
    for equation in program.eqns:
        outer = [not isinstance(var, Literal) and var in given for var in equation.invars]
        inner = [
            largest_step(part, [var for var, known in zip(part.invars, outer, strict=False) if known])
            for part in nested_programs(equation)
        ]
        arrays = {var for var in equation.invars if not isinstance(var, Literal) and var not in given}
        sizes += inner or [sum(map(array_bytes, arrays | set(equation.outvars)))]
    return max(sizes)


def array_bytes(var: Any) -> int:
    """The size of a value of a program; random keys count as nothing."""
    return math.prod(var.aval.shape) * getattr(var.aval.dtype, "itemsize", 0)


def nested_programs(equation: JaxprEqn) -> Iterator[Program]:
    """The programs among the parameters of a step: those of loops, branches and calls."""
    for param in equation.params.values():
        yield from filter(is_program, param if isinstance(param, tuple | list) else (param,))
