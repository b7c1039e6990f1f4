"""What a network's call is as a JAX program."""

import collections
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

CONVOLUTION, PRODUCT = "conv_general_dilated", "dot_general"


def primitives(function: Callable[..., Any], *args: Any) -> collections.Counter[str]:
    """How often each JAX primitive stands in the program of one call, nested programs included.

    The program is traced, not run; `args` may be `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> primitives(lambda x: jnp.sin(x).T + 1, jnp.ones((2, 3)))["transpose"]
    1
    """
    return collections.Counter(step.primitive.name for step in equations(jax.make_jaxpr(function)(*args).jaxpr))


def rewritten(function: Callable[..., Any], replacements: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function with some of its steps replaced, wherever they stand in its program: in loops and branches, too.

    A replacement is called with a step's operands and parameters, and gives a result of the same shape and dtype.

    >>> import jax.numpy as jnp
    >>> rewritten(lambda x: jnp.sin(x) + 1, {"sin": lambda x, **params: 2 * x})(3.0)
    Array(7., dtype=float32, weak_type=True)
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = ClosedJaxpr(_replaced(program.jaxpr, replacements), program.consts)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*jax.tree.leaves(args)))

    return run


def _replaced(jaxpr: Jaxpr, replacements: Mapping[str, Callable[..., Any]]) -> Jaxpr:
    def nested(param: Any) -> Any:
        match param:
            case ClosedJaxpr():
                return ClosedJaxpr(_replaced(param.jaxpr, replacements), param.consts)
            case Jaxpr():
                return _replaced(param, replacements)
            case tuple() if any(isinstance(item, ClosedJaxpr | Jaxpr) for item in param):
                return tuple(map(nested, param))
        return param

    def step(equation: JaxprEqn) -> JaxprEqn:
        replacement = replacements.get(equation.primitive.name)
        if replacement is None:
            return equation.replace(params={name: nested(param) for name, param in equation.params.items()})
        call = jax.jit(functools.partial(replacement, **equation.params))
        (other,) = jax.make_jaxpr(call)(*[var.aval for var in equation.invars]).jaxpr.eqns
        return other.replace(invars=equation.invars, outvars=equation.outvars)

    return jaxpr.replace(eqns=list(map(step, jaxpr.eqns)))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The steps of a program, and those of the programs nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _nested(equation):
            yield from equations(inner)


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The bytes of intermediate arrays that are alive at once, if every step makes its results and nothing is fused.

    The program's inputs are not counted, but its outputs are.

    >>> import jax.numpy as jnp
    >>> peak_bytes(jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(x) + 1))(jnp.ones(100)).jaxpr)
    800
    """
    last = {var: k for k, equation in enumerate(jaxpr.eqns) for var in equation.invars if not isinstance(var, Literal)}
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    alive: dict[Any, int] = {}
    peak = 0
    for k, equation in enumerate(jaxpr.eqns):
        inside = max((peak_bytes(inner) for inner in _nested(equation)), default=0)
        made = {var: array_bytes(var) for var in equation.outvars}
        peak = max(peak, sum(alive.values()) + max(inside, sum(made.values())))
        alive |= made
        for var in [var for var in alive if last.get(var, -1) <= k and var not in kept]:
            del alive[var]
    return peak


def largest_step(jaxpr: Jaxpr, given: Collection[Any] | None = None) -> int:
    """The bytes of all operands and results of the step that has most, the program's own inputs not counted.

    >>> import jax.numpy as jnp
    >>> largest_step(jax.make_jaxpr(lambda x: jax.jit(jnp.cos)(jnp.sin(x)))(jnp.ones(100)).jaxpr)
    800
    """
    given = {*(jaxpr.invars if given is None else given), *jaxpr.constvars}
    sizes = [0]
    for equation in jaxpr.eqns:
        outer = [not isinstance(var, Literal) and var in given for var in equation.invars]
        inner = [
            largest_step(program, [var for var, known in zip(program.invars, outer, strict=False) if known])
            for program in _nested(equation)
        ]
        arrays = {var for var in equation.invars if not isinstance(var, Literal) and var not in given}
        sizes += inner or [sum(map(array_bytes, arrays | set(equation.outvars)))]
    return max(sizes)


def array_bytes(var: Any) -> int:
    """The size of a value of a program; random keys count as nothing."""
    return math.prod(var.aval.shape) * getattr(var.aval.dtype, "itemsize", 0)


def _nested(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for param in equation.params.values():
        for inner in param if isinstance(param, tuple | list) else (param,):
            if isinstance(inner, ClosedJaxpr):
                yield inner.jaxpr
            elif isinstance(inner, Jaxpr):
                yield inner
