"""`fit`: epochs of training steps, with a validation set, early stopping and checkpoints."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import Progress

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.inputs import batch_axes
from jaxensemble.plan import Plan, is_size
from jaxensemble.training.checkpoints import Checkpoints
from jaxensemble.training.data import along, as_data, rows_of
from jaxensemble.training.fingerprint import digest, digest_of_function
from jaxensemble.training.history import History
from jaxensemble.training.losses import Loss, check_function, number_of
from jaxensemble.training.state import TrainState, of_members
from jaxensemble.training.step import Step, checked, programs_of, step_for, stepped_through

Shuffle = Literal["different", "same", "never"]

_SHUFFLE, _BOOTSTRAP = 2**32 - 1, 2**32 - 2
"""What is folded into a member's key, where steps fold in their number."""


def fit(
    state: TrainState,
    inputs: Any,
    targets: Any,
    *,
    loss: Loss,
    epochs: int,
    batch: int,
    shuffle: Shuffle = "different",
    bootstrap: bool = False,
    validation: tuple[Any, Any] | None = None,
    metrics: Mapping[str, Loss] | None = None,
    patience: int | None = None,
    checkpoints: str | Path | None = None,
    plan: Plan | None = None,
    progress: bool = True,
) -> tuple[TrainState, History]:
    """Trains all members for some epochs.

    **Arguments:**

    - `inputs`, `targets`, `loss`, `plan`: as for [`train_step`][jaxensemble.train_step]; all members learn from the
      same data. `batch` rows make a step; the last one of an epoch has what is left.
    - `shuffle`: whether every member has an order of its own, all have the same one, or the rows are never shuffled.
    - `bootstrap`: whether every member has a sample of its own, drawn once with replacement, of as many rows. Members
      that draw the same numbers (`randomness="same"`) have the same order and sample.
    - `validation`: inputs and targets on which the members, in evaluation mode, are measured after every epoch: the
      `loss`, and `metrics`, functions of the same kind by name.
    - `patience`: a member stops after so many epochs in which its validation loss did not fall below its least.
      Training ends when all have stopped, and every member is what it was after its best epoch, its optimizer's state,
      too; one whose validation loss never was a number is what it was at the beginning.
    - `checkpoints`: a directory, written after every epoch by orbax (`pip install 'jaxensemble[train]'`). A run that
      finds one there goes on from it, to the same bits as one that was never stopped, and under the same plan unless
      `plan` names another. It must begin as that one did: with the same state, data, arguments, network, loss,
      optimizer, and the same version and precision of JAX. One that finds more epochs than it is to make gives back
      what it finds.
    - `progress`: whether a terminal shows a bar.

    **Returns:** the state after the last epoch, or the best one with `patience`, and the history.

    **Raises:** `InputError` for arguments that do not fit, and for checkpoints of another run.

    >>> import optax
    >>> from flax import nnx
    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 1, rngs=nnx.Rngs(seed)) for seed in range(4)])
    >>> state = TrainState.create(ensemble, optax.adam(0.1), jax.random.key(0))
    >>> x = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")
    >>> def loss(outputs, targets):
    ...     return jnp.mean((outputs - targets) ** 2)
    >>> state, history = fit(state, x, x.sum(1, keepdims=True), loss=loss, epochs=20, batch=10)
    >>> history.loss.shape, bool((history.loss[-1] < 1e-3).all())
    ((20, 4), True)
    """
    checked(state)
    check_function(loss, "loss")
    _check(epochs, batch, shuffle, patience, validation, metrics)
    data, _ = as_data(state.ensemble, inputs, targets)
    validation = None if validation is None else as_data(state.ensemble, *validation)[0]
    rows = rows_of(data, batch_axes(state.ensemble.network, data[0], each=False))
    functions = {"loss": loss, **(metrics or {})}
    run = _Run(state, None if patience is None else _Best.of(state), History(np.zeros((0, len(state.ensemble)))))
    settings: dict[str, Any] = {"batch": batch, "shuffle": shuffle, "bootstrap": bootstrap, "patience": patience}
    begun = {"state": state, "data": data, "validation": validation}
    ordered = functools.partial(_order, rows=rows, shuffle=shuffle, bootstrap=bootstrap)
    order = np.asarray(ordered(state.keys, state.steps))
    if checkpoints is not None:
        programs = programs_of(state, data, order[..., :batch], loss)
        programs |= _measures_of(state.ensemble, validation, functions, batch) if validation else {}
        settings |= {"jax": jax.__version__, "frozen": sorted(state.frozen)}
        settings |= {f"program of {name}": found for name, found in programs.items()}
    with _opened(checkpoints, settings, begun) as files, _bar(progress, epochs) as told:
        run, plans = (run, {}) if files is None else _resumed(run, files)
        steps = _steps(state, data, order, batch, loss, plan, plans)
        plans = {str(size): dataclasses.asdict(step.call.plan) for size, step in steps.items()}
        while run.epoch < epochs and run.goes_on:
            told(run)
            order = np.asarray(ordered(run.state.keys, run.state.steps))
            after, losses = _epoch(run.state, data, order, run.active, steps)
            measured = _evaluated(after.ensemble, validation, functions, batch) if validation else {}
            run = run.after(after, losses.mean(axis=0), measured, patience)
            if files is not None:
                record = {"history": run.history.to_json(), "plans": plans}
                files.save(run.epoch, (run.state, run.best), record)
            _warn_of_lost(run.history)
        told(run)
    return run.finished(), run.history


