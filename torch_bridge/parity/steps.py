"""Training: losses, gradients, parameters and buffers over some steps, beside those of `torch.optim`."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.arguments import bound
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, RandomnessError, first_line
from jaxensemble.inputs import batch_axes
from jaxensemble.training import train_step
from jaxensemble.training.data import rows_of
from torch_bridge import reference
from torch_bridge.optimizers import train_state
from torch_bridge.parity.gradients import floats, weights
from torch_bridge.parity.metrics import normwise
from torch_bridge.parity.result import Row
from torch_bridge.parity.training import arrays_of, errors_of, worst

STEPS = 10

LIMIT = 1e-9
"""Largest float64 error after `STEPS` steps, relative to the largest number of the tensor: rounding errors grow."""

EPSILON = 1e-5
"""PyTorch's own, 1e-8, makes 1e8 times as much of what rounding leaves of a gradient that is zero, as that of a bias
before BatchNorm."""

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda params: torch.optim.Adam(params, 1e-3, eps=EPSILON, weight_decay=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, 1e-3, eps=EPSILON, weight_decay=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 1e-4, eps=EPSILON, momentum=0.9, centered=True),
}


def compare(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: Sequence[Any], arrays: Any
) -> tuple[list[Row], list[str]]:
    """For each optimizer, the worst of losses, parameters and buffers after some steps; and what was not compared.

    `inputs` are those of every member, `arrays` the same as the ensemble takes them.
    """
    ensemble, doubles, notes = _in_training(ensemble, doubles, arrays)
    rows: list[Row] = []
    try:
        for name, make in OPTIMIZERS.items():
            rows += _steps(name, make, ensemble, doubles, inputs, arrays)
    except _NotPossible as error:
        return rows, [*notes, f"training not compared: {error}"]
    try:
        return rows + _against_vmap(ensemble, doubles, inputs, arrays), notes
    except _NotPossible as error:
        return rows, [*notes, f"training not compared with torch.func: {error}"]


def _in_training(
    ensemble: Ensemble, doubles: Sequence[nn.Module], arrays: Any
) -> tuple[Ensemble, Sequence[nn.Module], list[str]]:
    """Both in training mode, or as they are, in evaluation mode, with a note that says why."""
    reason = ensemble.network.evaluation_only if ensemble.network is not None else None
    trained = ensemble
    if reason is None:
        trained = ensemble.train()
        try:
            trained.each(*arrays)
        except (RandomnessError, InputError) as error:  # dropout, whose numbers differ; BatchNorm of one value
            reason = first_line(error)
    if reason is not None:
        return ensemble, doubles, [f"trained in evaluation mode: {reason}"]
    return trained, [copy.deepcopy(model).train() for model in doubles], []


class _NotPossible(Exception):
    """What PyTorch itself cannot do; the text says why."""

    @classmethod
    def because_of(cls, error: Exception) -> "_NotPossible":
        return cls(first_line(error))


def _steps(name: str, make: Make, ensemble: Ensemble, doubles: Any, inputs: Sequence[Any], arrays: Any) -> list[Row]:
    members = [copy.deepcopy(model).requires_grad_(True) for model in doubles]
    optimizers = [make(member.parameters()) for member in members]
    state = train_state(members, optimizers, ensemble, jax.random.key(0), train=False)
    try:
        theirs = [[_step(*pair) for _ in range(STEPS)] for pair in zip(members, optimizers, inputs, strict=True)]
    except (RuntimeError, ValueError) as error:  # as of a forward that writes into what its backward needs
        raise _NotPossible.because_of(error) from error
    ours = []
    for _ in range(STEPS):
        state, losses = train_step(state, arrays, _no_targets(ensemble, arrays), loss=_loss, each=True)
        ours.append(losses)
    stage = f"float64, {STEPS} steps of {name}"
    error, member = normwise(np.array(ours).T, np.array(theirs))
    rows = _tensors(stage, state.ensemble, arrays_of(members))
    return [Row(stage, "losses", error, LIMIT, f"member {member}"), *rows]


def _against_vmap(ensemble: Ensemble, doubles: Any, inputs: Sequence[Any], arrays: Any) -> list[Row]:
    """One step along the gradients that `torch.func` computes of all members at once."""
    rate = 1e-3
    members = [copy.deepcopy(model).requires_grad_(True) for model in doubles]
    optimizers = [torch.optim.SGD(member.parameters(), rate) for member in members]
    state = train_state(members, optimizers, ensemble, jax.random.key(0), train=False)
    state, _ = train_step(state, arrays, _no_targets(ensemble, arrays), loss=_loss, each=True)
    params, buffers = torch.func.stack_module_state(members)

    tensors, calling = reference.with_tensors(reference.stacked_inputs(inputs))

    def loss(params: Any, buffers: Any, tensors: Any) -> Tensor:
        return _torch_loss(torch.func.functional_call(members[0], (params, buffers), *calling(tensors)))

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # torch.func's, of itself
            grads = torch.func.vmap(torch.func.grad(loss))(params, buffers, tensors)
    except Exception as error:  # whatever torch.func cannot map; the loop is compared all the same
        raise _NotPossible.because_of(error) from error
    after = {name: (param - rate * grads[name]).detach().numpy() for name, param in params.items()}
    states = [{name: array[k] for name, array in after.items()} for k in range(len(members))]
    return _tensors("float64, a step along torch.func.vmap(grad)", state.ensemble, states)


def _no_targets(ensemble: Ensemble, arrays: Any) -> jax.Array:
    held = bound(ensemble.network, arrays)
    axes = batch_axes(ensemble.network, held, each=True)
    return jnp.zeros((len(ensemble), rows_of(held, axes, ahead=1)))


def _tensors(stage: str, ensemble: Ensemble, states: Sequence[Mapping[str, np.ndarray]]) -> list[Row]:
    """The worst parameter and the worst buffer of those that `states` have."""
    found = {kind: errors_of(getattr(ensemble, kind), ensemble.origin, states) for kind in ("params", "buffers")}
    return [worst(stage, kind, errors, LIMIT) for kind, errors in found.items() if errors]


def _loss(outputs: Any, targets: jax.Array) -> jax.Array:
    """The mean square distance of the outputs from numbers that are no symmetry of theirs."""
    parts = [jnp.mean((leaf - weights(leaf.size, leaf.shape)) ** 2) for leaf in floats(outputs)]
    return sum(parts, start=jnp.zeros((), targets.dtype))


def _torch_loss(outputs: Any) -> Tensor:
    parts = [
        ((leaf - torch.from_numpy(weights(leaf.numel(), leaf.shape)).to(leaf)) ** 2).mean() for leaf in floats(outputs)
    ]
    return torch.stack(parts).sum()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> float:
    with torch.enable_grad():
        optimizer.zero_grad()
        loss = _torch_loss(reference.called(model, inputs))
        loss.backward()
        optimizer.step()
    return float(loss.detach())
