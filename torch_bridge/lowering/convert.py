"""Conversion of a module to a network and the map of its weights."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn

from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.network.weight_map import INPUT_LAYOUTS
from torch_bridge.arrays import cast_exactly, jax_dtype, to_numpy
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.capture import capture
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.modes.merge import has_branches
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering.assembly import Lowered
from torch_bridge.lowering.calls import DrawMode
from torch_bridge.lowering.lower import lower
from torch_bridge.lowering.signs import check_signs
from torch_bridge.lowering.table import OPERATIONS
from torch_bridge.members.tensors import check_tensors


def convert(
    model: nn.Module,
    example_inputs: Arguments | tuple[Any, ...],
    opened: OpenAxes | None = None,
    input_layout: str = "torch",
    *,
    draw_mode: DrawMode | None = None,
    evaluation_only: str | None = None,
) -> Lowered:
    """Converts a module to a network and the map of its weights. The weights stay in the module.

    **Arguments:**

    - `opened`: the sizes that stay open; without it, the size of the first axis.
    - `draw_mode`: the mode whose random numbers the network returns with its outputs: see `lower`.
    - `evaluation_only`: the reason why there is no training mode, where it is already known.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("`model` must be a module in Python, not TorchScript's: pass the module that was scripted")
    if input_layout not in INPUT_LAYOUTS:
        raise InputError(f"`input_layout` must be one of {', '.join(map(repr, INPUT_LAYOUTS))}; got {input_layout!r}")
    check_tensors(model)
    with keep_caches_empty([model], example_inputs):
        captured = capture(model, example_inputs, OPERATIONS, opened, evaluation_only)
        check_signs(model, captured.graph, Arguments.of(example_inputs))
    lowered = lower(captured, input_layout, draw_mode=draw_mode)
    if has_branches(captured.graph) and len({module.training for module in model.modules()}) > 1:
        apart = [path or "itself" for path, module in model.named_modules() if module.training]
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode in part ({', '.join(apart[:5])}), and its forward differs "
            "between modes. It can be carried only if all of it is in one mode. Call .eval() or .train() on it first: "
            "an ensemble has both modes."
        )
    if lowered.network.evaluation_only and any(module.training for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode, and can be ported for evaluation only, because "
            f"{lowered.network.evaluation_only}. Call .eval() on it first."
        )
    return lowered


def constant_arrays(lowered: Lowered) -> dict[str, jax.Array]:
    """The arrays of a network that all members share."""
    result = {}
    for path, tensor in lowered.constants.items():
        array = to_numpy(tensor)
        result[path] = jnp.array(
            cast_exactly(array, jax_dtype(array.dtype, f"constant `{path}`"), f"constant `{path}`")
        )
    return result
