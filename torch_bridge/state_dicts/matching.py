"""Matching of PyTorch keys with arrays of a Flax module, and their layouts: a row for each type of layer."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
from flax import linen, nnx

from jaxensemble import layers
from jaxensemble.errors import InputError
from jaxensemble.modules.state import kind_of, split
from jaxensemble.modules.structure import Leaf, Node, Path, Structure
from jaxensemble.network.weight_map import Rearrangement
from torch_bridge.state_dicts.axes import Axis
from torch_bridge.state_dicts.permutations import channels_first_order, permutation

Names = Mapping[str, str] | Callable[[str], str] | None

TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "negative_slope": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""PyTorch's names of the arrays of Flax's layers, where they differ."""

GENERAL = (nnx.LinearGeneral, linen.DenseGeneral)
"""Linear layers over several axes."""

WITHOUT_PLACE = "num_batches_tracked"
"""Counter of PyTorch's BatchNorm. Flax's BatchNorm does not use it, so it may stay unread."""


@dataclasses.dataclass(frozen=True)
class ArraySlot:
    """One array of a Flax module at one path: its name in the state, its layer, and the path of the layer."""

    name: str
    layer: nnx.Module | linen.Module | None
    place: str
    leaf: str


@dataclasses.dataclass(frozen=True)
class Placement:
    """Change from PyTorch's array to Flax's: a rearrangement, then a new order along some axes."""

    rearrangement: Rearrangement
    indices: Mapping[int, np.ndarray]
    shape: tuple[int, ...]

    def apply(self, array: np.ndarray) -> np.ndarray:
        array = self.rearrangement.apply(array)
        for axis, index in self.indices.items():
            array = array.take(index, axis)
        return array.reshape(self.shape)


class Misfit(Exception):
    """A PyTorch array does not fit its place. The text says which array fits."""


def array_slots(module: nnx.Module, layers: Mapping[Path, linen.Module] = MappingProxyType({})) -> dict[str, ArraySlot]:
    """Returns every array by each name that a state dict may have for it: PyTorch's name for the leaf, or Flax's.

    `layers` are modules of `flax.linen` by path, which `module` itself does not list.
    The element `layers` in paths through an `nnx.Sequential` may be left out, as in PyTorch.

    >>> list(array_slots(nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))))
    ['layers.0.kernel', 'layers.0.weight', '0.kernel', '0.weight']
    """
    structure = split(module).graphdef
    modules = {tuple(map(str, path)): layer for path, layer in nnx.iter_modules(module)} | dict(layers)
    slots: dict[str, ArraySlot] = {}
    shortened: dict[str, ArraySlot] = {}
    for path, short, leaf, node in _leaves(structure):
        if kind_of(leaf) in ("constants", "rngs"):
            continue
        slot = ArraySlot(leaf.name, modules.get(node.path), ".".join(path[:-1]), path[-1])
        for into, names in ((slots, path), (shortened, short)):
            for last in dict.fromkeys((names[-1], _torch_name(slot))):
                into[".".join((*names[:-1], last))] = slot
    return slots | {name: slot for name, slot in shortened.items() if name not in slots}


def _torch_name(slot: ArraySlot) -> str:
    return TORCH_NAMES.get(slot.leaf, slot.leaf) if _placement_rule(slot) is not None else slot.leaf


def _leaves(structure: Structure) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Leaf, Node]]:
    def walk(node: Node, path: tuple[str, ...], short: tuple[str, ...], above: tuple[Node, ...]) -> Iterator:
        for name, child in node.children.items():
            skipped = name == "layers" and isinstance(node.type, type) and issubclass(node.type, nnx.Sequential)
            further = ((*path, name), short if skipped else (*short, name))
            if isinstance(child, Leaf):
                yield *further, child, node
            elif isinstance(child, Node) and child not in above:
                yield from walk(child, *further, (*above, node))

    return walk(structure.root, (), (), ())


def flax_name(key: str, names: Names) -> str:
    """Returns the name of a PyTorch key in the Flax module, by the user's names; by default the key itself.

    >>> flax_name("fc.0.weight", {"fc": "head", "fc.0": "dense1"})
    'dense1.weight'
    """
    if names is None:
        return key
    if callable(names):
        name = names(key)
        if not isinstance(name, str):
            raise InputError(f"`names({key!r})` must be a str; got {type(name).__name__}")
        return name
    return rename_beginning(key, names)


def rename_beginning(name: str, names: Mapping[str, str]) -> str:
    """Replaces the longest beginning of a name that is in `names`. Every name has the empty beginning.

    >>> cases = ("fc.0.weight", {"fc": "head", "": "net"}), ("bias", {"": "net"}), ("fc.bias", {"fc": ""})
    >>> [rename_beginning(name, names) for name, names in cases]
    ['head.0.weight', 'net.bias', 'bias']
    """
    old = longest_beginning(name, names)
    if old is None:
        return name
    rest = name[len(old) :].removeprefix(".")
    return ".".join(filter(None, (names[old], rest)))


def longest_beginning(name: str, names: Mapping[str, str]) -> str | None:
    """Returns the longest beginning of a name, up to a dot or its end, that is in `names`; None without one."""
    return max((old for old in names if not old or f"{name}.".startswith(f"{old}.")), key=len, default=None)


