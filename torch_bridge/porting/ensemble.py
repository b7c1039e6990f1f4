"""The steps of porting put together: module to network, network and weights to ensemble."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.modules.build import filled, skeleton
from jaxensemble.modules.randomness import keys_per_member
from jaxensemble.modules.structure import listed
from jaxensemble.network.weight_map import Origin
from torch_bridge.arrays import checked_cast, jax_dtype, odd_kind, to_numpy
from torch_bridge.graph.caches.tensors import fresh
from torch_bridge.graph.examples import Arguments, BatchAxis
from torch_bridge.graph.export import capture
from torch_bridge.graph.merged import has_branches
from torch_bridge.graph.sizes.open_axes import Opened
from torch_bridge.lowering import Lowered, lower
from torch_bridge.lowering.builder import Drawn
from torch_bridge.members.stack import Stack

LAYOUTS = ("torch", "NHWC")


def convert(
    model: nn.Module,
    example_inputs: Arguments | tuple[Any, ...],
    opened: Opened | None = None,
    input_layout: str = "torch",
    *,
    drawn: Drawn | None = None,
    evaluation_only: str | None = None,
) -> Lowered:
    """A module's network and the map of its weights; the weights themselves are left where they are.

    `opened` says which sizes stay open; without, that of the first axis. `evaluation_only` says why there is no
    training mode, where that is known before. With `drawn`, the network gives the random numbers of this mode beside
    its outputs: see `lower`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("`model` must be a module in Python, not TorchScript's: pass the module that was scripted")
    if input_layout not in LAYOUTS:
        raise InputError(f"`input_layout` must be one of {', '.join(map(repr, LAYOUTS))}; got {input_layout!r}")
    from torch_bridge.porting.signs import check_signs  # which needs what is defined here

    check_tensors(model)
    with fresh([model], example_inputs):
        captured = capture(model, example_inputs, opened, evaluation_only)
        check_signs(model, captured.graph, Arguments.of(example_inputs))
    lowered = lower(captured, input_layout, drawn=drawn)
    if has_branches(captured.graph) and len({module.training for module in model.modules()}) > 1:
        apart = [path or "itself" for path, module in model.named_modules() if module.training]
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode in part ({', '.join(apart[:5])}), and its forward does "
            "something else there, which is carried for all of it in one mode. Call .eval() or .train() on it first: "
            "an ensemble has both modes."
        )
    if lowered.network.evaluation_only and any(module.training for module in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode, and can be ported for evaluation only, because "
            f"{lowered.network.evaluation_only}. Call .eval() on it first."
        )
    return lowered


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def check_tensors(model: nn.Module) -> None:
    """Whether a model's parameters and buffers are such as a stack of weights can hold.

    **Raises:** `InputError` naming every one that has no plain values, or none of its own, and `UnsupportedError` for
    layers that hold none but packed integers.
    """
    quantised = [path or "itself" for path, module in model.named_modules() if _is_quantised(module)]
    if quantised:
        raise UnsupportedError(
            f"{type(model).__name__} is quantised ({listed(quantised)}): its layers hold packed integers, for kernels "
            "of PyTorch's own that XLA has no equal of. Port the network as it was before."
        )
    tensors = tensors_of(model)
    odd = {key: odd_kind(tensor) for key, tensor in tensors.items()}
    lines = [f"  {key}: {kind}" for key, kind in odd.items() if kind]
    if lines:
        raise InputError(f"{type(model).__name__} must hold plain dense tensors; got\n" + "\n".join(lines))
    lines = [f"  {first} and {second}" for first, second in _overlapping(tensors)]
    if lines:
        raise InputError(
            f"{type(model).__name__} has tensors that share memory without being one tensor:\n"
            + "\n".join(lines)
            + "\n"
            "A stack of weights cannot keep that. Clone one of each pair, or, to tie them, use one Parameter for both."
        )


def _overlapping(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Neighbours in memory, of tensors that are not the same, of which one begins before the other ends."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), key)
        for key, tensor in {id(tensor): (key, tensor) for key, tensor in tensors.items() if tensor.numel()}.values()
    )
    return [(a[3], b[3]) for a, b in itertools.pairwise(spans) if a[0] == b[0] and b[1] < a[2]]


def _extent(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def assembled(lowered: Lowered, stack: Stack, name: str, batch_axis: BatchAxis, input_layout: str) -> Ensemble:
    """A network and a filled stack as an ensemble."""
    state = filled(skeleton(lowered.network), stack.take() | constants_of(lowered), stack.members)
    rngs = keys_per_member(state.rngs, stack.members)
    origin = Origin(name, lowered.weights, batch_axis, input_layout)
    return Ensemble(state.graphdef, state.params, state.buffers, state.constants, rngs, lowered.network, origin)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names, non-persistent ones too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def constants_of(lowered: Lowered) -> dict[str, Any]:
    """The arrays of a network that all members share."""
    result = {}
    for path, tensor in lowered.constants.items():
        array = to_numpy(tensor)
        result[path] = jnp.array(
            checked_cast(array, jax_dtype(array.dtype, f"constant `{path}`"), f"constant `{path}`")
        )
    return result
