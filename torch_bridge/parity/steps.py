"""Training steps: losses, gradients, parameters and buffers, compared with `torch.optim`."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError, first_line
from jaxensemble.network.arguments import bind_arguments
from jaxensemble.network.inputs import batch_axes
from jaxensemble.running.members import EnsembleCall
from jaxensemble.training import TrainState, train_step
from jaxensemble.training.data import count_rows
from torch_bridge.graph.forward import Inputs, call_model
from torch_bridge.optimizers import train_state
from torch_bridge.parity import reference
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.gradients import float_leaves, loss_weights
from torch_bridge.parity.inputs import stack_inputs
from torch_bridge.parity.metrics import normwise_error
from torch_bridge.parity.result import Row
from torch_bridge.parity.training import draw_alike, errors_of, tensor_arrays, worst_row

STEPS = 10

LIMIT = 1e-9
"""Largest float64 error after `STEPS` steps, relative to the largest number of the tensor: rounding errors grow."""

EPSILON = 1e-5
"""The `eps` of all optimizers.

PyTorch's default, 1e-8, magnifies by 1e8 the rounding in a gradient that is zero, for example of a bias before
BatchNorm.
"""

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda params: torch.optim.Adam(params, 1e-3, eps=EPSILON, weight_decay=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, 1e-3, eps=EPSILON, weight_decay=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 1e-4, eps=EPSILON, momentum=0.9, centered=True),
}


def compare(
    ensemble: Ensemble,
    doubles: Sequence[nn.Module],
    inputs: Sequence[Inputs],
    arrays: tuple[Any, ...],
    draws: Draws,
    optimizers: Mapping[str, Make] = OPTIMIZERS,
) -> tuple[list[Row], list[str]]:
    """Trains both sides with each optimizer.

    **Arguments:** `inputs` are the inputs of every member, `arrays` the same as the ensemble takes them. `draws` are
    those of evaluation mode.

    **Returns:** for each optimizer, the worst of losses, parameters and buffers; and notes on what was not compared.
    """
    ensemble, doubles, draws, notes = _training_pair(ensemble, doubles, inputs, arrays, draws)
    rows: list[Row] = []
    try:
        for name, make in optimizers.items():
            rows += _steps(name, make, ensemble, doubles, inputs, arrays, draws)
    except _NotPossible as error:
        return rows, [*notes, f"training not compared: {error}"]
    if draws:
        return rows, [*notes, "training not compared with torch.func, which draws other numbers"]
    try:
        return rows + _vmap_rows(ensemble, doubles, inputs, arrays), notes
    except _NotPossible as error:
        return rows, [*notes, f"training not compared with torch.func: {error}"]


def _training_pair(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: Sequence[Inputs], arrays: tuple[Any, ...], draws: Draws
) -> tuple[Ensemble, Sequence[nn.Module], Draws, list[str]]:
    """Both sides in training mode; or as they are, in evaluation mode, with a note that says why."""
    reason = ensemble.network.evaluation_only if ensemble.network is not None else None
    if reason is None:
        try:
            trained, models, alike = draw_alike(ensemble, doubles, inputs[0], arrays, draws.key, each=True)
            trained.each(*arrays, **alike.options)
        except (UnsupportedError, InputError) as error:  # draws within a recurrent layer, or BatchNorm of one value
            reason = first_line(error)
        else:
            return trained, [model.train() for model in models], alike, []
    return ensemble, doubles, draws, [f"trained in evaluation mode: {reason}"]


class _NotPossible(Exception):
    """An error of PyTorch itself. The text says why it cannot train."""

    @classmethod
    def from_error(cls, error: Exception) -> "_NotPossible":
        return cls(first_line(error))


def _steps(
    name: str,
    make: Make,
    ensemble: Ensemble,
    doubles: Sequence[nn.Module],
    inputs: Sequence[Inputs],
    arrays: tuple[Any, ...],
    draws: Draws,
) -> list[Row]:
    """The rows of one optimizer."""
    members = [copy.deepcopy(model).requires_grad_(True) for model in doubles]
    optimizers = [make(member.parameters()) for member in members]
    state = train_state(members, optimizers, ensemble, draws.key, train=False)
    ours, drawn = [], []
    for _ in range(STEPS):
        drawn.append(_next_draws(state, arrays) if draws else [])
        loss = _loss_without_draws if draws else _loss
        state, losses = train_step(state, arrays, _no_targets(ensemble, arrays), loss=loss, each=True)
        ours.append(losses)
    theirs: list[list[float]] = []
    try:
        for k, pair in enumerate(zip(members, optimizers, inputs, strict=True)):
            theirs.append([])
            for numbers in drawn:
                if draws:
                    draws.give(k, numbers)
                theirs[k].append(_step(*pair))
    except (RuntimeError, ValueError) as error:  # for example a forward that overwrites what its backward needs
        raise _NotPossible.from_error(error) from error
    stage = f"float64, {STEPS} steps of {name}"
    error, member = normwise_error(np.array(ours).T, np.array(theirs))
    rows = _tensors(stage, state.ensemble, tensor_arrays(members))
    return [Row(stage, "losses", error, LIMIT, f"member {member}"), *rows]


def _vmap_rows(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: Sequence[Inputs], arrays: tuple[Any, ...]
) -> list[Row]:
    """The rows of one step along the gradients that `torch.func` computes for all members at once."""
    rate = 1e-3
    members = [copy.deepcopy(model).requires_grad_(True) for model in doubles]
    optimizers = [torch.optim.SGD(member.parameters(), rate) for member in members]
    state = train_state(members, optimizers, ensemble, jax.random.key(0), train=False)
    state, _ = train_step(state, arrays, _no_targets(ensemble, arrays), loss=_loss, each=True)
    params, buffers = torch.func.stack_module_state(members)

    tensors, calling = reference.split_tensors(stack_inputs(inputs))

    def loss(params: Any, buffers: Any, tensors: Any) -> Tensor:
        return _torch_loss(torch.func.functional_call(members[0], (params, buffers), *calling(tensors)))

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # about torch.func's own code
            grads = torch.func.vmap(torch.func.grad(loss))(params, buffers, tensors)
    except Exception as error:  # torch.func may fail in any way; the loop is compared all the same
        raise _NotPossible.from_error(error) from error
    after = {name: (param - rate * grads[name]).detach().numpy() for name, param in params.items()}
    states = [{name: array[k] for name, array in after.items()} for k in range(len(members))]
    return _tensors("float64, a step along torch.func.vmap(grad)", state.ensemble, states)


def _next_draws(state: TrainState, arrays: tuple[Any, ...]) -> Sequence[jax.Array]:
    """The numbers that the members draw in the next step: arrays `[M, ...]`."""
    ensemble = state.ensemble
    call = EnsembleCall(ensemble.graphdef, next(iter(state.keys.devices())).platform)

    def member(params: Any, buffers: Any, rngs: Any, key: Any, inputs: Any) -> Any:
        return call.member(params, buffers, rngs, ensemble.constants, key, inputs, vmapped=None)

    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.steps)
    _, drawn = jax.jit(jax.vmap(member))(ensemble.params, ensemble.buffers, ensemble.rngs, keys, arrays)
    return drawn


def _no_targets(ensemble: Ensemble, arrays: tuple[Any, ...]) -> jax.Array:
    """Targets of zero, `[M, rows]`, which the losses here ignore."""
    held = bind_arguments(ensemble.network, arrays)
    axes = batch_axes(ensemble.network, held, each=True)
    return jnp.zeros((len(ensemble), count_rows(held, axes, ahead=1)))


def _tensors(stage: str, ensemble: Ensemble, states: Sequence[Mapping[str, np.ndarray]]) -> list[Row]:
    """Rows for the worst parameter and the worst buffer of those in `states`."""
    found = {kind: errors_of(getattr(ensemble, kind), ensemble.origin, states) for kind in ("params", "buffers")}
    return [worst_row(stage, kind, errors, LIMIT) for kind, errors in found.items() if errors]


def _loss(outputs: Any, targets: jax.Array) -> jax.Array:
    """The mean square distance of the outputs from numbers without symmetry."""
    parts = [jnp.mean((leaf - loss_weights(leaf.size, leaf.shape)) ** 2) for leaf in float_leaves(outputs)]
    return sum(parts, start=jnp.zeros((), targets.dtype))


def _loss_without_draws(result: Any, targets: jax.Array) -> jax.Array:
    outputs, _ = result
    return _loss(outputs, targets)


def _torch_loss(outputs: Any) -> Tensor:
    """The same loss in PyTorch."""
    parts = [
        ((leaf - torch.from_numpy(loss_weights(leaf.numel(), leaf.shape)).to(leaf)) ** 2).mean()
        for leaf in float_leaves(outputs)
    ]
    return torch.stack(parts).sum()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> float:
    """One training step of a PyTorch model. Returns the loss."""
    with torch.enable_grad():
        optimizer.zero_grad()
        loss = _torch_loss(call_model(model, inputs))
        loss.backward()
        optimizer.step()
    return float(loss.detach())
