"""Random values for weights that initialisation leaves constant."""

import copy
import dataclasses
from collections.abc import Sequence

from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.state import Tree, flatten, unflatten
from jaxensemble.network.weight_map import Origin, WeightMap
from torch_bridge.members.constant_weights import constant_tensors, named_tensors, randomise_constants
from torch_bridge.members.stack import Stack
from torch_bridge.members.tensors import tensors_of


def _copy_tensors(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy of a model that shares all tensors except those named: models may be large."""
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in named_tensors(model) if name not in names})


def perturb_constants(ensemble: Ensemble, models: Sequence[nn.Module]) -> tuple[Ensemble, list[nn.Module]] | None:
    """The ensemble and its models with the same random values for constant weights. None if no weight is constant."""
    assert isinstance(ensemble.origin, Origin)
    names = {name for model in models for name in constant_tensors(model)}
    if not names:
        return None
    changed = [_copy_tensors(model, names) for model in models]
    for seed, model in enumerate(changed):
        randomise_constants(model, seed)
    entries = tuple(entry for entry in ensemble.origin.weights.entries if not names.isdisjoint(entry.keys))
    stack = Stack(WeightMap(entries), len(changed))
    for k, model in enumerate(changed):
        stack.put(k, tensors_of(model))
    arrays = stack.take()

    def replace(tree: Tree) -> Tree:
        return unflatten({path: arrays.get(path, leaf) for path, leaf in flatten(tree).items()})

    return dataclasses.replace(ensemble, params=replace(ensemble.params), buffers=replace(ensemble.buffers)), changed
