"""Training mode: outputs, and the buffers that a call leaves behind."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, RandomnessError
from jaxensemble.origin import Origin
from jaxensemble.state import flatten
from torch_bridge import reference
from torch_bridge.assemble import tensors_of
from torch_bridge.parity.metrics import by_member, normwise, stacked
from torch_bridge.parity.result import Row

STAGE = "float64, training mode"


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
    rows = [_worst("outputs", {name: normwise(ours[name], theirs[name]) for name in theirs}, limit)]
    buffers = _buffers(after, trained)
    return [*rows, _worst("buffers after a call", buffers, limit)] if buffers else rows


def _buffers(after: Ensemble, trained: Sequence[nn.Module]) -> dict[str, tuple[float, int]]:
    ours = flatten(after.buffers)
    states = [{key: tensor.detach().numpy() for key, tensor in tensors_of(model).items()} for model in trained]
    errors = {}
    for entry in after.origin.weights.entries:
        if entry.path in ours:
            expected = np.stack([entry.rearrangement.apply(state[entry.keys[0]]) for state in states])
            errors[entry.keys[0]] = normwise(np.asarray(ours[entry.path]), expected)
    return errors


def _worst(what: str, errors: dict[str, tuple[float, int]], limit: float) -> Row:
    name = max(errors, key=lambda name: errors[name][0])
    error, member = errors[name]
    return Row(STAGE, what, error, limit, f"member {member}, {name}")
