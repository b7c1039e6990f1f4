"""`fit`: epochs of training steps, with a validation set, early stopping and checkpoints."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxensemble.devices.placement import is_in_this_process
from jaxensemble.errors import InputError
from jaxensemble.running.plan import Plan, is_size
from jaxensemble.training.augmentation import Augment, check_augment
from jaxensemble.training.callbacks import Callback, check_callbacks, check_signature, run_callbacks
from jaxensemble.training.checkpoints import Checkpoints
from jaxensemble.training.data import as_data
from jaxensemble.training.history import History
from jaxensemble.training.identity import data_identity, state_identity, surroundings
from jaxensemble.training.losses import Loss, check_function
from jaxensemble.training.measures import measure_members, measures_identity
from jaxensemble.training.minibatches import Batches, Rows, Shuffle, StepSettings
from jaxensemble.training.progress import show_progress
from jaxensemble.training.run import Best, TrainingRun
from jaxensemble.training.state import TrainState
from jaxensemble.training.step import check_state


def fit(
    state: TrainState,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss,
    epochs: int,
    batch: int | None = None,
    shuffle: Shuffle | None = None,
    bootstrap: bool = False,
    augment: Augment | None = None,
    validation: tuple[Any, Any] | None = None,
    metrics: Mapping[str, Loss] | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: str | Path | None = None,
    plan: Plan | None = None,
    progress: bool = True,
) -> tuple[TrainState, History]:
    """Trains all members for some epochs.

    **Arguments:**

    - `inputs`, `targets`, `loss`, `plan`: as for [`train_step`][jaxensemble.train_step]; all members learn from the
      same data. `batch` rows make a step; the last step of an epoch has the remaining rows. Instead of inputs, targets
      and `batch`, `inputs` may be a function of the epoch's number, from 0, which returns an iterable of minibatches,
      each a pair of inputs and targets. A run goes on to the same bits if the same number gives the same minibatches.
      A run that goes on from a checkpoint draws the first minibatch of epoch 0 again, to compare it.
    - `shuffle`: whether every member has an order of its own ("different", the default), all have the "same" one, or
      the rows are "never" shuffled.
    - `bootstrap`: whether every member has a sample of its own, of as many rows, drawn once with replacement. Members
      that draw the same numbers (`randomness="same"`) have the same order and sample.
    - `augment`: a function of a random key and a minibatch, `(inputs, targets)`, which returns a minibatch that the
      network and the loss take: crops, flips, noise, mixtures of rows. It is part of the compiled step. It gets the
      minibatch of one member, with a single input bare, and a different key for every member and step.
    - `validation`: inputs and targets on which the members, in evaluation mode, are measured after every epoch: the
      `loss`, and `metrics`, functions of the same kind by name.
    - `patience`: a member stops after so many epochs in which its validation loss did not fall below its least.
      Training ends when all members have stopped. Then every member, with its optimizer's state, is as it was after its
      best epoch; a member whose validation loss never was a number is as it was at the beginning.
    - `callbacks`: functions that are called after every epoch as `callback(epoch, state, history)`; any of them stops
      the training by returning True. `epoch` counts from 0, as the rows of `history` do. `state` is the state after
      that epoch, and `state.ensemble` predicts. The checkpoint is written afterwards: if a run is killed within a
      callback, the epoch is repeated.
    - `checkpoints`: a directory, written after every epoch by orbax (`pip install 'jaxensemble[train]'`). A run that
      finds a checkpoint there goes on from it, to the same bits as a run that was never stopped, and under the same
      plan unless `plan` names another. It must begin as that run did: with the same state, data, arguments, network,
      loss, optimizer, and the same version and precision of JAX. A run that a callback stopped stays stopped if there
      are callbacks. Numbers and flags that the loss and the optimizer hold are written too, to say how runs differ;
      strings are not. Functions that call Python from within JAX (`jax.pure_callback`) cannot be compared, and are
      refused. Where members are in several processes, all call `fit` with the same arguments and a directory that
      all have; a run may go on in fewer of them, or in more. An interruption (Ctrl-C) raises a `KeyboardInterrupt` that
      says where the last checkpoint is.
    - `progress`: whether standard error shows how far the training is: a bar on a terminal; elsewhere a line of plain
      text for each epoch, at most one a second.

    **Returns:** the state after the last epoch, or the best one with `patience`, and the history.

    **Raises:** `InputError` for arguments that do not fit, and for checkpoints of another run, or of more epochs.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from flax import nnx
    >>> from jaxensemble import Ensemble
    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 1, rngs=nnx.Rngs(seed)) for seed in range(4)])
    >>> state = TrainState.create(ensemble, optax.adam(0.1), jax.random.key(0))
    >>> x = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")
    >>> def loss(outputs, targets):
    ...     return jnp.mean((outputs - targets) ** 2)
    >>> state, history = fit(state, x, x.sum(1, keepdims=True), loss=loss, epochs=20, batch=10)
    >>> history.loss.shape, bool((history.loss[-1] < 1e-3).all())
    ((20, 4), True)

    A callback that stops the training when the loss of all members is small:

    >>> def small(epoch, state, history):
    ...     return history.loss[epoch].max() < 0.01
    >>> state = TrainState.create(ensemble, optax.adam(0.1), jax.random.key(0))
    >>> _, history = fit(state, x, x.sum(1, keepdims=True), loss=loss, epochs=100, batch=10, callbacks=[small])
    >>> len(history) < 100, bool(history.loss[-1].max() < 0.01)
    (True, True)
    """
    check_state(state)
    check_function(loss, "loss")
    check_callbacks(callbacks)
    check_augment(augment)
    wrong = _data_problems(inputs, targets, batch, shuffle, bootstrap)
    _check_arguments(wrong, epochs, patience, validation, metrics)
    common = StepSettings(loss, augment, plan)
    if callable(inputs):
        check_signature(inputs, "the function that gives the minibatches of an epoch", "epoch")
        source: Rows | Batches = Batches(state, inputs, common)
    else:
        data, _ = as_data(state.ensemble, inputs, targets, changed=augment is not None)
        shuffle = shuffle or "different"
        source = Rows(state, data, common, batch=batch or 0, shuffle=shuffle, bootstrap=bootstrap)
    streamed = plan if isinstance(plan, Plan) and plan.offload else None  # measures need as little memory as steps
    validation = None if validation is None else as_data(state.ensemble, *validation)[0]
    functions = {"loss": loss, **(metrics or {})}
    run = TrainingRun(state, None if patience is None else Best.of(state), History(np.zeros((0, len(state.ensemble)))))
    settings: dict[str, Any] = {"batch": batch, "shuffle": shuffle, "bootstrap": bootstrap, "patience": patience}
    if checkpoints is not None:
        settings |= surroundings(state) | state_identity(state) | source.identity(state)
        if validation:
            settings["the validation set"] = data_identity(*validation)
            settings |= measures_identity(state.ensemble, validation, functions, source.batch)
    interruption = None
    with _open_checkpoints(checkpoints, settings) as files, show_progress(progress, epochs) as show:
        try:
            run, plans = (run, {}) if files is None else _resume_run(run, files, epochs, bool(callbacks))
            source.begin(state, plans)
            show(run.history)
            while run.epoch < epochs and run.goes_on:
                after, losses = source.epoch(run.epoch, run.state, run.active)
                measured = (
                    measure_members(after.ensemble, validation, functions, source.batch, streamed) if validation else {}
                )
                following = run.after(after, losses.mean(axis=0), measured, patience)
                stopped = run_callbacks(callbacks, following.state, following.history)
                following = dataclasses.replace(following, stopped=stopped)
                if files is not None:
                    _save_run(following, files, source.plans)
                run = following  # nothing is kept of an interrupted epoch
                show(run.history)
                _warn_of_lost_members(run.history)
        except KeyboardInterrupt:
            interruption = _interruption_message(run, files, source.plans, epochs)
    if interruption is not None:  # raised outside the handler, without a traceback through JAX
        raise KeyboardInterrupt(interruption)
    return run.final_state(), run.history


def _warn_of_lost_members(history: History) -> None:
    """Warns once of members whose loss is no longer finite."""
    finite = np.isfinite(history.loss)
    lost = np.flatnonzero(~finite[-1] & finite[:-1].all(axis=0))
    if lost.size:
        members = ", ".join(map(str, lost))
        warnings.warn(f"in epoch {len(history)} the loss of member {members} is no longer finite", stacklevel=3)


def _resume_run(
    run: TrainingRun, files: Checkpoints, epochs: int, stops: bool
) -> tuple[TrainingRun, Mapping[str, Any]]:
    """Returns the run up to its latest checkpoint, and the plans of its steps.

    `stops`: whether there are callbacks; without them, a run that a callback stopped goes on.

    **Raises:** `InputError` for a run of more than `epochs` epochs.
    """
    found = files.latest(_map_members(run, "cut"))
    if found is None:
        return run, {}
    (state, best), record = found
    state, best = _map_members(TrainingRun(state, best, run.history), "place")
    history = History.from_json(record["history"]) if record["history"]["loss"] else run.history
    if len(history) > epochs:
        raise InputError(
            f"{files.path} holds a run of {len(history)} epochs already, and `epochs` is {epochs}: give "
            f"epochs={len(history)} to take that run, more epochs to go on from it, or another directory to train again"
        )
    state = state.trained_from(run.state)
    return TrainingRun(state, best, history, record["stopped"] and stops), record["plans"]


def _save_run(run: TrainingRun, files: Checkpoints, plans: Mapping[str, Any]) -> None:
    record = {"history": run.history.to_json(), "plans": plans, "stopped": run.stopped}
    files.save(run.epoch, _map_members(run, "cut"), record)


def _map_members(run: TrainingRun, name: Literal["cut", "place"]) -> tuple[TrainState, Best | None]:
    """Returns state and best members of a run without the copies that fill a mesh, or in their places with these.

    A checkpoint has none of them, so that a run may go on with another number of devices.
    """
    placement = run.state.ensemble.placement
    if placement is None:
        return run.state, run.best
    function = getattr(placement, name)
    return run.state.map_members(function), run.best and run.best.map_members(function)


def _interruption_message(run: TrainingRun, files: Checkpoints | None, plans: Mapping[str, Any], epochs: int) -> str:
    """Returns a text that says what is kept of an interrupted run. Writes the first checkpoint if there is none."""
    if files is None:
        return (
            f"training was interrupted after {run.epoch} of {epochs} epochs. Nothing is kept of them. With a "
            "directory as `checkpoints`, the same call would go on from there"
        )
    if files.epoch() is None and not is_in_this_process(run.state):  # nothing says that all processes are here
        return f"training was interrupted after {run.epoch} of {epochs} epochs, before the first checkpoint"
    if files.epoch() is None:
        _save_run(run, files, plans)
    epoch = files.epoch()
    return (
        f"training was interrupted after {epoch} of {epochs} epochs. {files.path / str(epoch)} is the checkpoint: the "
        "same call of `fit` goes on from there"
    )


@contextlib.contextmanager
def _open_checkpoints(path: str | Path | None, settings: Mapping[str, Any]) -> Iterator[Checkpoints | None]:
    """Opens the checkpoints of a run with these settings; None without a path."""
    if path is None:
        yield None
        return
    files = Checkpoints(path, settings)
    try:
        yield files
    finally:
        files.close()


def _data_problems(inputs: Any, targets: Any, batch: Any, shuffle: Any, bootstrap: bool) -> list[str]:
    """Returns the problems of the arguments that say how minibatches are made."""
    if callable(inputs):
        given = {"targets": targets, "batch": batch, "shuffle": shuffle, "bootstrap": bootstrap or None}
        names = [f"`{name}`" for name, value in given.items() if value is not None]
        return [f"{', '.join(names)} cannot be given with a function that gives the minibatches"] if names else []
    wrong = []
    if batch is None or not is_size(batch):
        wrong.append(f"`batch` must be a positive integer; got {batch!r}")
    if shuffle not in (None, "different", "same", "never"):
        wrong.append(f"`shuffle` must be 'different', 'same' or 'never'; got {shuffle!r}")
    if targets is None:
        wrong.append(
            "`targets` are missing; minibatches, for example of a DataLoader, are given by a function of the epoch: "
            "fit(state, lambda epoch: loader, ...)"
        )
    return wrong


def _check_arguments(
    wrong: list[str], epochs: int, patience: int | None, validation: Any, metrics: Mapping[str, Loss] | None
) -> None:
    """Checks the arguments of `fit`.

    **Raises:** `InputError` with all problems at once.
    """
    if epochs is None or not is_size(epochs):
        wrong = [f"`epochs` must be a positive integer; got {epochs!r}", *wrong]
    if not is_size(patience):
        wrong.append(f"`patience` must be a positive integer; got {patience!r}")
    if validation is None and (patience is not None or metrics):
        wrong.append("`patience` and `metrics` need `validation`, a pair of inputs and targets")
    if validation is not None and not (isinstance(validation, tuple) and len(validation) == 2):
        wrong.append("`validation` must be a pair of inputs and targets")
    if metrics is not None and not isinstance(metrics, Mapping):
        wrong.append(
            f"`metrics` must be functions by name, such as {{'accuracy': accuracy}}; got {type(metrics).__name__}"
        )
    elif "loss" in (metrics or {}):
        wrong.append("`metrics` must not have the name 'loss'")
    if wrong:
        raise InputError("; ".join(wrong))
    for name, function in (metrics or {}).items():
        check_function(function, f"metrics[{name!r}]")