def placement(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:
    """Returns the placement of a PyTorch array of this shape in a slot, whose axes were followed through the network.

    **Raises:** `Misfit` if the shape does not fit the slot, `Unclear` if the order of elements is not known.
    """
    return (_placement_rule(slot) or _unchanged_layout)(slot, shape, axes)


def _placement_rule(slot: ArraySlot) -> Callable[[ArraySlot, tuple[int, ...], list[Axis]], Placement] | None:
    if slot.leaf != "kernel":
        row = _bias_general if isinstance(slot.layer, GENERAL) else _unchanged_layout
        return row if isinstance(slot.layer, KNOWN) and slot.leaf in LEAF_NAMES else None
    return next((row for type_, row in KERNELS.items() if isinstance(slot.layer, type_)), None)


def _check_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise Misfit(f"expected shape {wanted} in PyTorch, got {shape}")


def _sizes(axes: list[Axis]) -> tuple[int, ...]:
    return tuple(axis.size for axis in axes)


def _indices(axes: list[Axis]) -> dict[int, np.ndarray]:
    found = {k: permutation(axis) for k, axis in enumerate(axes)}
    return {k: index for k, index in found.items() if index is not None}


def _unchanged_layout(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:
    """Returns the placement of an array that is no kernel. Axes of size 1 may differ; images are channels-first."""
    sized = [k for k, axis in enumerate(axes) if axis.size != 1]
    order = channels_first_order([axes[k] for k in sized]) or list(range(len(sized)))
    wanted = [axes[sized[k]].size for k in order]  # from PyTorch's slowest to its fastest
    if [size for size in shape if size != 1] != wanted:
        raise Misfit(f"expected shape {tuple(wanted) or (1,)} in PyTorch, got {shape}")
    inverse = tuple(np.argsort(order, kind="stable").tolist())
    return Placement(Rearrangement(tuple(wanted), inverse, _sizes(axes)), _indices(axes), _sizes(axes))


def _linear(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:  # [O, I] -> [I, O]
    if len(axes) != 2:
        raise Misfit(f"a kernel of shape {_sizes(axes)} is the kernel of several layers, which has no twin in PyTorch")
    ins, outs = _sizes(axes)
    _check_shape(shape, (outs, ins))
    return Placement(Rearrangement(shape, (1, 0), (ins, outs)), _indices(axes), (ins, outs))


def _linear_general(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:  # [O, I] -> [*ins, *outs]
    layer = slot.layer
    assert isinstance(layer, GENERAL)
    batch = layer.batch_axis if isinstance(layer, nnx.LinearGeneral) else layer.batch_dims
    over = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if batch or over != sorted(over) or len({axis < 0 for axis in over}) > 1:
        name = type(layer).__name__
        raise Misfit(f"a {name} with batch axes, or with its axes out of order, has no twin in PyTorch")
    count = len(over)
    groups = [axes[:count], axes[count:]]
    merged = [Axis(math.prod(_sizes(group)), group, merged=True) for group in groups]
    ins, outs = _sizes(merged)
    _check_shape(shape, (outs, ins))
    return Placement(Rearrangement(shape, (1, 0), (ins, outs)), _indices(merged), _sizes(axes))


def _bias_general(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:  # [O] -> [*outs]
    merged = Axis(math.prod(_sizes(axes)), axes, merged=True)
    _check_shape(shape, (merged.size,))
    return Placement(Rearrangement(shape, (0,), shape), _indices([merged]), _sizes(axes))


def _conv(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:  # [O, I/g, *k] -> [*k, I/g, O]
    *window, ins, outs = _sizes(axes)
    _check_shape(shape, (outs, ins, *window))
    order = (*range(2, len(shape)), 1, 0)
    return Placement(Rearrangement(shape, order, _sizes(axes)), _indices(axes), _sizes(axes))


def _conv_transpose(slot: ArraySlot, shape: tuple[int, ...], axes: list[Axis]) -> Placement:
    """Returns [I, O, *k] -> [*k, I, O], flipped, since Flax does not flip; or [*k, O, I] where Flax transposes."""
    layer = slot.layer
    assert isinstance(layer, nnx.ConvTranspose | linen.ConvTranspose)
    *window, last_but_one, last = _sizes(axes)
    spatial = tuple(range(2, len(shape)))
    if layer.transpose_kernel:
        _check_shape(shape, (last, last_but_one, *window))
        rearrangement = Rearrangement(shape, (*spatial, 1, 0), _sizes(axes))
    else:
        _check_shape(shape, (last_but_one, last, *window))
        rearrangement = Rearrangement(shape, (*spatial, 0, 1), _sizes(axes), spatial)
    return Placement(rearrangement, _indices(axes), _sizes(axes))


KERNELS: Mapping[type, Callable[[ArraySlot, tuple[int, ...], list[Axis]], Placement]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    linen.Dense: _linear,
    linen.DenseGeneral: _linear_general,
    linen.Conv: _conv,
    linen.ConvTranspose: _conv_transpose,
}
"""Placements of kernels, by type of layer."""

KNOWN = (
    *KERNELS,
    nnx.Embed,
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.RMSNorm,
    nnx.PReLU,
    linen.Embed,
    linen.BatchNorm,
    linen.LayerNorm,
    linen.GroupNorm,
    linen.InstanceNorm,
    linen.RMSNorm,
    linen.PReLU,
    layers.BatchNorm,
    layers.Embed,
    layers.InstanceNorm,
    layers.PReLU,
)
"""Layers whose arrays have names of their own in PyTorch."""

LEAF_NAMES = {"bias", "scale", "embedding", "negative_slope", "mean", "var", "num_batches_tracked"}
"""Arrays of these layers, except kernels."""

__all__ = [
    "WITHOUT_PLACE",
    "ArraySlot",
    "Misfit",
    "Names",
    "Placement",
    "array_slots",
    "flax_name",
    "placement",
]
