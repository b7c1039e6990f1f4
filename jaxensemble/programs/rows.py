"""Proof that a program keeps the rows of a minibatch apart, so that a few of them can run at a time.

The program is traced for two batch sizes. The axis along which the shapes of an array differ is its batch axis; every
step that takes rows must be known to keep them apart along it. Any other step counts as mixing rows.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from jaxensemble.compat import JaxprEqn, Literal, Program, constants, is_program, scan_counts, traced_function
from jaxensemble.programs.primitives import ELEMENTWISE

Axes = tuple[int | None, ...]
"""The batch axis of every array of a tree, in the order of its leaves; None for one without rows."""


class MixedRows(Exception):
    """A step mixes rows, or may mix them; the text names the step."""


def row_axes(first: Program, second: Program) -> Axes:
    """The batch axis of every output of a program that keeps rows apart, each output with one entry for each row.

    `first` and `second` are traces of one function for two batch sizes; the proof holds for programs of these sizes.

    **Raises:** `MixedRows` for a program that mixes rows, or with a step that is not known to keep them apart.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> def traces(function):
    ...     return [jax.make_jaxpr(function)(jnp.ones((size, 3))) for size in (8, 2)]
    >>> row_axes(*traces(lambda x: (x.sum(1), jnp.moveaxis(x, 0, 1))))
    (0, 1)
    >>> row_axes(*traces(lambda x: x - x.mean(0)))
    Traceback (most recent call last):
        ...
    jaxensemble.programs.rows.MixedRows: reduce_sum
    """
    return _compare_programs(first, second)


def _compare_programs(a: Program, b: Program) -> Axes:
    if len(constants(a)) != len(constants(b)):
        raise MixedRows("the constants depend on the batch size")
    for x, y in zip(constants(a), constants(b), strict=True):
        if x is not y and not (np.shape(x) == np.shape(y) and np.array_equal(np.asarray(x), np.asarray(y))):
            raise MixedRows("a constant depends on the batch size")
    if len(a.eqns) != len(b.eqns) or len(a.outvars) != len(b.outvars):
        raise MixedRows("the steps depend on the batch size")
    for x, y in zip(a.eqns, b.eqns, strict=True):
        _compare_steps(x, y)
    return tuple(_axis(x, y) for x, y in zip(a.outvars, b.outvars, strict=True))


def _compare_steps(a: JaxprEqn, b: JaxprEqn) -> None:
    """Checks that a step keeps rows apart.

    **Raises:** `MixedRows` if it may not, also for a step that its rule does not expect, for example of another JAX."""
    if a.primitive is not b.primitive or (len(a.invars), len(a.outvars)) != (len(b.invars), len(b.outvars)):
        raise MixedRows("the steps depend on the batch size")
    try:
        apart = _are_apart(_Step(a, b))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MixedRows(f"{a.primitive.name}: {error!r}") from error
    if not apart:
        raise MixedRows(a.primitive.name)


def _are_apart(step: "_Step") -> bool:
    if all(axis is None for axis in (*step.ins, *step.outs)):
        step.check_params()
        return True
    rule = _RULES.get(step.equations[0].primitive.name)
    lost = step.rows and None in step.outs and rule not in _PROGRAMS  # rows went in, and an output has none
    return rule is not None and not lost and rule(step)


def _axis(a: Any, b: Any) -> int | None:
    """The only axis along which two traces of one value differ. None for a value that is equal in both."""
    if isinstance(a, Literal) != isinstance(b, Literal) or (isinstance(a, Literal) and not _same(a.val, b.val)):
        raise MixedRows("a number depends on the batch size")
    if len(_shape(a)) != len(_shape(b)):
        raise MixedRows("the number of axes depends on the batch size")
    axes = [k for k, (x, y) in enumerate(zip(_shape(a), _shape(b), strict=True)) if x != y]
    if len(axes) > 1:
        raise MixedRows("every row meets every other")
    return axes[0] if axes else None


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _parts(value: Any) -> tuple[Any, ...]:
    """The items of a parameter that may be a tuple."""
    return value if isinstance(value, tuple) else (value,)


def _same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc"))


def _same_param(a: Any, b: Any) -> bool:
    """Returns whether parameters are equal. A NaN, with which gathers fill what lies outside, equals itself."""
    return _same(a, b) if isinstance(a, np.ndarray | np.generic | float) else bool(a == b)


class _Step:
    """One step in both traces, and the batch axes of its operands and results."""

    def __init__(self, a: JaxprEqn, b: JaxprEqn):
        self.equations = a, b
        self.ins: Axes = tuple(_axis(x, y) for x, y in zip(a.invars, b.invars, strict=True))
        self.outs: Axes = tuple(_axis(x, y) for x, y in zip(a.outvars, b.outvars, strict=True))

    def mixed(self) -> MixedRows:
        return MixedRows(self.equations[0].primitive.name)

    def param(self, name: str) -> Any:
        """A parameter, which must not depend on the batch size."""
        first, second = (equation.params[name] for equation in self.equations)
        if not _same_param(first, second):
            raise self.mixed()
        return first

    def check_params(self, *, but: Sequence[str] = ()) -> None:
        """Checks that no parameter depends on the batch size; programs among them are compared, too.

        **Raises:** `MixedRows` for a parameter that does."""
        first, second = (equation.params for equation in self.equations)
        for name in first.keys() - set(but):
            for x, y in zip(_parts(first[name]), _parts(second[name]), strict=True):
                if is_program(x):
                    _compare_programs(x, y)
                elif not callable(x) and not _same_param(x, y):
                    raise self.mixed()

    def shape(self, operand: int) -> tuple[int, ...]:
        return _shape(self.equations[0].invars[operand])

    @property
    def rows(self) -> set[int]:
        """The batch axes of all operands that have one."""
        return {axis for axis in self.ins if axis is not None}


def _elementwise(step: _Step) -> bool:
    step.check_params()
    return len(step.rows) == 1 and set(step.outs) == step.rows


def _broadcast(step: _Step) -> bool:
    """An operand without rows is repeated for every row; an operand with rows keeps them."""
    dims = step.param("broadcast_dimensions")
    (axis, *_), (out,) = step.ins, step.outs
    if axis is not None:
        return dims[axis] == out
    return all(dims[k] != out or size == 1 for k, size in enumerate(step.shape(0)))


def _iota(step: _Step) -> bool:
    return step.outs[0] != step.param("dimension")


def _reshape(step: _Step) -> bool:
    """Rows stay apart if the axes before theirs keep the number of entries: a row is one block within each entry."""
    before, after = step.ins[0], step.outs[0]
    pairs = [(_shape(e.invars[0])[:before], _shape(e.outvars[0])[:after]) for e in step.equations]
    return all(math.prod(ours) == math.prod(theirs) for ours, theirs in pairs)


def _reshape_of_moved(step: _Step) -> bool:
    """Axes may be moved before the reshape, as `jnp.reshape(order="F")` does."""
    return all(e.params["dimensions"] is None for e in step.equations) and _reshape(step)


def _same_for_all(step: _Step) -> bool:
    """Steps that move axes whole."""
    step.check_params()
    return len(step.rows) == 1


def _apart_along(name: str) -> Callable[[_Step], bool]:
    """Steps along axes that a parameter names, of which the batch axis must not be one."""

    def rule(step: _Step) -> bool:
        step.check_params()
        value = step.param(name)
        axes = value if isinstance(value, tuple | list) else (value,)
        rank = max(len(step.shape(k)) for k, axis in enumerate(step.ins) if axis is not None)
        return len(step.rows) == 1 and not step.rows & {axis % rank for axis in axes}

    return rule


def _pad(step: _Step) -> bool:
    axis = step.ins[0]
    return axis is not None and step.ins[1] is None and step.param("padding_config")[axis] == (0, 0, 0)


def _slice(step: _Step) -> bool:
    """All rows, in order."""
    axis = step.ins[0]
    if axis is None:
        return False
    for equation in step.equations:
        params, size = equation.params, _shape(equation.invars[0])[axis]
        strides = params["strides"]
        if params["start_indices"][axis] or params["limit_indices"][axis] != size or (strides and strides[axis] != 1):
            return False
    pairs = [[e.params[name] for e in step.equations] for name in ("start_indices", "limit_indices", "strides")]
    others = [k for k in range(len(step.shape(0))) if k != axis]
    return all(a == b or all(a[k] == b[k] for k in others) for a, b in pairs)


def _dynamic_slice(step: _Step) -> bool:
    """All rows, wherever the slice begins: what would go over the end is moved back to 0."""
    axis = step.ins[0]
    return (
        axis is not None
        and step.rows == {axis}
        and all(equation.params["slice_sizes"][axis] == _shape(equation.invars[0])[axis] for equation in step.equations)
    )


def _dynamic_update_slice(step: _Step) -> bool:
    """All rows: an update of all rows begins at 0, whatever its start."""
    axis, update, *starts = step.ins
    if axis is None or axis != update or any(start is not None for start in starts):
        return False
    return all(_shape(e.invars[0])[axis] == _shape(e.invars[1])[axis] for e in step.equations)


def _dot_general(step: _Step) -> bool:
    (contracted, batched) = step.param("dimension_numbers")
    left, right = step.ins
    if any(axis in dims for axis, dims in zip((left, right), contracted, strict=True)):
        return False
    if left is not None and right is not None:
        return left in batched[0] and right in batched[1] and batched[0].index(left) == batched[1].index(right)
    return all(axis not in dims for axis, dims in zip((left, right), batched, strict=True))


def _convolution(step: _Step) -> bool:
    numbers = step.param("dimension_numbers")
    step.check_params(but=("lhs_shape", "rhs_shape"))
    left, right = step.ins
    return right is None and left == numbers.lhs_spec[0] and step.param("batch_group_count") == 1


def _window(step: _Step) -> bool:
    """Pooling with windows of one row."""
    step.check_params()
    (axis,) = step.rows
    params = step.equations[0].params
    sizes = [params[name][axis] for name in params if name.endswith(("dimensions", "strides", "dilation"))]
    return all(size == 1 for size in sizes) and params["padding"][axis] == (0, 0)


def _gather(step: _Step) -> bool:
    """Entries of a table that the rows name; or the same entries from every row."""
    numbers = step.param("dimension_numbers")
    table, indices = step.ins
    if table is None:
        step.check_params()
        return indices != len(step.shape(1)) - 1
    if indices is not None:
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        return (table, indices) in pairs
    taken = (*numbers.collapsed_slice_dims, *numbers.start_index_map, *numbers.operand_batching_dims)
    whole = all(e.params["slice_sizes"][table] == _shape(e.invars[0])[table] for e in step.equations)
    return table not in taken and whole


def _leading(core: int) -> Callable[[_Step], bool]:
    """Steps on the last axes of every operand, for each of the leading ones."""

    def rule(step: _Step) -> bool:
        step.check_params()
        return len(step.rows) == 1 and all(
            axis is None or axis < len(step.shape(k)) - core for k, axis in enumerate(step.ins)
        )

    return rule


def _fft(step: _Step) -> bool:
    return step.ins[0] is not None and step.ins[0] < len(step.shape(0)) - len(step.param("fft_lengths"))


def _call(step: _Step) -> bool:
    """Steps that are programs of their own, which differentiation may replace."""
    programs = [[part for part in map(_parts, e.params.values()) for part in part] for e in step.equations]
    a, b = ([*filter(is_program, parts)] for parts in programs)
    _compare_programs(a[0], b[0])
    return len(a) == len(b) == 1


def _custom_jvp(step: _Step) -> bool:
    """Custom derivatives of known packages only: the program of a custom derivative cannot be read."""
    functions = [traced_function(equation.params["call_jaxpr"]) for equation in step.equations]
    return all(text.partition(" at ")[2].startswith(_PACKAGES) for text in functions) and _call(step)


def _scan(step: _Step) -> bool:
    """A program for every step in time: time is the first axis of the arrays that it splits and stacks."""
    a, b = (equation.params["jaxpr"] for equation in step.equations)
    _compare_programs(a, b)
    step.param("length")
    consts, carry = scan_counts(step.equations[0])
    return (consts, carry) == scan_counts(step.equations[1]) and 0 not in (
        *step.ins[consts + carry :],
        *step.outs[carry:],
    )


def _while(step: _Step) -> bool:
    """A loop whose length does not depend on rows."""
    a, b = step.equations
    _compare_programs(a.params["body_jaxpr"], b.params["body_jaxpr"])
    condition = [equation.params["cond_jaxpr"] for equation in step.equations]
    _compare_programs(*condition)
    steps = [_Step(x, y) for x, y in zip(*(program.eqns for program in condition), strict=True)]
    return not any(step.rows for step in steps)


def _cond(step: _Step) -> bool:
    for a, b in zip(*(equation.params["branches"] for equation in step.equations), strict=True):
        _compare_programs(a, b)
    return step.ins[0] is None


_PROGRAMS = (_call, _custom_jvp, _scan, _while, _cond)

_PACKAGES = tuple(
    f"{folder}{os.sep}" for folder in (Path(jax.__file__).parent, Path(flax.__file__).parent, Path(__file__).parents[1])
)

_RULES: dict[str, Callable[[_Step], bool]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split(),
        _apart_along("axes"),
    ),
    **dict.fromkeys("cumlogsumexp cummax cummin cumprod cumsum".split(), _apart_along("axis")),
    **dict.fromkeys(
        "reduce_window reduce_window_max reduce_window_min reduce_window_sum".split(),
        _window,
    ),
    **dict.fromkeys("squeeze expand_dims".split(), _reshape),
    "reshape": _reshape_of_moved,
    **dict.fromkeys("cholesky eigh lu qr svd triangular_solve householder_product".split(), _leading(2)),
    "broadcast_in_dim": _broadcast,
    "closed_call": _call,
    "concatenate": _apart_along("dimension"),
    "cond": _cond,
    "conv_general_dilated": _convolution,
    "custom_jvp_call": _custom_jvp,
    # No custom_vjp_call: its backward pass cannot be read.
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "iota": _iota,
    "jit": _call,
    "pad": _pad,
    "remat2": _call,
    "rev": _apart_along("dimensions"),
    "scan": _scan,
    "slice": _slice,
    "sort": _apart_along("dimension"),
    "split": _apart_along("axis"),
    "stack": _same_for_all,
    "top_k": _apart_along("axis"),
    "transpose": _same_for_all,
    "unstack": _apart_along("axis"),
    "while": _while,
}
