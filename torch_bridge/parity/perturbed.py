"""Networks with the weights that initialisation leaves constant drawn anew."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.state import Tree, flatten, unflatten
from jaxensemble.network.weight_map import Origin, WeightMap
from torch_bridge.members.finite import has_fractions
from torch_bridge.members.stack import Stack
from torch_bridge.porting.ensemble import tensors_of


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


def _copied(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy with tensors of its own for these names only: models may be large."""
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in _tensors(model) if name not in names})


def _is_constant(tensor: Tensor) -> bool:
    if not has_fractions(tensor) or tensor.numel() == 0:
        return False
    first = tensor.detach().flatten()[0]
    return bool((tensor == first).all()) and (tensor.numel() > 1 or first.item() in (0, 1))


def perturbed(ensemble: Ensemble, models: Sequence[nn.Module]) -> tuple[Ensemble, list[nn.Module]] | None:
    """The ensemble and its models with the same constant weights drawn anew, or None where no weight is constant."""
    assert isinstance(ensemble.origin, Origin)
    names = {name for model in models for name in _constant(model)}
    if not names:
        return None
    changed = [_copied(model, names) for model in models]
    for seed, model in enumerate(changed):
        perturb(model, seed)
    entries = tuple(entry for entry in ensemble.origin.weights.entries if not names.isdisjoint(entry.keys))
    stack = Stack(WeightMap(entries), len(changed))
    for k, model in enumerate(changed):
        stack.put(k, tensors_of(model))
    arrays = stack.take()

    def replaced(tree: Tree) -> Tree:
        return unflatten({path: arrays.get(path, leaf) for path, leaf in flatten(tree).items()})

    return dataclasses.replace(ensemble, params=replaced(ensemble.params), buffers=replaced(ensemble.buffers)), changed
