"""Training mode: outputs of a call, and the buffers after it."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError, first_line
from jaxensemble.modules.state import Tree, flatten
from jaxensemble.network.weight_map import Origin
from torch_bridge.graph.forward import Inputs
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity import precision, reference
from torch_bridge.parity.draws import Draws, can_draw
from torch_bridge.parity.float64 import recapture_network
from torch_bridge.parity.metrics import arrays_by_place, normwise_error, stack_outputs
from torch_bridge.parity.result import Row
from torch_bridge.parity.rounding import allowed_error, coarse_error

STAGE = "float64, training mode"

Errors = dict[str, tuple[float, int]]


def compare(
    ensemble: Ensemble,
    doubles: Sequence[nn.Module],
    inputs: Inputs,
    arrays: tuple[Any, ...],
    limit: float,
    key: jax.Array,
) -> list[Row] | str:
    """Compares outputs and buffers of one call in training mode.

    Where random numbers are drawn, both sides get the ensemble's.

    **Arguments:** `arrays` are `inputs` as the ensemble takes them.

    **Returns:** rows for the worst output and the worst buffer, or the reason why they cannot be compared.
    """
    assert isinstance(ensemble.origin, Origin)
    if ensemble.network is not None and ensemble.network.evaluation_only:
        return f"training mode not compared: {ensemble.network.evaluation_only}"
    try:
        ensemble, doubles, draws = draw_alike(ensemble, doubles, inputs, arrays, key)
    except UnsupportedError as error:  # for example draws within a recurrent layer
        return f"training mode not compared: {first_line(error)}"
    actual, after = ensemble.update(*arrays, **draws.options)
    actual = draws.outputs(actual)
    try:
        trained, theirs = _run_training(doubles, inputs)
    except InputError as error:  # BatchNorm refuses batches of one value
        return f"training mode not compared: {first_line(error)}"
    ours = arrays_by_place(actual)
    errors = {name: normwise_error(ours[name], theirs[name]) for name in theirs}

    @functools.cache
    def coarse() -> tuple[list[nn.Module], dict[str, np.ndarray]]:
        models, given = precision.single_copies(doubles, inputs)
        with precision.single_precision():
            return _run_training(models, given)

    def of_buffers(key: str) -> float:
        states = zip(tensor_arrays(coarse()[0]), tensor_arrays(trained), strict=True)
        ours, exact = zip(*((narrow[key], wide[key]) for narrow, wide in states), strict=True)
        return coarse_error(np.stack(ours), np.stack(exact))

    rows = [worst_row(STAGE, "outputs", errors, limit, lambda name: coarse_error(coarse()[1][name], theirs[name]))]
    buffers = errors_of(after.buffers, after.origin, tensor_arrays(trained))
    return [*rows, worst_row(STAGE, "buffers after a call", buffers, limit, of_buffers)] if buffers else rows


def draw_alike(
    ensemble: Ensemble,
    doubles: Sequence[nn.Module],
    inputs: Inputs,
    arrays: tuple[Any, ...],
    key: jax.Array,
    *,
    each: bool = False,
) -> tuple[Ensemble, list[nn.Module], Draws]:
    """The ensemble in training mode, copies of the models, and the draws that make both draw the same numbers.

    **Raises:** `UnsupportedError` for a network whose draws are not accessible.
    """
    ensemble, models = ensemble.train(), [copy.deepcopy(model) for model in doubles]
    if not can_draw(ensemble, arrays, each=each):
        return ensemble, models, Draws((), key)
    ensemble = recapture_network(ensemble, models[0], inputs, "training").train()
    return ensemble, models, Draws(models, key)


def _run_training(doubles: Sequence[nn.Module], inputs: Inputs) -> tuple[list[nn.Module], dict[str, np.ndarray]]:
    """Copies of the models after a call in training mode, and the outputs of this call."""
    models = [copy.deepcopy(model).train() for model in doubles]
    outputs = stack_outputs(reference.run_loop(models, inputs))
    return models, outputs


def tensor_arrays(models: Sequence[nn.Module]) -> list[dict[str, np.ndarray]]:
    """Every parameter and buffer of each member, by PyTorch's names."""
    return [{key: tensor.detach().numpy() for key, tensor in tensors_of(model).items()} for model in models]


def errors_of(tree: Tree, origin: Origin, states: Sequence[Mapping[str, np.ndarray]]) -> Errors:
    """The error of each stacked array against the arrays of every member in `states`, and the worst member."""
    ours, errors = flatten(tree), {}
    for entry in origin.weights.entries:
        key = next((key for key in entry.keys if key in states[0]), None)  # tied tensors may have one name only
        if entry.path in ours and key is not None:
            expected = np.stack([entry.rearrangement.apply(state[key]) for state in states])
            errors[key] = normwise_error(np.asarray(ours[entry.path]), expected)
    return errors


def worst_row(
    stage: str, what: str, errors: Errors, limit: float, coarse: Callable[[str], float] = lambda name: 0.0
) -> Row:
    """A row for the error that exceeds its limit most, and its place."""
    rows = []
    for name, (error, member) in errors.items():
        most, remark = allowed_error(error, limit, lambda name=name: coarse(name))  # type: ignore[misc]
        rows.append(Row(stage, what, error, most, f"member {member}, {name}{remark}"))
    return max(rows, key=lambda row: (row.error / row.limit, row.error))
