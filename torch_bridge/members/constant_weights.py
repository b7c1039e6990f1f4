"""Weights that initialisation leaves constant, drawn anew: zeros and ones hide errors."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torch_bridge.members.finite import has_fractions


def perturb(model: nn.Module, seed: int) -> bool:
    """Draws parameters and buffers that are constant throughout anew, in place. Whether there were any.

    Zeros and ones hide errors: a last layer of zeros proves nothing of what leads to it, nor a BatchNorm whose
    statistics are those of initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    constant = _constant(model)
    with torch.no_grad():
        for tensor in constant.values():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(noise + 0.5 if tensor.flatten()[0] else 0.2 * noise - 0.1)  # complex noise has both parts
    return bool(constant)


def _constant(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of one fraction throughout, by name; of those with one element, zeros and ones."""
    return {name: tensor for name, tensor in _tensors(model) if _is_constant(tensor)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _is_constant(tensor: Tensor) -> bool:
    if not has_fractions(tensor) or tensor.numel() == 0:
        return False
    first = tensor.detach().flatten()[0]
    return bool((tensor == first).all()) and (tensor.numel() > 1 or first.item() in (0, 1))
