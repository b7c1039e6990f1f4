"""Ensembles converted to float64."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import torch
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import UnsupportedError
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.randomness import split_rngs
from jaxensemble.modules.state import Tree
from jaxensemble.network.network import Dtype, Network
from jaxensemble.network.weight_map import Origin, Rearrangement, WeightMap
from torch_bridge.graph.forward import Inputs
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering.calls import DrawMode
from torch_bridge.lowering.convert import constant_arrays, convert


def convert_to_float64(
    ensemble: Ensemble, double: nn.Module, inputs: Inputs, draw_mode: DrawMode | None = None
) -> Ensemble:
    """Converts an ensemble's weights to float64 and complex128, exactly. To be used with x64 on.

    If the network itself has such constants or names such a dtype, it is captured again from `double`, a float64 copy
    of a member: PyTorch then computes its constants in float64. With `draw_mode`, the network returns the random
    numbers of this mode with its outputs.
    """
    if draw_mode is not None or (ensemble.network is not None and is_dtype_dependent(ensemble.network)):
        ensemble = recapture_network(ensemble, double, inputs, draw_mode)
    return ensemble.astype("float64")


def recapture_network(
    ensemble: Ensemble, model: nn.Module, inputs: Inputs, draw_mode: DrawMode | None = None
) -> Ensemble:
    """The ensemble with the network that `model` gives, and its own weights; unchanged if it was not ported."""
    origin = ensemble.origin
    if not isinstance(origin, Origin):
        return ensemble
    reason = ensemble.network.evaluation_only
    lowered = convert(
        model, inputs, OpenAxes.of_ensemble(ensemble), origin.input_layout, draw_mode=draw_mode, evaluation_only=reason
    )
    if draw_mode is not None and _storage(lowered.weights) != _storage(origin.weights):
        raise UnsupportedError("the network that returns its random numbers stores its weights differently")
    state = skeleton(lowered.network)
    return dataclasses.replace(
        ensemble,
        graphdef=state.graphdef,
        network=lowered.network,
        constants=_fill_tree(state.constants, constant_arrays(lowered)),
        rngs=split_rngs(state.rngs, len(ensemble)),
    )


def _storage(weights: WeightMap) -> list[tuple[str, Rearrangement]]:
    """The place and arrangement of every weight."""
    return [(entry.path, entry.rearrangement) for entry in weights.entries]


def _fill_tree(tree: Tree, arrays: Mapping[str, jax.Array], prefix: str = "") -> Tree:
    """The tree with its leaves replaced by the arrays of the same paths."""
    return {
        name: _fill_tree(leaf, arrays, f"{prefix}{name}.") if isinstance(leaf, dict) else arrays[prefix + name]
        for name, leaf in tree.items()
    }


_LIMITS = {
    getattr(torch.finfo(dtype), name)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for name in ("min", "max", "eps", "tiny")
}
"""Numbers that a forward takes from `torch.finfo(x.dtype)`, to fill masked elements."""


def is_dtype_dependent(network: Network) -> bool:
    """Returns whether the network has constants or casts that a float64 network would have in another dtype."""
    if any(variable.kind == "constant" and _is_inexact(variable.dtype) for variable in network.variables):
        return True
    options = (tuple(layer.options.values()) for layer in network.layers)
    if any(isinstance(option, float) and option in _LIMITS for values in options for option in values):
        return True  # for example `nn.RMSNorm`, whose default eps depends on the dtype
    return any(_has_float_name((call.args, call.kwargs)) for call in network.calls)


def _is_inexact(name: str) -> bool:
    """Returns whether a dtype of this name has another one in a float64 network."""
    return "float" in name or "complex" in name


def _has_float_name(arg: Any) -> bool:
    """Returns whether an argument contains an inexact dtype or one of the limits of such a dtype."""
    match arg:
        case Dtype(name):
            return _is_inexact(name)
        case float():
            return arg in _LIMITS
        case tuple() | list():
            return any(_has_float_name(item) for item in arg)
        case Mapping():
            return any(_has_float_name(item) for item in arg.values())
    return False
