"""Normalisation in evaluation mode, folded into the convolution or product before it.

`(conv(x, kernel) + bias - mean) * factor + shift` is `conv(x, kernel * factor) + ((bias - mean) * factor + shift)`: one
pass over the activations instead of several. The numbers are the same except for rounding, which is why half precision
stays as it is. A kernel times an infinite factor would make NaN of the zeros that it meets. Factors with a reciprocal,
such as that of a variance without epsilon, are therefore left where they are.
"""

import collections
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.compat import JaxprEqn, Literal, Program, run_step
from jaxensemble.programs.evaluate import run_program, write_out
from jaxensemble.programs.rewrite import CONVOLUTION


def fold_scales(function: Callable[..., Any], weights: Collection[int]) -> Callable[..., Any]:
    """Returns the function with scales and shifts by weights folded into the kernels before them.

    `weights` are the places of the arguments that hold weights. Of float32 and float64 alone.

    >>> normalized = lambda kernel, scale, x: (x @ kernel + 1) * scale + 2
    >>> folded = fold_scales(normalized, weights=(0, 1))
    >>> arrays = jnp.ones((2, 3)), jnp.full(3, 0.5), jnp.ones((4, 2))
    >>> float(folded(*arrays)[0, 0]), float(normalized(*arrays)[0, 0])
    (3.5, 3.5)
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.disable_jit(False):
            program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
            program = write_out(program)
        fixed = [k in weights for k, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
        return jax.tree.unflatten(jax.tree.structure(shapes), _Folding(program, fixed).run(jax.tree.leaves(args)))

    return run


class _Pending(NamedTuple):
    """A convolution or product that is to be scaled and shifted along its features, before it is run."""

    step: JaxprEqn
    operands: Sequence[Any]
    scale: Any = None
    shift: Any = None

    @property
    def axes(self) -> tuple[int, int]:
        """The axis of the features in the result, and in the kernel."""
        if self.step.primitive.name == CONVOLUTION:
            numbers = self.step.params["dimension_numbers"]
            return numbers.out_spec[1], numbers.rhs_spec[0]
        return len(_shape(self.step.outvars[0])) - 1, _free_axes(self.step)[0]

    def then(self, name: str, vector: Any) -> "_Pending":
        """The same, with one more step after it: its features plus, minus, times or by a vector."""
        match name:
            case "add" | "sub":
                shift = vector if name == "add" else -vector
                return self._replace(shift=shift if self.shift is None else self.shift + shift)
            case "mul":
                by = vector
            case _:
                by = 1 / vector
        scale = by if self.scale is None else self.scale * by
        return self._replace(scale=scale, shift=None if self.shift is None else self.shift * by)

    def run(self) -> Any:
        x, kernel = self.operands
        at_result, at_kernel = self.axes
        if self.scale is not None:
            kernel = kernel * _along(self.scale, kernel.ndim, at_kernel)
        (y,) = run_step(self.step, [x, kernel])
        return y if self.shift is None else y + _along(self.shift, y.ndim, at_result)


class _Folding:
    """The folding of one program."""

    def __init__(self, program: Program, fixed: Sequence[bool]):
        self._program = program
        self._fixed = {
            *program.constvars,
            *(var for var, is_fixed in zip(program.invars, fixed, strict=True) if is_fixed),
        }
        self._uses = collections.Counter(
            atom for step in program.eqns for atom in step.invars if not isinstance(atom, Literal)
        )
        self._uses.update(atom for atom in program.outvars if not isinstance(atom, Literal))
        for step in program.eqns:
            if not step.effects and all(map(self._is_fixed, step.invars)):
                self._fixed.update(step.outvars)
        self._positive: set[Any] = set()
        self._unbounded: set[Any] = set()
        for step in program.eqns:
            if self._fixed.issuperset(step.outvars):
                if self._makes_positive(step):
                    self._positive.update(step.outvars)
                if self._is_unbounded_reciprocal(step) or any(map(self._is_unbounded, step.invars)):
                    self._unbounded.update(step.outvars)

    def run(self, operands: Sequence[Any]) -> list[Any]:
        return [*map(_finished, run_program(self._program, operands, self._step))]

    def _is_fixed(self, atom: Any) -> bool:
        return isinstance(atom, Literal) or atom in self._fixed

    def _is_positive(self, atom: Any) -> bool:
        """Returns whether numbers are above 0: a sum with a positive number is taken for that of a variance."""
        return bool(np.all(np.greater(atom.val, 0))) if isinstance(atom, Literal) else atom in self._positive

    def _is_unbounded(self, atom: Any) -> bool:
        return not np.all(np.isfinite(atom.val)) if isinstance(atom, Literal) else atom in self._unbounded

    def _makes_positive(self, step: JaxprEqn) -> bool:
        match step.primitive.name:
            case "add" | "max":
                return any(map(self._is_positive, step.invars))
            case "mul" | "div":
                return all(map(self._is_positive, step.invars))
            case name:
                return name in _KEEP_SIGNS and self._is_positive(step.invars[0])

    def _is_unbounded_reciprocal(self, step: JaxprEqn) -> bool:
        match step.primitive.name:
            case "div":
                by = step.invars[1]
                is_number = isinstance(by, Literal) and bool(np.all(by.val))
                return not is_number and not self._is_positive(by)
            case "rsqrt":
                return not self._is_positive(step.invars[0])
            case "integer_pow":
                return step.params["y"] < 0 and not self._is_positive(step.invars[0])
            case name:
                return name == "pow" and not self._is_positive(step.invars[0])

    def _step(self, step: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
        name = step.primitive.name
        if name in _SCALES:
            for at, other in ((0, 1), (1, 0)) if name in ("add", "mul") else ((0, 1),):
                found = self._scaled(step, operands, at, other)
                if found is not None:
                    return [found if self._uses[step.outvars[0]] == 1 else found.run()]
        operands = [*map(_finished, operands)]
        return [_Pending(step, operands)] if self._may_be_scaled(step) else run_step(step, operands)

    def _may_be_scaled(self, step: JaxprEqn) -> bool:
        """Returns whether a step is a convolution or product by a kernel of weights, and its result is read once."""
        match step.primitive.name:
            case "conv_general_dilated":
                plain = step.params["batch_group_count"] == 1
            case "dot_general":
                plain = len(_free_axes(step)) == 1 and not step.params["dimension_numbers"][1][1]
            case _:
                return False
        dtypes = {atom.aval.dtype for atom in (*step.invars, *step.outvars)}  # type: ignore[attr-defined]
        return (
            plain
            and dtypes in ({jnp.dtype("float32")}, {jnp.dtype("float64")})
            and self._is_fixed(step.invars[1])
            and not self._is_fixed(step.invars[0])
            and self._uses[step.outvars[0]] == 1
        )

    def _scaled(self, step: JaxprEqn, operands: Sequence[Any], at: int, other: int) -> _Pending | None:
        """The pending step with one more step after it; None if that is not of one number for each feature."""
        pending, vector = operands[at], operands[other]
        if not isinstance(pending, _Pending) or not self._is_fixed(step.invars[other]):
            return None
        if self._is_unbounded_reciprocal(step) or self._is_unbounded(step.invars[other]):
            return None
        result = pending.step.outvars[0]
        axis, size = pending.axes[0], math.prod(_shape(step.invars[other]))
        same = _shape(step.outvars[0]) == _shape(result) and step.outvars[0].aval.dtype == result.aval.dtype  # type: ignore[attr-defined]
        shape = _shape(step.invars[other])
        features = _shape(result)[axis]
        along = not shape or size == 1 or (len(shape) == len(_shape(result)) and size == shape[axis] == features)
        if not same or not along:
            return None
        return pending.then(step.primitive.name, jnp.reshape(vector, -1))


_SCALES = frozenset({"add", "sub", "mul", "div"})

_KEEP_SIGNS = frozenset(
    {"broadcast_in_dim", "convert_element_type", "integer_pow", "reshape", "rsqrt", "sqrt", "squeeze"}
)
"""Steps whose results are above 0 where their first operand is."""


def _finished(value: Any) -> Any:
    return value.run() if isinstance(value, _Pending) else value


def _along(vector: Any, ndim: int, axis: int) -> Any:
    """A vector along one of `ndim` axes."""
    return vector.reshape([-1 if k == axis else 1 for k in range(ndim)])


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _free_axes(step: JaxprEqn) -> list[int]:
    """The axes of the right operand of a product that the result has."""
    (_, over), (_, batch) = step.params["dimension_numbers"]
    return [axis for axis in range(len(_shape(step.invars[1]))) if axis not in (*over, *batch)]