_LONGEST = 100
"""Steps of one program at most: while it runs, no interruption is heard."""


def _epoch(
    state: TrainState, data: Any, order: np.ndarray, active: Any, steps: Mapping[int, Step]
) -> tuple[TrainState, np.ndarray]:
    """The state after a step for every minibatch of an epoch, and the losses, `[S, M]`; `steps` go by their sizes."""
    losses, first = [], 0
    for size, step in steps.items():
        count = (order.shape[-1] - first) // size
        rows = order[..., first : first + count * size].reshape(*order.shape[:-1], count, size)
        for part in np.array_split(np.moveaxis(rows, -2, 0), -(-count // _LONGEST)):
            state, found = stepped_through(state, data, part, active, step=step)
            losses.append(np.asarray(found, np.float64))
        first += count * size
    return state, np.concatenate(losses)


def _warn_of_lost(history: History) -> None:
    """Tells once of members whose loss is a finite number no more."""
    finite = np.isfinite(history.loss)
    lost = np.flatnonzero(~finite[-1] & finite[:-1].all(axis=0))
    if lost.size:
        members = ", ".join(map(str, lost))
        warnings.warn(f"in epoch {len(history)} the loss of member {members} is not finite any more", stacklevel=3)


def _steps(
    state: TrainState, data: Any, order: np.ndarray, batch: int, loss: Loss, plan: Plan | None, plans: Mapping[str, Any]
) -> dict[int, Step]:
    """The step for a whole minibatch, and for what is left of the rows, by size; under the plans of an earlier run."""
    rows, found = order.shape[-1], {}
    for size in dict.fromkeys(size for size in (min(batch, rows), rows % batch) if size):
        before = Plan(**plans[str(size)]) if str(size) in plans else None
        try:
            found[size] = step_for(state, data, order[..., :size], loss, each=False, plan=plan or before)
        except InputError as error:
            if not found:
                raise
            raise InputError(
                f"`batch` leaves {size} of {rows} rows for the last minibatch of an epoch, on which the network cannot "
                f"train: choose another, or leave rows out. {error.details}"
            ) from error
    return found


def _evaluated(ensemble: Ensemble, data: Any, functions: Mapping[str, Loss], batch: int) -> dict[str, np.ndarray]:
    """The mean over all rows of functions of (outputs, targets), for every member in evaluation mode: `[M]` each."""
    axes = (*batch_axes(ensemble.network, data[0], each=False), *[0] * len(jax.tree.leaves(data[1])))
    rows, ensemble = rows_of(data, axes), ensemble.eval()
    sums = dict.fromkeys(functions, np.zeros(len(ensemble)))
    for first in range(0, rows, batch):
        last = min(first + batch, rows)
        part = lambda leaf, axis: lax.slice_in_dim(leaf, first, last, axis=axis)  # noqa: B023, E731
        inputs, targets = along(data, axes, part)
        outputs = ensemble(*inputs)
        for name, function in functions.items():
            found = np.asarray(_of_members(outputs, targets, function=function), np.float64)
            sums[name] = sums[name] + found * (last - first) / rows
    return sums


def _measures_of(ensemble: Ensemble, data: Any, functions: Mapping[str, Loss], batch: int) -> dict[str, str]:
    """Hashes of what these functions compute of a first minibatch, as `_evaluated` calls them."""
    axes = (*batch_axes(ensemble.network, data[0], each=False), *[0] * len(jax.tree.leaves(data[1])))
    part = lambda leaf, axis: lax.slice_in_dim(leaf, 0, min(batch, leaf.shape[axis]), axis=axis)  # noqa: E731
    inputs, targets = jax.eval_shape(lambda data: along(data, axes, part), data)
    outputs = jax.eval_shape(lambda ensemble, inputs: ensemble(*inputs), ensemble.eval(), inputs)
    outputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), outputs)
    return {name: digest_of_function(function, outputs, targets) for name, function in functions.items()}


@functools.partial(jax.jit, static_argnames=("function",))
def _of_members(outputs: Any, targets: Any, *, function: Loss) -> jax.Array:
    return jax.vmap(functools.partial(number_of, function), (0, None))(outputs, targets)


