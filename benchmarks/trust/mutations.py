"""Errors that a converter could make, planted one by one into a network's steps, layers, weight map or weights.

A change to a network is made where networks are lowered, so that it is made whenever one is, as a wrong rule would.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxensemble.ensemble import Ensemble
from jaxensemble.network.network import Call, Layer, Ref
from jaxensemble.network.weight_map import Entry, Rearrangement, WeightMap
from torch_bridge.lowering import Lowered

Change: TypeAlias = Callable[[Lowered], Lowered | None]
"""A change of a lowered network, such as a wrong rule makes; None if it makes no difference."""

Fault: TypeAlias = Callable[[Ensemble], Ensemble | None]
"""A change of an ensemble's weights; None if it has no such weights."""


def _of_calls(change: Callable[[Call], Call | None]) -> Change:
    """Changes the first step for which `change` knows how."""

    def apply(lowered: Lowered) -> Lowered | None:
        calls = list(lowered.network.calls)
        for k, call in enumerate(calls):
            if (other := change(call)) is not None and other != call:
                calls[k] = other
                return dataclasses.replace(lowered, network=dataclasses.replace(lowered.network, calls=tuple(calls)))
        return None

    return apply


def _of_layers(change: Callable[[Layer], Mapping[str, Any] | None]) -> Change:
    """Changes options of the first layer for which `change` gives others."""

    def apply(lowered: Lowered) -> Lowered | None:
        layers = list(lowered.network.layers)
        for k, layer in enumerate(layers):
            if (options := change(layer)) is not None:
                layers[k] = dataclasses.replace(layer, options={**layer.options, **options})
                return dataclasses.replace(lowered, network=dataclasses.replace(lowered.network, layers=tuple(layers)))
        return None

    return apply


def _of_entries(change: Callable[[Entry], Rearrangement | None]) -> Change:
    """Changes how a tensor is stored: the first that `change` can change. Its stored shape stays the same."""

    def apply(lowered: Lowered) -> Lowered | None:
        entries = list(lowered.weights.entries)
        for k, entry in enumerate(entries):
            other = change(entry)
            if other is not None and other != entry.rearrangement:
                entries[k] = dataclasses.replace(entry, rearrangement=other)
                return dataclasses.replace(lowered, weights=WeightMap(tuple(entries)))
        return None

    return apply


def _kwargs(call: Call, target: str, **changes: Any) -> Call | None:
    if call.target.rpartition(".")[2] != target:
        return None
    return dataclasses.replace(call, kwargs={**call.kwargs, **changes})


def _renamed(before: str, after: str) -> Change:
    return _of_calls(lambda call: dataclasses.replace(call, target=after) if call.target == before else None)


def _tanh_gelu(call: Call) -> Call | None:
    return _kwargs(call, "gelu", approximate=not call.kwargs.get("approximate", True))


def _count_include_pad(call: Call) -> Call | None:
    if "padding" not in call.kwargs and len(call.args) < 4:
        return None
    return _kwargs(call, "avg_pool", count_include_pad=not call.kwargs.get("count_include_pad", True))


def _pool_padding(call: Call) -> Call | None:
    pads = call.kwargs.get("padding")
    if not isinstance(pads, tuple) or not call.target.endswith("_pool"):
        return None
    return _kwargs(call, call.target.rpartition(".")[2], padding=_shifted(pads))


def _shifted(pads: Any) -> Any:
    """Moves one entry of padding from the first side to the second, if there is one."""
    moved = [(low - 1, high + 1) if low else (low, high) for low, high in pads]
    return tuple(moved)


def _biased_variance(call: Call) -> Call | None:
    correction = call.kwargs.get("correction", call.kwargs.get("ddof"))
    if call.target not in ("jnp.var", "jnp.std", "ops.std"):
        return None
    default = 1 if call.target == "ops.std" else 0
    return _kwargs(call, call.target[-3:], correction=0 if (default if correction is None else correction) else 1)


def _align_corners(call: Call) -> Call | None:
    if len(call.args) < 3 or call.args[2] not in ("linear", "cubic"):
        return None
    return _kwargs(call, "resize", align_corners=not call.kwargs.get("align_corners", False))


def _nearest(call: Call) -> Call | None:
    if call.target != "ops.resize" or call.args[2:3] != ("linear",):
        return None
    return dataclasses.replace(call, args=(*call.args[:2], "nearest", *call.args[3:]))


def _other_axis(call: Call) -> Call | None:
    axis = call.kwargs.get("axis", -1)
    if call.target not in ("nnx.softmax", "jax.nn.log_softmax", "nnx.log_softmax") or not isinstance(axis, int):
        return None
    return _kwargs(call, call.target.rpartition(".")[2], axis=-2 if axis == -1 else -1)


def _slope(call: Call) -> Call | None:
    if call.target != "ops.leaky_relu":
        return None
    return dataclasses.replace(call, args=(call.args[0], 0.1), kwargs={})


_ACTIVATIONS = ("nnx.relu", "nnx.tanh", "jnp.tanh", "nnx.sigmoid", "nnx.silu", "nnx.elu", "nnx.gelu", "ops.leaky_relu")


