"""Rules for the axes of an operation's results, given those of its operands: one for each primitive of JAX."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxensemble.programs.primitives import ELEMENTWISE
from torch_bridge.state_dicts.axes import Axis, reshape_axes, unify_axes

AxisList = list[Axis]
AxisRule = Callable[[Any, list[AxisList]], list[AxisList]]


def find_rule(name: str) -> AxisRule | None:
    """Returns the rule of a primitive; None for an unknown primitive, a call or a loop."""
    if name in RULES:
        return RULES[name]
    if name in ELEMENTWISE or name == "device_put":
        return _elementwise
    if name.startswith("reduce_window"):
        return _window
    return _reduce if name.startswith(("reduce_", "arg")) else None


def new_axes(shape: Sequence[int]) -> AxisList:
    return [Axis(size) for size in shape]


def _shapes(equation: Any) -> list[tuple[int, ...]]:
    return [variable.aval.shape for variable in equation.outvars]


def unknown_axes(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    """Returns result axes of which only the sources are known. Operands then depend on each other, too."""
    sources = [axis for axes in operands for axis in axes if axis.size != 1]
    reason = equation.primitive.name if sources else ""
    for axis in sources:
        axis.find().depend(sources, reason)
    return [[Axis(size, sources=sources, reason=reason) for size in shape] for shape in _shapes(equation)]


def _elementwise(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    (shape, *_) = _shapes(equation)
    result: AxisList = []
    for k, size in enumerate(shape):
        alike = [axes[k] for axes in operands if len(axes) == len(shape) and axes[k].size == size]
        for other in alike[1:]:
            unify_axes(alike[0], other)
        result.append(alike[0] if alike else Axis(size))
    return [result] * len(equation.outvars)


def _reduce(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    gone = equation.params["axes" if "axes" in equation.params else "dimensions"]
    kept = [axis for k, axis in enumerate(operands[0]) if k not in gone]
    return [kept] * len(equation.outvars)


def _changed_axes(axes: AxisList, shape: Sequence[int], touched: Sequence[bool], name: str) -> AxisList:
    """Returns new axes where the length or order changes, and the old axes elsewhere."""
    return [
        Axis(size, sources=[axis], reason=name, role=axis.find().role, raw=axis.raw, last=axis.last) if touch else axis
        for axis, size, touch in zip(axes, shape, touched, strict=True)
    ]


def _resize(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    (shape, *_) = _shapes(equation)
    touched = [axis.size != size for axis, size in zip(operands[0], shape, strict=True)]
    return [_changed_axes(operands[0], shape, touched, equation.primitive.name)] * len(equation.outvars)


def _pad(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    touched = [config != (0, 0, 0) for config in equation.params["padding_config"]]
    return [_changed_axes(operands[0], shape, touched, "pad") for shape in _shapes(equation)]


def _rev(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    touched = [k in equation.params["dimensions"] for k in range(len(operands[0]))]
    return [_changed_axes(operands[0], shape, touched, "rev") for shape in _shapes(equation)]


def _scan_axis(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    """Returns the axes after a cumulative sum or a sort, which changes one axis."""
    along = equation.params["axis"] if "axis" in equation.params else equation.params["dimension"]
    touched = [k == along for k in range(len(operands[0]))]
    shapes = _shapes(equation)
    return [
        _changed_axes(axes, shape, touched, equation.primitive.name)
        for axes, shape in zip((operands * len(shapes))[: len(shapes)], shapes, strict=True)
    ]


def _window(equation: Any, operands: list[AxisList]) -> list[AxisList]:
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
    return [_changed_axes(operands[0], shape, touched, equation.primitive.name) for shape in _shapes(equation)]


def _broadcast(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    (result,) = map(new_axes, _shapes(equation))
    for axis, k in zip(operands[0], equation.params["broadcast_dimensions"], strict=True):
        if axis.size == result[k].size:
            result[k] = axis
    return [result]


def _reshape(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    return [reshape_axes(operands[0], shape) for shape in _shapes(equation)]


def _squeeze(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    gone = {k % len(operands[0]) for k in equation.params["dimensions"]}
    return [[axis for k, axis in enumerate(operands[0]) if k not in gone]]


def _transpose(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    return [[operands[0][k] for k in equation.params["permutation"]]]


def _concatenate(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    along = equation.params["dimension"]
    result: AxisList = []
    (shape,) = _shapes(equation)
    for k, size in enumerate(shape):
        axes = [operand[k] for operand in operands]
        if k != along:
            for other in axes[1:]:
                unify_axes(axes[0], other)
            result.append(axes[0])
        else:
            marks = [axis.marks for axis in axes]
            role = axes[0].find().role if all(mark == marks[0] for mark in marks) else None
            result.append(Axis(size, segments=axes, role=role, reason="concatenate"))
    return [result]


def _split(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    touched = [k == equation.params["axis"] for k in range(len(operands[0]))]
    return [_changed_axes(operands[0], shape, touched, "split") for shape in _shapes(equation)]


def _dot_general(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    (contracted, batched), (left, right) = equation.params["dimension_numbers"], operands
    for pairs in (contracted, batched):
        for i, j in zip(*pairs, strict=True):
            unify_axes(left[i], right[j])
    free = [
        [axis for k, axis in enumerate(axes) if k not in contracted[side] and k not in batched[side]]
        for side, axes in enumerate(operands)
    ]
    return [[left[k] for k in batched[0]] + free[0] + free[1]]


def _convolution(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    """Returns the axes after a convolution, and marks channels and spatial axes by the dimension numbers."""
    numbers, (image, kernel) = equation.params["dimension_numbers"], operands
    batch, channels, *spatial = numbers.lhs_spec
    outgoing, incoming, *_ = numbers.rhs_spec
    if equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1:
        unify_axes(image[channels], kernel[incoming])
    for axis in (image[channels], kernel[outgoing]):
        axis.mark("channel")
    (result,) = map(new_axes, _shapes(equation))
    if equation.params["batch_group_count"] == 1:
        result[numbers.out_spec[0]] = image[batch]
    result[numbers.out_spec[1]] = kernel[outgoing]
    for k, position in zip(spatial, numbers.out_spec[2:], strict=True):
        image[k].mark("spatial")
        result[position].mark("spatial")
    return [result]


def _gather(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    """Returns the axes after a look-up, such as an embedding. Whole slices of the operand, and indices, keep theirs."""
    (shape,), (operand, indices) = _shapes(equation), operands
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    slices = iter([k for k in range(len(operand)) if k not in dropped])
    looked_up = iter(indices[:-1])
    result: AxisList = []
    for position, size in enumerate(shape):
        if position not in numbers.offset_dims:
            result.append(next(looked_up))
        else:
            k = next(slices)
            result += _changed_axes([operand[k]], [size], [sizes[k] != operand[k].size], "gather")
    return [result]


RULES: dict[str, AxisRule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumlogsumexp": _scan_axis,
    "cummax": _scan_axis,
    "cummin": _scan_axis,
    "cumprod": _scan_axis,
    "cumsum": _scan_axis,
    "dot_general": _dot_general,
    "dynamic_slice": _resize,
    "gather": _gather,
    "pad": _pad,
    "reduce": _reduce,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _resize,
    "sort": _scan_axis,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
"""Rules by the name of the primitive."""
