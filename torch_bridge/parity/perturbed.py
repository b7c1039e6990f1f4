"""Networks with the weights that initialisation leaves constant drawn anew."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.origin import Origin
from jaxensemble.state import Tree, flatten, unflatten
from torch_bridge.assemble import tensors_of
from torch_bridge.stacking import Stack


def perturb(model: nn.Module, seed: int) -> bool:
    """Draws parameters and buffers that are constant throughout anew, in place. Whether there were any.

    Zeros and ones hide errors: a last layer of zeros proves nothing of what leads to it, nor a BatchNorm whose
    statistics are those of initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    found = False
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            first = float(tensor.flatten()[0])
            if not bool((tensor == first).all()) or (tensor.numel() == 1 and first not in (0, 1)):
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(noise + 0.5 if first else 0.2 * noise - 0.1)
            found = True
    return found


def perturbed(ensemble: Ensemble, models: Sequence[nn.Module]) -> tuple[Ensemble, list[nn.Module]] | None:
    """The ensemble and its models with the same constant weights drawn anew, or None where no weight is constant."""
    assert isinstance(ensemble.origin, Origin)
    changed = copy.deepcopy(list(models))
    found = [perturb(model, seed) for seed, model in enumerate(changed)]
    if not any(found):
        return None
    stack = Stack(ensemble.origin.weights, len(changed))
    for k, model in enumerate(changed):
        stack.put(k, tensors_of(model))
    arrays = stack.take()

    def replaced(tree: Tree) -> Tree:
        return unflatten({path: arrays.get(path, leaf) for path, leaf in flatten(tree).items()})

    return dataclasses.replace(ensemble, params=replaced(ensemble.params), buffers=replaced(ensemble.buffers)), changed