def _no_activation(call: Call) -> Call | None:
    if call.target not in _ACTIVATIONS:
        return None
    return dataclasses.replace(call, target="+", args=(call.args[0], 0), kwargs={})


def _two(call: Call, target: str) -> bool:
    return call.target == target and all(isinstance(arg, Ref) for arg in call.args)


def _other_sign(call: Call) -> Call | None:
    return dataclasses.replace(call, target="-") if _two(call, "+") else None


def _exchanged(target: str) -> Change:
    return _of_calls(
        lambda call: dataclasses.replace(call, args=(call.args[1], call.args[0])) if call.target == target else None
    )


def _joined_backwards(call: Call) -> Call | None:
    if call.target not in ("jnp.concatenate", "jnp.stack") or not isinstance(call.args[0], list | tuple):
        return None
    return dataclasses.replace(call, args=(list(call.args[0])[::-1], *call.args[1:]))


def _mask_polarity(call: Call) -> Call | None:
    if call.target != "jnp.where" or len(call.args) != 3:
        return None
    condition, yes, no = call.args
    return dataclasses.replace(call, args=(condition, no, yes))


def _no_mask(call: Call) -> Call | None:
    if not call.target.startswith("ops.attention") or not (call.kwargs.get("is_causal") or len(call.args) > 3):
        return None
    kwargs = {name: value for name, value in call.kwargs.items() if name not in ("is_causal", "mask")}
    return dataclasses.replace(call, args=call.args[:3], kwargs=kwargs)


def _unscaled(call: Call) -> Call | None:
    if not call.target.startswith("ops.attention"):
        return None
    return dataclasses.replace(call, kwargs={**call.kwargs, "scale": 1.0})


def _other_way_round(call: Call) -> Call | None:
    if call.target != "jnp.roll" or not isinstance(call.args[1], int):
        return None
    return dataclasses.replace(call, args=(call.args[0], -call.args[1], *call.args[2:]))


def _other_bound(call: Call) -> Call | None:
    if call.target not in ("ops.clamp", "ops.clamp_open", "jnp.clip", "ops.hard_tanh") or len(call.args) < 3:
        return None
    return dataclasses.replace(call, args=(*call.args[:2], 0.5, *call.args[3:]))


def _epsilon(layer: Layer) -> Mapping[str, Any] | None:
    if not layer.type.endswith("Norm"):
        return None
    epsilon = layer.options.get("epsilon", 1e-5)
    return {"epsilon": 1e-6 if epsilon != 1e-6 else 1e-5}


def _momentum(layer: Layer) -> Mapping[str, Any] | None:
    if not layer.type.endswith("BatchNorm") or layer.options.get("momentum", 0.9) is None:
        return None
    return {"momentum": 1 - layer.options.get("momentum", 0.9)}  # type: ignore[operator]


def _conv_padding(layer: Layer) -> Mapping[str, Any] | None:
    padding = layer.options.get("padding")
    if layer.type != "nnx.Conv" or not padding or isinstance(padding, str):
        return None
    sizes = layer.options["kernel_size"]
    assert isinstance(sizes, tuple)
    pairs = [
        p if isinstance(p, tuple) else (p, p)
        for p in (padding if isinstance(padding, tuple) else [padding] * len(sizes))
    ]
    return {"padding": _shifted(pairs)}


def _groups(layer: Layer) -> Mapping[str, Any] | None:
    groups = layer.options.get("num_groups")
    if layer.type != "nnx.GroupNorm" or not isinstance(groups, int) or groups == 1:
        return None
    return {"num_groups": 1}


def _not_transposed(entry: Entry) -> Rearrangement | None:
    moved = entry.rearrangement
    square = len(moved.shape) == 2 and moved.shape[0] == moved.shape[1] and moved.order == (1, 0)
    return dataclasses.replace(moved, order=(0, 1)) if square else None


def _flattened_as_it_was(entry: Entry) -> Rearrangement | None:
    """Leaves the rows of a layer's weight after a flatten of images in PyTorch's order."""
    if len(entry.shape) != 2 or len(entry.rearrangement.split) < 3:
        return None
    return Rearrangement(entry.shape, (1, 0), entry.rearrangement.shape)


def _spatial(entry: Entry) -> Rearrangement | None:
    """Returns how a convolution's kernel is stored, with its spatial axes apart; None for other tensors."""
    moved, rank = entry.rearrangement, len(entry.shape)
    if rank not in (3, 4) or moved.order[0] != 2 or moved.split[:2] != entry.shape[:2]:
        return None
    order = moved.order if len(moved.order) == rank else (*range(2, rank), *moved.order[1:])
    return dataclasses.replace(moved, split=entry.shape, order=order)


def _flipped_kernel(entry: Entry) -> Rearrangement | None:
    moved = _spatial(entry)
    if moved is None or entry.shape[2] == 1:
        return None
    return dataclasses.replace(moved, flipped=(2,) if not moved.flipped else ())


