"""Arrangements of arrays: values stored the way in which a rule asks for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from jaxensemble.network.network import Arg, Dtype, Ref, Var, Variable
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.lowering.calls import Calls, DrawMode
from torch_bridge.lowering.layouts import alignment
from torch_bridge.lowering.layouts.layout import (
    Group,
    Layout,
    Size,
    group_size,
    plain_layout,
    rearrangement_steps,
    tidy_axes,
)
from torch_bridge.lowering.values import Operand, Storage, Value, initial_dtype, is_array


class Arrangements(Calls):
    """Calls on arrays, each of which is stored as the operation needs it.

    - `constants`: the tensors that all members share, by path.
    - `storage`: the place and layout of each weight that is stored, by key.
    - `expanded`: arrays before `expand`, by the expanded array.
    """

    def __init__(self, captured: TorchGraph, draw_mode: DrawMode | None = None):
        super().__init__(captured, draw_mode)
        self.constants: dict[str, Tensor] = {}
        self.storage: dict[str, Storage] = {}
        self.expanded: dict[Value, Value] = {}
        self.pairs: dict[Value, Value] = {}  # complex arrays by their two parts in a last dimension
        self._rearranged: dict[Any, Ref] = {}
        self._constants: dict[int, tuple[Tensor, Value]] = {}

    # Values

    def value(self, operand: Any) -> Value:
        """An operand as a value. A constant tensor becomes a variable of the network."""
        if isinstance(operand, Value):
            return operand
        if isinstance(operand, Tensor):
            return self.constant(operand)
        return self.new(self.emit("jnp.asarray", operand), ())

    def new(self, expr: Ref | Var, shape: Sequence[Size] | None = None, dtype: torch.dtype | None = None) -> Value:
        """A value stored as PyTorch sees it. Shape and dtype are those of the node's result unless given."""
        shape = self.result_shape if shape is None else shape
        return Value(expr, plain_layout(shape), self.dtype if dtype is None else dtype)

    def laid(self, expr: Ref | Var, layout: Layout, dtype: torch.dtype | None = None) -> Value:
        """A value with a layout of its own. The dtype is that of the node's result unless given."""
        return Value(expr, layout, self.dtype if dtype is None else dtype)

    def constant(self, tensor: Tensor, name: str = "constant") -> Value:
        """A tensor that depends on no input, held once and shared by all members.

        A tensor of equal values is not held: a call makes it.
        """
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()) and not _has_negative_zeros(tensor):
            return self._uniform(tensor)
        if id(tensor) not in self._constants:
            path = self.free_path(name)
            held = tensor.detach().contiguous()
            self.variables[path] = Variable(path, "constant", tuple(held.shape), initial_dtype(held.dtype))
            self.constants[path] = held
            value = Value(Var(path), plain_layout(tuple(held.shape)), held.dtype)
            self._constants[id(tensor)] = (tensor, value)  # holds the tensor: an id is good only while it lives
        return self._constants[id(tensor)][1]

    def _uniform(self, tensor: Tensor) -> Value:
        """The call that makes a tensor of equal values."""
        fill, shape = tensor.flatten()[0].item(), tuple(tensor.shape)
        name = "zeros" if fill == 0 else "ones" if fill == 1 else None
        plain = name is not None and tensor.dtype == torch.float32  # JAX's default
        wide = tensor.dtype == torch.int64 and jax.config.read("jax_enable_x64")
        dtype: dict[str, Arg] = {} if plain else {"dtype": Dtype("int64" if wide else initial_dtype(tensor.dtype))}
        expr = self.emit(f"jnp.{name}", shape, **dtype) if name else self.emit("jnp.full", shape, fill, **dtype)
        return self.new(expr, shape, tensor.dtype)

    # Arrangement

    def array(self, value: Value, axes: Sequence[Group]) -> Ref | Var:
        """The array of a value, stored as `axes`: unchanged if it is stored so already, else rearranged."""
        axes = tuple(axes)
        value = self.settle_weight(value, axes)
        return value.expr if value.layout.axes == axes else self._rearrange(value, axes)

    def arrange(self, value: Value, axes: Sequence[Group]) -> Value:
        """The value, stored as `axes`."""
        return Value(self.array(value, axes), Layout(value.layout.dims, tuple(axes)), value.dtype)

    def plain(self, operand: Any) -> Value:
        """The operand stored as PyTorch sees it: one axis per dimension, in order."""
        value = self.value(operand)
        return self.arrange(value, value.layout.dims)

    def tidy(self, operand: Operand) -> Value:
        """The operand with one axis per dimension, in the order that costs least: see `Value.axis`."""
        value = self.value(operand)
        return self.arrange(value, tidy_axes(value.layout))

    def channels_last(self, operand: Operand, spatial: int) -> Value:
        """A feature map with channels after its `spatial` last dimensions: `[..., C, H, W]` stored `[..., H, W, C]`."""
        value = self.value(operand)
        dims, channels = value.layout.dims, value.ndim - spatial - 1
        return self.arrange(value, (*dims[:channels], *dims[channels + 1 :], dims[channels]))

    def opaque(self, value: Value) -> Value:
        """The value stored as PyTorch sees it, in new atoms, which no other value shares."""
        return Value(self.plain(value).expr, plain_layout(value.shape), value.dtype)

    def settle_weight(self, value: Value, axes: tuple[Group, ...]) -> Value:
        """Makes an open weight a variable of its module, stored as `axes`. Other values stay as they are."""
        if not value.open or value.key is None:
            return value
        if value.key not in self.storage:
            added = value.ndim - self.state.tensors[value.key].ndim  # dimensions that broadcasting put in front
            self.store(value, value.key, Layout(value.layout.dims[added:], axes))
            stored = self.storage[value.key].layout
            shape = tuple(int(size) for size in stored.stored_shape)
            self.variables[value.key] = Variable(
                value.key, self.state.kind(value.key), shape, initial_dtype(value.dtype)
            )
        return self.resolve(value)

    def resolve(self, weight: Value) -> Value:
        """A weight with its place and layout, if it is stored already."""
        storage = self.storage.get(weight.key or "")
        if storage is None:
            return weight
        return dataclasses.replace(weight, expr=Var(storage.path), layout=storage.layout, open=False)

    def store(self, weight: Value, path: str, layout: Layout, flipped: tuple[int, ...] = ()) -> None:
        """Settles the path and the layout of a weight."""
        assert weight.key is not None
        self.storage[weight.key] = Storage(path, layout, flipped)

    def _rearrange(self, value: Value, axes: tuple[Group, ...]) -> Ref:
        """Emits the calls that rearrange an array to `axes`, once for each array and order."""
        split, order, merged = rearrangement_steps(value.layout.axes, axes)
        key = (value.expr, _sizes(split), order, _sizes(merged))
        if key not in self._rearranged:
            expr, held = value.expr, value.layout.axes
            if split is not None:
                expr, held = self.reshape(expr, held, split), split
            if order is not None:
                expr, held = self.emit("jnp.transpose", expr, order), tuple(held[k] for k in order)
            if merged is not None:
                expr = self.reshape(expr, held, merged)
            assert isinstance(expr, Ref)
            self._rearranged[key] = expr
        return self._rearranged[key]

    def reshape(self, expr: Ref | Var, held: Sequence[Group], target: Sequence[Group]) -> Ref:
        """Emits a reshape from the axes `held` to the axes `target`."""
        filled = [axis for axis in target if axis]
        if [axis for axis in held if axis] == filled:
            if len(filled) == len(held):
                return self.emit("jnp.expand_dims", expr, tuple(k for k, axis in enumerate(target) if not axis))
            if len(filled) == len(target):
                return self.emit("jnp.squeeze", expr, tuple(k for k, axis in enumerate(held) if not axis))
        before, after = [[group_size(group) for group in groups] for groups in (held, target)]
        return self.emit(".reshape", expr, *self.shape_args(expr, before, after))

    def shape_args(self, expr: Ref | Var, held: Sequence[Size], shape: Sequence[Size]) -> list[Arg]:
        """The arguments of a reshape: numbers, and `x.shape[0]` or one `-1` for sizes that depend on the batch size."""
        open_axes = [k for k, entry in enumerate(shape) if not isinstance(entry, int)]
        if len(shape) == 2 and open_axes == [0] and held and held[0] == shape[0]:
            return [self.emit(".shape", expr, 0), -1]
        args: list[Arg] = list(shape)  # type: ignore[arg-type]
        first = None if any(map(_is_vanishing, shape)) else open_axes[:1]  # without elements, -1 is ambiguous
        for k in open_axes:
            args[k] = -1 if [k] == first else self.size(shape[k], [(expr, held)])
        return args

    # Elementwise operations

    def elementwise(self, target: str, *operands: Any, dtype: torch.dtype | None = None, **kwargs: Arg) -> Value:
        """Emits a call on operands that broadcast, in the layout of the largest one. Numbers stay numbers."""
        arrays = [operand for operand in operands if is_array(operand)]
        values, layout = self.align(*arrays)
        queue = iter(values)
        args = [next(queue).expr if is_array(operand) else self.number(operand) for operand in operands]
        return self.laid(self.emit(target, *args, **kwargs), layout, dtype)

    def align(self, *operands: Operand) -> tuple[list[Value], Layout]:
        """The operands, arranged so that their arrays broadcast, and the layout of an elementwise result."""
        values = self._undo_expansion([self.value(operand) for operand in operands])
        open_keys = [value.key for value in values if value.open]
        values = [self.plain(v) if v.open and open_keys.count(v.key) > 1 else v for v in values]
        rank = max(value.ndim for value in values)
        layouts = alignment.unify_layouts([alignment.pad_rank(value.layout, rank) for value in values])
        if layouts is None:
            if all(len(dim) <= 1 for value in values for dim in value.layout.dims):
                raise self.open_size_error(
                    "whether sizes are equal depends", *(size for value in values for size in value.shape)
                )
            return self.align(*[self.opaque(value) for value in values])
        dims, axes = alignment.common_axes(layouts, self._lead(values))
        values = [dataclasses.replace(value, layout=layout) for value, layout in zip(values, layouts, strict=True)]
        moved = [self.arrange(value, alignment.operand_axes(value.layout, axes)) for value in values]
        held = max(len(value.layout.axes) for value in moved)
        return moved, Layout(dims, axes[len(axes) - held :])

    def _undo_expansion(self, values: Sequence[Value]) -> list[Value]:
        """The values before `expand`, if another operand brings the size, so that broadcasting does the rest."""
        sources = [self.expanded.get(value, value) for value in values]
        widest = max((value.ndim for value in sources), default=0)
        reach = [alignment.pad_rank(value.layout, widest) for value in sources]
        full = [alignment.pad_rank(value.layout, widest).shape for value in values]
        brought = tuple(
            next((s for s in column if s != 1), 1) for column in zip(*(r.shape for r in reach), strict=True)
        )
        wanted = tuple(next((s for s in column if s != 1), 1) for column in zip(*full, strict=True))
        return sources if brought == wanted else list(values)

    def _lead(self, values: Sequence[Value]) -> int:
        """The number of the operand whose layout the result gets: the largest one, rearranged rather than plain."""

        def rank(k: int) -> tuple[int, bool, bool]:
            value = values[k]
            filled = sum(1 for dim in value.layout.dims if dim)
            return filled, not isinstance(value.expr, Var), value.layout.axes != value.layout.dims

        return max(range(len(values)), key=rank)


def _is_vanishing(size: Size) -> bool:
    """Returns whether a size is zero for a batch of one."""
    return not isinstance(size, int) and size.subs(dict.fromkeys(size.free_symbols, 1)) == 0


def _has_negative_zeros(tensor: Tensor) -> bool:
    """Returns whether a tensor contains a negative zero."""
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return parts.is_floating_point() and bool(((parts == 0) & torch.signbit(parts)).any())


def _sizes(groups: Sequence[Group] | None) -> tuple[Size, ...] | None:
    """The sizes of groups."""
    return None if groups is None else tuple(group_size(group) for group in groups)
