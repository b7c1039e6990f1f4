"""The builder: rules hand it arrays and get calls, arrangements and layers from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import sympy
import torch
from torch import Tensor, fx, nn

from jaxensemble.dtypes import NARROW
from jaxensemble.errors import UnsupportedError
from jaxensemble.network.network import Arg, Call, Dtype, Layer, Ref, Var, Variable
from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.graph.nodes import source_line
from torch_bridge.graph.sizes.open_axes import BATCH
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
from torch_bridge.lowering.sizes import emit_size
from torch_bridge.lowering.tensors import ModuleState
from torch_bridge.lowering.values import DTYPE_NAMES, Storage, Value, module_scope, size, sizes

Wanted = tuple[Value | None, Layout | None]
"""A leaf of a layer: the weight that fills it, and the layout it is stored in (None: as PyTorch has it)."""

DrawMode = Literal["training", "evaluation"]
"""The mode whose random draws are wanted beside the outputs, to let PyTorch have the same."""


class Builder:
    """Collects the layers, variables and calls of a network, one ATen node after the other.

    `node` is the node being lowered, `state` what is known of the module's tensors. `draws` are the random numbers that
    the forward draws in the mode `draw_mode`, in order; `sized` the arrays whose sizes the node was given.
    """

    def __init__(self, captured: TorchGraph, draw_mode: DrawMode | None = None):
        self.captured = captured
        self.draw_mode: DrawMode | None = draw_mode
        self.draws: list[Value] = []
        self.state = ModuleState(captured.model, captured.unchanged_counters)
        self.node: fx.Node
        self.layers: dict[str, Layer] = {}
        self.variables: dict[str, Variable] = {}
        self.constants: dict[str, Tensor] = {}
        self.calls: list[Call] = []
        self.storage: dict[str, Storage] = {}
        self.sources: list[Value] = []
        self.size_sources: list[Value] = []
        self.open_names: dict[Any, str] = {}  # of open sizes
        self.evaluation_only = captured.evaluation_only
        self._layer_weights: dict[str, dict[str, str | None]] = {}
        self.expanded: dict[Value, Value] = {}
        self.pairs: dict[Value, Value] = {}  # complex arrays by their two parts in a last dimension
        self._rearranged: dict[Any, Ref] = {}
        self._constants: dict[int, tuple[Tensor, Value]] = {}

    # Calls

    def emit(self, target: str, *args: Any, **kwargs: Any) -> Ref:
        """Appends a call and returns its result. Numbers that depend on the batch size are calls before it."""
        args, kwargs = pytree.tree_map(
            lambda arg: self.size(arg) if isinstance(arg, sympy.Expr) else arg, (args, kwargs)
        )
        out = Ref(f"v{len(self.calls)}")
        self.calls.append(Call(out.name, target, args, kwargs, self.scope))
        return out

    @property
    def scope(self) -> tuple[str, ...]:
        """The module calls around the node being lowered."""
        return module_scope(self.node)

    @property
    def module_path(self) -> str:
        """The path of the innermost module around the node being lowered; empty for the root."""
        return self.scope[-1].partition("@")[0] if self.scope else ""

    def unsupported(self, reason: str = "") -> UnsupportedError:
        """The error for what cannot be carried exactly: operation, module and line, and why, where that is known."""
        where = source_line(self.node)
        place = f"{self.node.target} in {self.module_path or 'the root module'}" + (f" ({where})" if where else "")
        return UnsupportedError(f"{place}: {reason}" if reason else place)

    def open_size_error(self, what: str, *sizes: Any) -> UnsupportedError:
        """The error for what depends on sizes that are no numbers: on those that are open, or on values."""
        sizes = tuple(entry for entry in map(size, sizes) if not isinstance(entry, int | float))
        if any(map(free_unbacked_symbols, sizes)):
            return self.unsupported(f"{what} on values, and XLA needs fixed sizes; give it as a number")
        symbols = set().union(*(entry.free_symbols for entry in sizes))
        found = {name for entry, name in self.open_names.items() if name != BATCH and entry.free_symbols & symbols}
        if found:
            return self.unsupported(f"{what} on {' and '.join(sorted(found))}; leave it out of `dynamic`")
        return self.unsupported(f"{what} on the batch size; pass batch_axis=None to fix all shapes")

    def axis_name(self, entry: Any) -> str | None:
        """The name of an open size of an input; None for the batch's."""
        name = self.open_names.get(entry)
        return None if name == BATCH else name

    # Values

    def value(self, operand: Any) -> Value:
        """An operand as a value: a constant tensor becomes a variable of the network."""
        if isinstance(operand, Value):
            return operand
        if isinstance(operand, Tensor):
            return self.constant(operand)
        return self.new(self.emit("jnp.asarray", operand), ())

    def new(self, expr: Ref | Var, shape: Sequence[Size] | None = None, dtype: torch.dtype | None = None) -> Value:
        """A value stored as PyTorch sees it; shape and dtype are those of the node's result unless given."""
        shape = self.result_shape if shape is None else shape
        return Value(expr, plain_layout(shape), self.dtype if dtype is None else dtype)

    def laid(self, expr: Ref | Var, layout: Layout, dtype: torch.dtype | None = None) -> Value:
        """A value with a layout of its own; the dtype is that of the node's result unless given."""
        return Value(expr, layout, self.dtype if dtype is None else dtype)

    @property
    def result(self) -> Any:
        """The node's (first) result as PyTorch describes it."""
        val = self.node.meta["val"]
        return val[0] if isinstance(val, tuple | list) else val

    @property
    def dtype(self) -> torch.dtype:
        return self.result.dtype

    @property
    def result_shape(self) -> tuple[Size, ...]:
        return sizes(self.result.shape)

    def constant(self, tensor: Tensor, name: str = "constant") -> Value:
        """A tensor that depends on no input, held once and shared by all members; one of equal values is made anew."""
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
        fill, shape = tensor.flatten()[0].item(), tuple(tensor.shape)
        name = "zeros" if fill == 0 else "ones" if fill == 1 else None
        plain = name is not None and tensor.dtype == torch.float32  # which is what JAX makes unless told otherwise
        wide = tensor.dtype == torch.int64 and jax.config.read("jax_enable_x64")
        dtype: dict[str, Arg] = {} if plain else {"dtype": Dtype("int64" if wide else initial_dtype(tensor.dtype))}
        expr = self.emit(f"jnp.{name}", shape, **dtype) if name else self.emit("jnp.full", shape, fill, **dtype)
        return self.new(expr, shape, tensor.dtype)

    def free_path(self, name: str) -> str:
        """A path within the module around the node that nothing else has."""
        module = self.module_path
        while module in self.layers or (module and self.state.is_empty(module)):
            module = module.rpartition(".")[0]
        base = ".".join(part for part in (module, name) if part)
        path, k = base, 1
        while path in self.variables or path in self.layers or self.state.has_path(path):
            path, k = f"{base}_{k}", k + 1
        return path

    def random_key(self) -> Ref:
        """The next random key of the module around the node."""
        return self.emit(f"layer:{self.single_layer('keys', 'layers.Keys')}")

    def single_layer(self, name: str, type_: str) -> str:
        """The path of the one layer of this type within the module around the node, which may hold nothing else."""
        module = self.module_path
        while module in self.layers:
            module = module.rpartition(".")[0]
        path = ".".join(part for part in (module, name) if part)
        while not (path in self.layers and self.layers[path].type == type_) and self._is_taken(path):
            path += "_"
        self.layers[path] = Layer(path, type_)
        return path

    def note_draw(self, value: Value) -> None:
        """Notes a value as what PyTorch draws here, in the mode whose draws are wanted."""
        if self.draw_mode is not None and self.node.meta.get("mode", self.draw_mode) == self.draw_mode:
            self.draws.append(value)

    def is_statistic(self, key: str) -> bool:
        """Whether a buffer holds running statistics of a normalisation of PyTorch's own."""
        path, _, name = key.rpartition(".")
        return name.startswith("running_") and isinstance(self.state.modules[path], nn.modules.batchnorm._NormBase)

    def refuse_hidden_draws(self, mode: str) -> None:
        """Refuses a layer that draws numbers of its own where those are wanted."""
        if self.draw_mode is not None and (mode == "always" or (mode == "by_mode" and self.draw_mode == "training")):
            raise self.unsupported("the random numbers that it draws stay within a layer")

    # Arrangement

    def array(self, value: Value, axes: Sequence[Group]) -> Ref | Var:
        """The value's array, stored as `axes`: as it is where that is so, else rearranged."""
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

    def tidy(self, operand: Any) -> Value:
        """The operand with one axis per dimension, in whatever order costs least: see `Value.axis`."""
        value = self.value(operand)
        return self.arrange(value, tidy_axes(value.layout))

    def channels_last(self, operand: Any, spatial: int) -> Value:
        """A feature map with channels after its `spatial` last dimensions: `[..., C, H, W]` stored `[..., H, W, C]`."""
        value = self.value(operand)
        dims, channels = value.layout.dims, value.ndim - spatial - 1
        return self.arrange(value, (*dims[:channels], *dims[channels + 1 :], dims[channels]))

    def opaque(self, value: Value) -> Value:
        """The value stored as PyTorch sees it, with no memory of how its dimensions came about."""
        return Value(self.plain(value).expr, plain_layout(value.shape), value.dtype)

    def settle_weight(self, value: Value, axes: tuple[Group, ...]) -> Value:
        """An open weight becomes a bare variable of its module, stored the way it is asked for."""
        if not value.open or value.key is None:
            return value
        if value.key not in self.storage:
            added = value.ndim - self.state.tensors[value.key].ndim  # dimensions put in front by broadcasting
            self.store(value, value.key, Layout(value.layout.dims[added:], axes))
            stored = self.storage[value.key].layout
            shape = tuple(int(size) for size in stored.stored_shape)
            self.variables[value.key] = Variable(
                value.key, self.state.kind(value.key), shape, initial_dtype(value.dtype)
            )
        return self.resolve(value)

    def resolve(self, weight: Value) -> Value:
        """A weight where and as it is stored, if it is."""
        storage = self.storage.get(weight.key or "")
        if storage is None:
            return weight
        return dataclasses.replace(weight, expr=Var(storage.path), layout=storage.layout, open=False)

    def store(self, weight: Value, path: str, layout: Layout, flipped: tuple[int, ...] = ()) -> None:
        assert weight.key is not None
        self.storage[weight.key] = Storage(path, layout, flipped)

    def _rearrange(self, value: Value, axes: tuple[Group, ...]) -> Ref:
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
        """Reshapes an array whose axes are `held`."""
        filled = [axis for axis in target if axis]
        if [axis for axis in held if axis] == filled:
            if len(filled) == len(held):
                return self.emit("jnp.expand_dims", expr, tuple(k for k, axis in enumerate(target) if not axis))
            if len(filled) == len(target):
                return self.emit("jnp.squeeze", expr, tuple(k for k, axis in enumerate(held) if not axis))
        before, after = [[group_size(group) for group in groups] for groups in (held, target)]
        return self.emit(".reshape", expr, *self.shape_args(expr, before, after))

    def shape_args(self, expr: Ref | Var, held: Sequence[Size], shape: Sequence[Size]) -> list[Arg]:
        """The arguments of a reshape: numbers, and `x.shape[0]` or one `-1` for what depends on the batch size."""
        open_axes = [k for k, entry in enumerate(shape) if not isinstance(entry, int)]
        if len(shape) == 2 and open_axes == [0] and held and held[0] == shape[0]:
            return [self.emit(".shape", expr, 0), -1]
        args: list[Arg] = list(shape)  # type: ignore[arg-type]
        first = None if any(map(_vanishes, shape)) else open_axes[:1]  # of nothing, no size can be told
        for k in open_axes:
            args[k] = -1 if [k] == first else self.size(shape[k], [(expr, held)])
        return args

    def size(self, entry: Any, near: Sequence[tuple[Ref | Var, Sequence[Size]]] = ()) -> Arg:
        """A size as an argument: a number, or read off an array that has it."""
        wanted = size(entry)
        if isinstance(wanted, int):
            return wanted
        known = [*near, *((value.expr, value.layout.stored_shape) for value in self.sources)]
        found = emit_size(self.emit, wanted, known)
        if found is None:
            raise self.open_size_error(f"the size {wanted} depends", wanted)
        return found

    # Elementwise operations

    def elementwise(self, target: str, *operands: Any, dtype: torch.dtype | None = None, **kwargs: Arg) -> Value:
        """A call on operands that broadcast, in the layout of the largest. Numbers stay numbers."""
        arrays = [operand for operand in operands if is_array(operand)]
        values, layout = self.align(*arrays)
        queue = iter(values)
        args = [next(queue).expr if is_array(operand) else self.number(operand) for operand in operands]
        return self.laid(self.emit(target, *args, **kwargs), layout, dtype)

    def number(self, operand: Any) -> Arg:
        """An operand without dimensions as an argument: a number, or one that depends on the batch size."""
        return self.size(operand) if isinstance(operand, sympy.Expr | torch.SymInt) else number(operand)

    def align(self, *operands: Any) -> tuple[list[Value], Layout]:
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
        """The values, as they were before `expand` where another one brings the size: broadcasting does the rest."""
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
        """The operand whose layout the result gets: the largest, a rearranged one rather than one as PyTorch has it."""

        def rank(k: int) -> tuple[int, bool, bool]:
            value = values[k]
            filled = sum(1 for dim in value.layout.dims if dim)
            return filled, not isinstance(value.expr, Var), value.layout.axes != value.layout.dims

        return max(range(len(values)), key=rank)

    # Layers

    def claim(
        self,
        type_: str,
        options: Mapping[str, Any],
        leaves: Mapping[str, Wanted],
        flipped: tuple[int, ...] = (),
        within: str | None = None,
    ) -> str | None:
        """The path of a layer that holds these weights, or None where they are not all that some module holds.

        `flipped` are dimensions of the kernel that are stored reversed. A layer of the name `within` is made inside a
        module that holds more than these weights, or does more than the layer.
        """
        weights = {leaf: weight for leaf, (weight, _) in leaves.items() if weight is not None}
        keys = {leaf: weight.key for leaf, weight in weights.items()}
        if not keys or None in keys.values() or not all(map(self._is_fitting, weights, weights.values())):
            return None
        if flipped and not self._is_used_once(keys["kernel"]):
            return None
        held = [key for key in keys.values() if key is not None]
        holders = self.holders(held)
        inner = [] if within is None else [self._inner_path(path, within, keys) for path in holders]
        for owner in [*(path for path in holders if self.state.has_only(path, len(held))), *inner]:
            layer = Layer(owner, type_, dict(options))
            if owner in self.layers:
                if (
                    self.layers[owner] == layer
                    and self._layer_weights[owner] == keys
                    and self._is_stored_alike(leaves, flipped)
                ):
                    return owner
            elif not any(key in self.storage for key in keys.values()) and not self._has_constants(owner):
                self.layers[owner], self._layer_weights[owner] = layer, keys
                for leaf, weight in weights.items():
                    self.store(
                        weight,
                        f"{owner}.{leaf}",
                        leaves[leaf][1] or _as_is(weight),
                        flipped if leaf == "kernel" else (),
                    )
                return owner
        return None

    def _is_taken(self, path: str) -> bool:
        own = path.rpartition(".")[2] != "training" and self.state.has_path(path)  # every module has that attribute
        return own or path in self.layers or path in self.variables

    def _has_constants(self, module: str) -> bool:
        """Whether a constant or a layer stands inside the module, which a layer has no place for."""
        return any(path.startswith(f"{module}.") for path in (*self.constants, *self.layers))

    def holders(self, keys: Sequence[str]) -> list[str]:
        """Modules that hold all of these tensors themselves, the one around the node first."""
        return sorted(self.state.holders(keys), key=lambda path: path != self.module_path)

    def _inner_path(self, module: str, name: str, keys: Mapping[str, str | None]) -> str:
        """The path of the layer with these weights inside a module."""
        path = f"{module}.{name}" if module else name
        while self._layer_weights.get(path) != keys and self._is_taken(path):
            path += "_"
        return path

    def _is_fitting(self, leaf: str, weight: Value) -> bool:
        """What PyTorch trains, Flax trains, and nothing else."""
        return self.state.kind(weight.key or "") == ("buffer" if leaf in ("mean", "var") else "param")

    def _is_used_once(self, key: str | None) -> bool:
        names = [name for name, held in self.captured.weights.items() if held == key]
        users = [user for node in self.captured.graph.nodes if node.name in names for user in node.users]
        return len({(user.target, str(user.args[1:])) for user in users}) == 1

    def _is_stored_alike(self, leaves: Mapping[str, Wanted], flipped: tuple[int, ...]) -> bool:
        """A layer that is called again must find its weights as they were stored the first time."""
        for leaf, (weight, layout) in leaves.items():
            if weight is not None and weight.key is not None:
                held = self.storage[weight.key]
                wanted = Storage("", layout or _as_is(weight), flipped if leaf == "kernel" else ())
                if held.rearrangement != wanted.rearrangement:
                    return False
        return True

    def stateless_layer(self, type_: str, options: Mapping[str, Any], name: str) -> str:
        """The path of a layer without weights: that of the module around, if it is nothing else, or one inside it."""
        module = self.module_path
        layer = Layer(module, type_, dict(options))
        free = module and self.state.is_empty(module) and self.layers.get(module, layer) == layer
        free = free and not any(path.startswith(f"{module}.") for path in self.layers)
        path = module if free else self.free_path(name)
        self.layers[path] = dataclasses.replace(layer, path=path)
        return path


def initial_dtype(dtype: torch.dtype) -> str:
    """The dtype a variable is made with, until its array takes its place: 64-bit integers need x64, others do not."""
    return NARROW.get(DTYPE_NAMES[dtype], DTYPE_NAMES[dtype])


def _vanishes(size: Size) -> bool:
    """Whether a size is zero for a batch of one."""
    return not isinstance(size, int) and size.subs(dict.fromkeys(size.free_symbols, 1)) == 0


def _has_negative_zeros(tensor: Tensor) -> bool:
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return parts.is_floating_point() and bool(((parts == 0) & torch.signbit(parts)).any())


def is_array(operand: Any) -> bool:
    """Whether an operand has dimensions: numbers, and tensors that are numbers, do not broadcast."""
    return isinstance(operand, Value) or (isinstance(operand, Tensor) and operand.ndim > 0)


def number(operand: Any) -> Any:
    return operand.item() if isinstance(operand, Tensor) else operand


def _as_is(weight: Value) -> Layout:
    return Layout(weight.layout.dims, weight.layout.dims)


def _sizes(groups: Sequence[Group] | None) -> tuple[Size, ...] | None:
    return None if groups is None else tuple(group_size(group) for group in groups)