def _turned_kernel(entry: Entry) -> Rearrangement | None:
    moved = _spatial(entry)
    if moved is None or len(entry.shape) != 4 or entry.shape[2] != entry.shape[3] or entry.shape[2] == 1:
        return None
    return dataclasses.replace(moved, order=(moved.order[1], moved.order[0], *moved.order[2:]))


def _gate_order(entry: Entry) -> Rearrangement | None:
    """Reverses the gates of a recurrent layer."""
    moved = entry.rearrangement
    if "weight_ih" not in entry.keys[0] or moved.order != (1, 0) or len(moved.split) != 2:
        return None
    count = next((gates for gates in (4, 3) if moved.split[0] % gates == 0), 0)
    if not count:
        return None
    return Rearrangement((count, moved.split[0] // count, moved.split[1]), (2, 0, 1), moved.shape, flipped=(0,))


def _exchanged_paths(first: str, second: str) -> Change:
    """Exchanges two tensors of a layer."""

    def apply(lowered: Lowered) -> Lowered | None:
        entries = list(lowered.weights.entries)
        places = {entry.keys[0]: k for k, entry in enumerate(entries)}
        for key, k in places.items():
            other = places.get(f"{key.removesuffix(first)}{second}")
            if key.endswith(first) and other is not None and entries[k].shape == entries[other].shape:
                entries[k], entries[other] = (
                    dataclasses.replace(entries[k], path=entries[other].path),
                    dataclasses.replace(entries[other], path=entries[k].path),
                )
                return dataclasses.replace(lowered, weights=WeightMap(tuple(entries)))
        return None

    return apply


CHANGES: dict[str, Change] = {
    "tanh GELU": _of_calls(_tanh_gelu),
    "padding counted": _of_calls(_count_include_pad),
    "pooling off by one": _of_calls(_pool_padding),
    "biased variance": _of_calls(_biased_variance),
    "align_corners": _of_calls(_align_corners),
    "nearest for linear": _of_calls(_nearest),
    "softmax over another axis": _of_calls(_other_axis),
    "slope": _of_calls(_slope),
    "ReLU for ReLU6": _renamed("nnx.relu6", "nnx.relu"),
    "no activation": _of_calls(_no_activation),
    "sign of a sum": _of_calls(_other_sign),
    "operands of a difference": _exchanged("-"),
    "operands of a quotient": _exchanged("/"),
    "concatenated backwards": _of_calls(_joined_backwards),
    "mask polarity": _of_calls(_mask_polarity),
    "no attention mask": _of_calls(_no_mask),
    "attention not scaled": _of_calls(_unscaled),
    "rolled the other way": _of_calls(_other_way_round),
    "bound of a clamp": _of_calls(_other_bound),
    "epsilon": _of_layers(_epsilon),
    "momentum": _of_layers(_momentum),
    "convolution off by one": _of_layers(_conv_padding),
    "groups of a norm": _of_layers(_groups),
    "square weight transposed": _of_entries(_not_transposed),
    "flatten not permuted": _of_entries(_flattened_as_it_was),
    "kernel flipped": _of_entries(_flipped_kernel),
    "kernel turned": _of_entries(_turned_kernel),
    "gate order": _of_entries(_gate_order),
    "mean for variance": _exchanged_paths("running_mean", "running_var"),
    "scale for shift": _exchanged_paths("weight", "bias"),
}
"""Wrong rules, by name."""


def _members(positions: list[int]) -> Fault:
    return lambda ensemble: ensemble[positions + list(range(2, len(ensemble)))]


def _stale_buffers(ensemble: Ensemble) -> Ensemble | None:
    fresh = {"mean": 0, "var": 1}

    def reset(path: Any, leaf: Any) -> Any:
        value = fresh.get(jax.tree_util.keystr(path[-1:]).strip("[]'"))
        return leaf if value is None else np.full_like(leaf, value)

    if not jax.tree.leaves(ensemble.buffers):
        return None
    return dataclasses.replace(ensemble, buffers=jax.tree_util.tree_map_with_path(reset, ensemble.buffers))


def _rounded(ensemble: Ensemble) -> Ensemble | None:
    if not jax.tree.leaves(ensemble.params):
        return None
    rounded = lambda leaf: leaf.astype("bfloat16").astype(leaf.dtype) if leaf.dtype == "float32" else leaf  # noqa: E731
    return dataclasses.replace(ensemble, params=jax.tree.map(rounded, ensemble.params))


FAULTS: dict[str, Fault] = {
    "members exchanged": _members([1, 0]),
    "one member twice": _members([0, 0]),
    "stale buffers": _stale_buffers,
    "weights rounded": _rounded,
}
"""Faults of the weights, by name."""

NAMES: tuple[str, ...] = (*CHANGES, *FAULTS)


def places(lowered: Lowered, name: str) -> Iterator[str]:
    """Returns the modules whose steps or layers a change has touched."""
    changed = CHANGES[name](lowered)
    if changed is None:
        return
    for before, after in zip(lowered.network.calls, changed.network.calls, strict=True):
        if before != after and before.scope:
            yield before.scope[-1].partition("@")[0]
    for before, after in zip(lowered.network.layers, changed.network.layers, strict=True):
        if before != after:
            yield before.path