@functools.partial(jax.jit, static_argnames=("rows", "shuffle", "bootstrap"))
def _order(keys: jax.Array, steps: jax.Array, *, rows: int, shuffle: Shuffle, bootstrap: bool) -> jax.Array:
    """The rows of an epoch in their order: `[rows]`, or `[M, rows]` where members have their own.

    It goes by the steps made before, so that one run after another does not repeat its orders.
    """

    def shuffled(key: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, _SHUFFLE), steps), rows)

    def sampled(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, _BOOTSTRAP), (rows,), 0, rows)

    if shuffle == "different":
        order = jax.vmap(shuffled)(keys)
    else:
        order = shuffled(keys[0]) if shuffle == "same" else jnp.arange(rows)
    if not bootstrap:
        return order
    return jax.vmap(lambda key, order: sampled(key)[order], (0, 0 if order.ndim == 2 else None))(keys, order)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loss", "waited", "active", "state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Best:
    """Every member as it was after its best epoch, how long ago that was, and whether it is trained still."""

    loss: jax.Array
    waited: jax.Array
    active: jax.Array
    state: TrainState

    @classmethod
    def of(cls, state: TrainState) -> "_Best":
        members = len(state.ensemble)
        dtype = jnp.result_type(float)
        return cls(jnp.full(members, jnp.inf, dtype), jnp.zeros(members, jnp.int32), jnp.ones(members, bool), state)

    @jax.jit
    def after(self, loss: jax.Array, state: TrainState, patience: Any) -> "_Best":
        """The same after an epoch with these losses."""
        better = self.active & (loss < self.loss)
        waited = jnp.where(better, 0, self.waited + self.active)
        now, then = ((s.ensemble.params, s.ensemble.buffers, s.opt_state) for s in (state, self.state))
        params, buffers, opt_state = of_members(better, now, then)
        ensemble = dataclasses.replace(state.ensemble, params=params, buffers=buffers)
        best = dataclasses.replace(state, ensemble=ensemble, opt_state=opt_state)
        return _Best(jnp.where(better, loss, self.loss), waited, self.active & (waited < patience), best)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run after some epochs."""

    state: TrainState
    best: _Best | None
    history: History

    @property
    def epoch(self) -> int:
        return len(self.history)

    @property
    def active(self) -> jax.Array | None:
        """Which members are trained, `[M]`; None for all."""
        return None if self.best is None else self.best.active

    @property
    def goes_on(self) -> bool:
        return self.active is None or bool(self.active.any())

    def after(self, state: TrainState, loss: np.ndarray, measured: dict[str, np.ndarray], patience: Any) -> "_Run":
        """The run one epoch later."""
        active = np.ones(len(loss), bool) if self.active is None else np.asarray(self.active)
        history = self.history.after(loss, measured, active)
        best = self.best and self.best.after(jnp.asarray(measured["loss"], self.best.loss.dtype), state, patience)
        return _Run(state, best, history)

    def finished(self) -> TrainState:
        """The state with every member as it was after its best epoch, if that is known."""
        return self.state if self.best is None else self.best.state


def _resumed(run: _Run, files: Checkpoints) -> tuple[_Run, Mapping[str, Any]]:
    """The run as far as it came, and the plans of its steps."""
    found = files.latest((run.state, run.best))
    if found is None:
        return run, {}
    (state, best), record = found
    return _Run(state, best, History.from_json(record["history"])), record["plans"]


@contextlib.contextmanager
def _opened(path: str | Path | None, settings: dict[str, Any], begun: dict[str, Any]) -> Iterator[Checkpoints | None]:
    """The checkpoints of a run with these settings, that began with these arrays."""
    if path is None:
        yield None
        return
    files = Checkpoints(path, settings | {name: digest(tree) for name, tree in begun.items()})
    try:
        yield files
    finally:
        files.close()


@contextlib.contextmanager
def _bar(shown: bool, epochs: int) -> Iterator[Callable[[_Run], None]]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task("training", total=epochs)

        def told(run: _Run) -> None:
            losses = f", loss {run.history.loss[-1].mean():.4g}" if run.epoch else ""
            progress.update(task, completed=run.epoch, description=f"epoch {run.epoch}{losses}")

        yield told


def _check(
    epochs: int, batch: int, shuffle: str, patience: int | None, validation: Any, metrics: Mapping[str, Loss] | None
) -> None:
    sizes = {"epochs": epochs, "batch": batch, "patience": 1 if patience is None else patience}
    wrong = [
        f"`{name}` must be a positive integer; got {size!r}"
        for name, size in sizes.items()
        if size is None or not is_size(size)
    ]
    if shuffle not in ("different", "same", "never"):
        wrong.append(f"`shuffle` must be 'different', 'same' or 'never'; got {shuffle!r}")
    if validation is None and (patience is not None or metrics):
        wrong.append("`patience` and `metrics` need `validation`, the inputs and targets they are measured on")
    if validation is not None and not (isinstance(validation, tuple) and len(validation) == 2):
        wrong.append("`validation` must be a pair of inputs and targets")
    if metrics is not None and not isinstance(metrics, Mapping):
        wrong.append(f"`metrics` must be functions by name, as {{'accuracy': accuracy}}; got {type(metrics).__name__}")
    elif "loss" in (metrics or {}):
        wrong.append("`metrics` cannot have one by the name 'loss'")
    if wrong:
        raise InputError("; ".join(wrong))
    for name, function in (metrics or {}).items():
        check_function(function, f"metrics[{name!r}]")
