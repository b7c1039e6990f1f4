"""Follows the axes of every value of a Flax module through its jaxpr, down to the axes of its arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from jaxensemble.errors import InputError
from jaxensemble.state import flatten, merge, split, unflatten
from torch_bridge.state_dicts.axes import Axis, reshape, unify

Axes = list[Axis]
Rule = Callable[[Any, list[Axes]], list[Axes]]


def leaf_axes(module: nnx.Module, inputs: tuple[Any, ...]) -> dict[str, Axes]:
    """The axes of every parameter and buffer, by dotted name, after one call in evaluation mode.

    `module` is neither changed nor run: its call is traced with the shapes and dtypes of `inputs`.

    **Raises:** `InputError` if the call fails.
    """
    state = split(module)
    module = merge(*state)
    nnx.Module.eval(module)
    state = split(module)
    groups = {"params": flatten(state.params), "buffers": flatten(state.buffers)}
    initial = groups["params"] | groups["buffers"]
    names = list(initial)

    def call(leaves: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
        arrays = dict(zip(names, leaves, strict=True))
        trees = {kind: unflatten({name: arrays[name] for name in group}) for kind, group in groups.items()}
        return jax.tree.leaves(merge(*state._replace(**trees))(*inputs))

    leaves = [jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) for leaf in initial.values()]
    try:
        closed = jax.make_jaxpr(call)(leaves, inputs)
    except Exception as error:  # whatever a user's call raises is told as one kind of error
        raise InputError(
            f"`flax_module` cannot be called with `example_input`: {type(error).__name__}: {error}\nPass an input as "
            "the Flax module takes it (channels-last, where it convolves); a tuple for several arguments."
        ) from error
    own = {name: [Axis(size) for size in leaf.shape] for name, leaf in zip(names, leaves, strict=True)}
    given = [
        [Axis(size, raw=True, last=k == leaf.ndim - 1) for k, size in enumerate(leaf.shape)]
        for leaf in jax.tree.leaves(inputs)
    ]
    _run(closed.jaxpr, [*own.values(), *given])
    return own


def _run(jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
    known: dict[Any, Axes] = dict(zip(jaxpr.invars, inputs, strict=True))

    def axes_of(atom: Any) -> Axes:
        aval: Any = atom.aval
        return known[atom] if isinstance(atom, core.Var) and atom in known else _fresh(aval.shape)

    for equation in jaxpr.eqns:
        operands = [axes_of(atom) for atom in equation.invars]
        for variable, axes in zip(equation.outvars, _rule(equation)(equation, operands), strict=True):
            known[variable] = axes
    return [axes_of(atom) for atom in jaxpr.outvars]


def _rule(equation: Any) -> Rule:
    name = equation.primitive.name
    if name in RULES:
        return RULES[name]
    if name in ELEMENTWISE:
        return _elementwise
    if name.startswith("reduce_window"):
        return _window
    if name.startswith(("reduce_", "arg")):
        return _reduce
    return _inlined if _inner(equation.params) is not None else _unknown


def _fresh(shape: Sequence[int]) -> Axes:
    return [Axis(size) for size in shape]


def _shapes(equation: Any) -> list[tuple[int, ...]]:
    return [variable.aval.shape for variable in equation.outvars]


def _inner(params: Mapping[str, Any]) -> Any:
    """The jaxpr of a call, which runs it once on its operands as they are; None for a primitive that is no call."""
    name = next((name for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params), None)
    return None if name is None else getattr(params[name], "jaxpr", params[name])


def _inlined(equation: Any, operands: list[Axes]) -> list[Axes]:
    jaxpr = _inner(equation.params)
    sizes = [tuple(axis.size for axis in axes) for axes in operands]
    if [getattr(variable.aval, "shape", None) for variable in jaxpr.invars] != sizes:
        for axis in (axis for axes in operands for axis in axes):
            axis.find().opaque = equation.primitive.name  # whatever is done to it is not seen
        return _unknown(equation, operands)
    return _run(jaxpr, operands)


def _unknown(equation: Any, operands: list[Axes]) -> list[Axes]:
    """Nothing is known of results but what they come of; nor of operands, which may have to match each other."""
    sources = [axis for axes in operands for axis in axes if axis.size != 1]
    reason = equation.primitive.name if sources else ""
    for axis in sources:
        axis.find().depend(sources, reason)
    return [[Axis(size, sources=sources, reason=reason) for size in shape] for shape in _shapes(equation)]


def _scan(equation: Any, operands: list[Axes]) -> list[Axes]:
    """A loop: what is carried comes out as it goes in; what is scanned loses its first axis and gets it back."""
    constants, carried = equation.params["num_consts"], equation.params["num_carry"]
    scanned = operands[constants + carried :]
    steps = scanned[0][0] if scanned else Axis(equation.params["length"])
    results = _run(_inner(equation.params), [*operands[: constants + carried], *(axes[1:] for axes in scanned)])
    _unify_all(operands[constants : constants + carried], results[:carried])
    return [*results[:carried], *([steps, *axes] for axes in results[carried:])]


def _while(equation: Any, operands: list[Axes]) -> list[Axes]:
    ignored, constants = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    results = _run(equation.params["body_jaxpr"].jaxpr, operands[ignored:])
    _unify_all(operands[ignored + constants :], results)
    return results


def _cond(equation: Any, operands: list[Axes]) -> list[Axes]:
    first, *others = [_run(branch.jaxpr, operands[1:]) for branch in equation.params["branches"]]
    for results in others:
        _unify_all(first, results)
    return first


def _unify_all(ours: Sequence[Axes], theirs: Sequence[Axes]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left, right, strict=True):
            unify(a, b)


def _elementwise(equation: Any, operands: list[Axes]) -> list[Axes]:
    (shape, *_) = _shapes(equation)
    result: Axes = []
    for k, size in enumerate(shape):
        alike = [axes[k] for axes in operands if len(axes) == len(shape) and axes[k].size == size]
        for other in alike[1:]:
            unify(alike[0], other)
        result.append(alike[0] if alike else Axis(size))
    return [result] * len(equation.outvars)


def _reduce(equation: Any, operands: list[Axes]) -> list[Axes]:
    gone = equation.params["axes" if "axes" in equation.params else "dimensions"]
    kept = [axis for k, axis in enumerate(operands[0]) if k not in gone]
    return [kept] * len(equation.outvars)


def _along(axes: Axes, shape: Sequence[int], touched: Sequence[bool], name: str) -> Axes:
    """What comes of axes that are changed in length or order, one by one."""
    return [
        Axis(size, sources=[axis], reason=name, role=axis.find().role, raw=axis.raw, last=axis.last) if touch else axis
        for axis, size, touch in zip(axes, shape, touched, strict=True)
    ]


def _resized(equation: Any, operands: list[Axes]) -> list[Axes]:
    (shape, *_) = _shapes(equation)
    touched = [axis.size != size for axis, size in zip(operands[0], shape, strict=True)]
    return [_along(operands[0], shape, touched, equation.primitive.name)] * len(equation.outvars)


def _pad(equation: Any, operands: list[Axes]) -> list[Axes]:
    touched = [config != (0, 0, 0) for config in equation.params["padding_config"]]
    return [_along(operands[0], shape, touched, "pad") for shape in _shapes(equation)]


def _rev(equation: Any, operands: list[Axes]) -> list[Axes]:
    touched = [k in equation.params["dimensions"] for k in range(len(operands[0]))]
    return [_along(operands[0], shape, touched, "rev") for shape in _shapes(equation)]


def _scanned(equation: Any, operands: list[Axes]) -> list[Axes]:
    """Cumulative sums and sorts: one axis each."""
    along = equation.params["axis"] if "axis" in equation.params else equation.params["dimension"]
    touched = [k == along for k in range(len(operands[0]))]
    shapes = _shapes(equation)
    return [
        _along(axes, shape, touched, equation.primitive.name)
        for axes, shape in zip((operands * len(shapes))[: len(shapes)], shapes, strict=True)
    ]


def _window(equation: Any, operands: list[Axes]) -> list[Axes]:
    window, padding = equation.params["window_dimensions"], equation.params["padding"]
    strides = equation.params["window_strides"]
    touched = [
        (size, stride, tuple(pad)) != (1, 1, (0, 0)) for size, stride, pad in zip(window, strides, padding, strict=True)
    ]
    for axis, touch in zip(operands[0], touched, strict=True):
        if touch:
            axis.mark("spatial")
    others = [axis for axis, touch in zip(operands[0][1:], touched[1:], strict=True) if not touch and axis.size != 1]
    if len(others) == 1:
        others[0].mark("channel")
    return [_along(operands[0], shape, touched, equation.primitive.name) for shape in _shapes(equation)]


def _broadcast(equation: Any, operands: list[Axes]) -> list[Axes]:
    (result,) = map(_fresh, _shapes(equation))
    for axis, k in zip(operands[0], equation.params["broadcast_dimensions"], strict=True):
        if axis.size == result[k].size:
            result[k] = axis
    return [result]


def _reshape(equation: Any, operands: list[Axes]) -> list[Axes]:
    return [reshape(operands[0], shape) for shape in _shapes(equation)]


def _squeeze(equation: Any, operands: list[Axes]) -> list[Axes]:
    gone = {k % len(operands[0]) for k in equation.params["dimensions"]}
    return [[axis for k, axis in enumerate(operands[0]) if k not in gone]]


def _transpose(equation: Any, operands: list[Axes]) -> list[Axes]:
    return [[operands[0][k] for k in equation.params["permutation"]]]


def _concatenate(equation: Any, operands: list[Axes]) -> list[Axes]:
    along = equation.params["dimension"]
    result: Axes = []
    (shape,) = _shapes(equation)
    for k, size in enumerate(shape):
        axes = [operand[k] for operand in operands]
        if k != along:
            for other in axes[1:]:
                unify(axes[0], other)
            result.append(axes[0])
        else:
            marks = [axis.marks for axis in axes]
            role = axes[0].find().role if all(mark == marks[0] for mark in marks) else None
            result.append(Axis(size, segments=axes, role=role, reason="concatenate"))
    return [result]


def _split(equation: Any, operands: list[Axes]) -> list[Axes]:
    touched = [k == equation.params["axis"] for k in range(len(operands[0]))]
    return [_along(operands[0], shape, touched, "split") for shape in _shapes(equation)]


def _dot_general(equation: Any, operands: list[Axes]) -> list[Axes]:
    (contracted, batched), (left, right) = equation.params["dimension_numbers"], operands
    for pairs in (contracted, batched):
        for i, j in zip(*pairs, strict=True):
            unify(left[i], right[j])
    free = [
        [axis for k, axis in enumerate(axes) if k not in contracted[side] and k not in batched[side]]
        for side, axes in enumerate(operands)
    ]
    return [[left[k] for k in batched[0]] + free[0] + free[1]]


def _convolution(equation: Any, operands: list[Axes]) -> list[Axes]:
    """Channels and spatial axes are told by the dimension numbers; sizes of spatial axes change."""
    numbers, (image, kernel) = equation.params["dimension_numbers"], operands
    batch, channels, *spatial = numbers.lhs_spec
    outgoing, incoming, *_ = numbers.rhs_spec
    if equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1:
        unify(image[channels], kernel[incoming])
    for axis in (image[channels], kernel[outgoing]):
        axis.mark("channel")
    (result,) = map(_fresh, _shapes(equation))
    if equation.params["batch_group_count"] == 1:
        result[numbers.out_spec[0]] = image[batch]
    result[numbers.out_spec[1]] = kernel[outgoing]
    for k, position in zip(spatial, numbers.out_spec[2:], strict=True):
        image[k].mark("spatial")
        result[position].mark("spatial")
    return [result]


def _gather(equation: Any, operands: list[Axes]) -> list[Axes]:
    """Look-ups, as in an embedding: whole slices of the operand keep their axes, and so do the indices."""
    (shape,), (operand, indices) = _shapes(equation), operands
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    slices = iter([k for k in range(len(operand)) if k not in dropped])
    looked_up = iter(indices[:-1])
    result: Axes = []
    for position, size in enumerate(shape):
        if position not in numbers.offset_dims:
            result.append(next(looked_up))
        else:
            k = next(slices)
            result += _along([operand[k]], [size], [sizes[k] != operand[k].size], "gather")
    return [result]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cond": _cond,
    "conv_general_dilated": _convolution,
    "cumlogsumexp": _scanned,
    "cummax": _scanned,
    "cummin": _scanned,
    "cumprod": _scanned,
    "cumsum": _scanned,
    "dot_general": _dot_general,
    "dynamic_slice": _resized,
    "gather": _gather,
    "pad": _pad,
    "reduce": _reduce,
    "reshape": _reshape,
    "rev": _rev,
    "scan": _scan,
    "slice": _resized,
    "sort": _scanned,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "while": _while,
}
"""How the axes of results come from those of operands, by primitive."""

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not
    optimization_barrier or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan
    tanh xor""".split()
)
"""Primitives that combine elements at equal places; operands are broadcast along axes of size 1."""
