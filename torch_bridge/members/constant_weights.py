"""Weights that initialisation leaves constant, replaced by random ones: zeros and ones hide errors."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torch_bridge.members.finite import has_fractions


def randomise_constants(model: nn.Module, seed: int) -> bool:
    """Replaces constant parameters and buffers by random values, in place. Returns whether there were any.

    Zeros and ones hide errors: a last layer of zeros proves nothing about the layers before it, and neither does a
    BatchNorm with its initial statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    constant = constant_tensors(model)
    with torch.no_grad():
        for tensor in constant.values():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(noise + 0.5 if tensor.flatten()[0] else 0.2 * noise - 0.1)  # complex noise has both parts
    return bool(constant)


def constant_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point tensors of one value throughout, by name; with one element, only 0 and 1 count."""
    return {name: tensor for name, tensor in named_tensors(model) if _is_constant(tensor)}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _is_constant(tensor: Tensor) -> bool:
    if not has_fractions(tensor) or tensor.numel() == 0:
        return False
    first = tensor.detach().flatten()[0]
    return bool((tensor == first).all()) and (tensor.numel() > 1 or first.item() in (0, 1))
