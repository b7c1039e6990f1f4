"""The part of a program that depends on weights alone, taken out of it: it runs once for many calls.

Transposed kernels, a member's slice of the stack, the factor of a normalisation: a program that holds their computation
moves as many bytes at every call as it has weights.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.compat import JaxprEqn, Literal, Program, constants
from jaxensemble.programs.evaluate import run_steps, write_out
from jaxensemble.programs.rewrite import array_bytes, nested_programs

_SMALL = 256
"""The bytes of a result that is taken out whatever it is made from."""

_GROWTH = 2
"""The most times that results may have the bytes of what they are made from: a bias spread over all rows has more."""

_VIEWS = frozenset({"expand_dims", "reshape", "squeeze", "stop_gradient"})
"""Steps that compiled programs do not run: taken out, they would copy."""


class Division:
    """A program in two parts: `prepare` makes arrays from weights, `call` reads these and all other operands.

    >>> import jax.numpy as jnp
    >>> program = jax.make_jaxpr(lambda w, x: x @ w.T)(jnp.ones((2, 3)), jnp.ones((4, 3)))
    >>> division = Division(program, [True, False])
    >>> arrays = division.prepare([jnp.ones((2, 3))])
    >>> arrays[0].shape, division.call(arrays, [jnp.ones((4, 3))])[0].shape
    ((3, 2), (4, 2))
    """

    def __init__(self, program: Program, weights: Sequence[bool]):
        self._program = program = write_out(program)
        self._weights = [var for var, is_weight in zip(program.invars, weights, strict=True) if is_weight]
        self._others = [var for var, is_weight in zip(program.invars, weights, strict=True) if not is_weight]
        made = dict.fromkeys([*self._weights, *program.constvars])
        before: list[JaxprEqn] = []
        for step in program.eqns:
            if _is_worth_it(step) and made.keys() >= set(_variables(step.invars)):
                before.append(step)
                made |= dict.fromkeys(step.outvars)
        once = set(map(id, before))
        after = [step for step in program.eqns if id(step) not in once]
        needed = {var for step in after for var in _variables(step.invars)} | set(_variables(program.outvars))
        views: list[JaxprEqn] = []
        for step in reversed(before):
            if step.primitive.name in _VIEWS and needed.issuperset(step.outvars):
                views.append(step)
                needed.difference_update(step.outvars)
                needed.update(_variables(step.invars))
        self._before, self._after = before, [*reversed(views), *after]
        self._made = [var for var in made if var in needed]

    @property
    def kept(self) -> list[int | None]:
        """For each array of `prepare`, the place of the weight that it is; None for an array that is made."""
        places = {var: k for k, var in enumerate(self._weights)}
        return [places.get(var) for var in self._made]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The shape and dtype of each array of `prepare`."""
        avals: list[Any] = [var.aval for var in self._made]
        return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

    @property
    def names(self) -> list[str]:
        """A name for each array of `prepare`: equal for equal computations from weights of equal places."""
        names = {var: f"weight {k}" for k, var in enumerate(self._weights)}
        values = zip(self._program.constvars, constants(self._program), strict=True)
        names |= {var: _name_of_value(var.aval, value) for var, value in values}
        for step in self._before:
            operands = [
                _name_of_value(atom.aval, atom.val) if isinstance(atom, Literal) else names[atom]
                for atom in step.invars
            ]
            inner = [*_constants_within(step)]  # the text of a program does not show them
            text = f"{step.primitive} {step.params} {inner} {operands} {[var.aval for var in step.outvars]}"
            name = hashlib.sha256(text.encode()).hexdigest()
            names |= {var: f"{name} {k}" for k, var in enumerate(step.outvars)}
        return [names[var] for var in self._made]

    def prepare(self, weights: Sequence[Any]) -> list[Any]:
        """The arrays that `call` reads."""
        return run_steps(self._before, self._given(self._weights, weights), self._made)

    def call(self, arrays: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """The results of the program, from the arrays of `prepare` and the operands that are no weights."""
        given = self._given([*self._made, *self._others], [*arrays, *others])
        return run_steps(self._after, given, self._program.outvars)

    def _given(self, variables: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
        names = [*self._program.constvars, *variables]
        return dict(zip(names, [*constants(self._program), *values], strict=True))


def _name_of_value(aval: Any, value: Any) -> str:
    value = jax.random.key_data(value) if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) else value
    return f"{aval} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()}"


def _constants_within(step: JaxprEqn) -> Iterator[str]:
    for program in nested_programs(step):
        for var, value in zip(program.constvars, constants(program), strict=False):
            yield _name_of_value(var.aval, value)
        for inner in program.eqns:
            yield from _constants_within(inner)


def _is_worth_it(step: JaxprEqn) -> bool:
    """Returns whether a step of weights alone is to run once: not if that takes much more memory than the weights."""
    read, made = (sum(map(array_bytes, set(_variables(atoms)))) for atoms in (step.invars, step.outvars))
    return not step.effects and made <= max(_SMALL, _GROWTH * read)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
