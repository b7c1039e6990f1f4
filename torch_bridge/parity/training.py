"""Training mode: outputs, and the buffers that a call leaves behind."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, RandomnessError
from jaxensemble.origin import Origin
from jaxensemble.state import Tree, flatten
from torch_bridge import reference
from torch_bridge.assemble import tensors_of
from torch_bridge.parity.metrics import by_member, normwise, stacked
from torch_bridge.parity.result import Row

STAGE = "float64, training mode"

Errors = dict[str, tuple[float, int]]


def compare(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: tuple[Any, ...], arrays: Any, limit: float
) -> list[Row] | str:
    """The worst output and the worst buffer after one call, or why they cannot be compared.

    `arrays` are `inputs` as the ensemble takes them.
    """
    assert isinstance(ensemble.origin, Origin)
    if ensemble.network is not None and ensemble.network.evaluation_only:
        return f"training mode not compared: {ensemble.network.evaluation_only}"
    try:
        actual, after = ensemble.train().update(*arrays)
    except RandomnessError as error:  # dropout: the two frameworks draw different numbers
        return f"training mode not compared: {error}"
    trained = [copy.deepcopy(model).train() for model in doubles]
    try:
        theirs = stacked(reference.loop(trained, inputs))
    except InputError as error:  # BatchNorm refuses batches of one value
        return f"training mode not compared: {error}"
    ours = by_member(actual, len(trained))
    rows = [worst(STAGE, "outputs", {name: normwise(ours[name], theirs[name]) for name in theirs}, limit)]
    buffers = errors_of(after.buffers, after.origin, arrays_of(trained))
    return [*rows, worst(STAGE, "buffers after a call", buffers, limit)] if buffers else rows


def arrays_of(models: Sequence[nn.Module]) -> list[dict[str, np.ndarray]]:
    """Every parameter and buffer of each member, by PyTorch's names."""
    return [{key: tensor.detach().numpy() for key, tensor in tensors_of(model).items()} for model in models]


def errors_of(tree: Tree, origin: Origin, states: Sequence[Mapping[str, np.ndarray]]) -> Errors:
    """How far stacked arrays are from those that `states` have of every member: the error, and the worst member."""
    ours, errors = flatten(tree), {}
    for entry in origin.weights.entries:
        key = next((key for key in entry.keys if key in states[0]), None)  # tied tensors may stand under one name only
        if entry.path in ours and key is not None:
            expected = np.stack([entry.rearrangement.apply(state[key]) for state in states])
            errors[key] = normwise(np.asarray(ours[entry.path]), expected)
    return errors


def worst(stage: str, what: str, errors: Errors, limit: float) -> Row:
    """The largest of the errors, and where it is."""
    name = max(errors, key=lambda name: errors[name][0])
    error, member = errors[name]
    return Row(stage, what, error, limit, f"member {member}, {name}")
