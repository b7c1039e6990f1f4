"""PyTorch modules to Flax modules, one at a time."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import Tensor, nn

from jaxensemble.build import filled, skeleton
from jaxensemble.errors import InputError
from jaxensemble.state import merge
from torch_bridge.arrays import checked_cast, jax_dtype, to_numpy
from torch_bridge.capture import BatchAxis, capture
from torch_bridge.lowering import Lowered, lower
from torch_bridge.weights import Entry

LAYOUTS = ("torch", "NHWC")


def convert(
    model: nn.Module, example_inputs: tuple[Any, ...], batch_axis: BatchAxis = 0, input_layout: str = "torch"
) -> Lowered:
    """A module's network and the map of its weights; the weights themselves are left where they are."""
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    if input_layout not in LAYOUTS:
        raise InputError(f"`input_layout` must be one of {', '.join(map(repr, LAYOUTS))}; got {input_layout!r}")
    return lower(capture(model, example_inputs, batch_axis), input_layout)


def to_flax(
    model: nn.Module, example_inputs: tuple[Any, ...], *, batch_axis: BatchAxis = 0, input_layout: str = "torch"
) -> nnx.Module:
    """Ports one PyTorch module to a Flax module with its weights.

    **Arguments:**

    - `model`: any module whose forward `torch.export` can follow.
    - `example_inputs`: the positional arguments of one call, as a tuple of tensors.
    - `batch_axis`: the axis of the inputs whose size stays open; a tuple names one for each input; None fixes shapes.
    - `input_layout`: `"torch"` for inputs laid out as PyTorch's (`[N, C, H, W]`), `"NHWC"` for channels-last ones.
      Outputs have PyTorch's layout.

    **Returns:** an `nnx.Module` in the mode `model` is in, its submodules named as PyTorch's.

    **Raises:** `UnsupportedError` naming what cannot be carried exactly.

    >>> import torch
    >>> linear = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
    >>> module = to_flax(linear, (torch.ones(1, 3),))
    >>> bool(abs(module(np.ones((5, 3), "float32")) - linear(torch.ones(5, 3)).detach().numpy()).max() < 1e-6)
    True
    """
    lowered = convert(model, example_inputs, batch_axis, input_layout)
    tensors = tensors_of(model)
    arrays = {
        entry.path: jnp.array(stored_array(entry, tensors[entry.keys[0]], f"`{entry.keys[0]}`"))
        for entry in lowered.weights.entries
    }
    return merge(*filled(skeleton(lowered.network), arrays | constants_of(lowered)))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names, non-persistent ones too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def stored_array(entry: Entry, tensor: Tensor, what: str) -> np.ndarray:
    """A tensor as the network stores it: rearranged, in a dtype JAX can hold. May be a view of the tensor's memory."""
    array = to_numpy(tensor)
    array = checked_cast(array, jax_dtype(array.dtype, what), what)
    return entry.rearrangement.apply(array)


def constants_of(lowered: Lowered) -> dict[str, Any]:
    """The arrays of a network that all members share."""
    result = {}
    for path, tensor in lowered.constants.items():
        array = to_numpy(tensor)
        result[path] = jnp.array(checked_cast(array, jax_dtype(array.dtype, f"constant `{path}`"), f"constant `{path}`"))
    return result
