"""Minibatches of an epoch, and the steps with them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.devices.placement import SHARED, gather
from jaxensemble.errors import InputError
from jaxensemble.running.plan import Plan
from jaxensemble.training.augmentation import Augment
from jaxensemble.training.data import as_data, count_input_rows, put_data
from jaxensemble.training.identity import data_identity, steps_identity
from jaxensemble.training.losses import Loss
from jaxensemble.training.members import TrainingStep
from jaxensemble.training.planning import make_step
from jaxensemble.training.state import TrainState
from jaxensemble.training.step import run_step, run_steps

Shuffle = Literal["different", "same", "never"]

_SHUFFLE, _BOOTSTRAP = 2**32 - 1, 2**32 - 2
"""Numbers that are folded into a member's key, where steps fold in their number."""

_LONGEST = 100
"""Most steps in one program. A running program cannot be interrupted."""


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Settings that all steps of a run share."""

    loss: Loss
    augment: Augment | None
    plan: Plan | None

    def step(self, state: TrainState, data: Any, rows: Any, before: Mapping[str, Any] | None) -> TrainingStep:
        """Returns the step for such data, under the plan `before` of an earlier run if no plan is given."""
        plan = self.plan or (None if before is None else Plan(**before))
        return make_step(state, data, rows, self.loss, each=False, plan=plan, augment=self.augment)


class Rows:
    """Minibatches of rows of arrays, in an order drawn from the members' keys.

    `plans` are the plans of the steps, by the number of rows.
    """

    def __init__(
        self, state: TrainState, data: Any, settings: StepSettings, *, batch: int, shuffle: Shuffle, bootstrap: bool
    ):
        # Rows are chosen by indices, so that every device of a mesh has all data.
        self.data, self.batch, self._settings = _everywhere(state, data), batch, settings
        rows = count_input_rows(state.ensemble, data[0])
        self._ordered = functools.partial(_epoch_order, rows=rows, shuffle=shuffle, bootstrap=bootstrap)
        self.plans: dict[str, Any] = {}
        self._order = self._numbers(state)

    def identity(self, state: TrainState) -> dict[str, Any]:
        """Returns the identity of the data and of the steps."""
        settings, rows = self._settings, self._order[..., : self.batch]
        steps = steps_identity(state, self.data, rows, settings.loss, settings.augment)
        return {"the data": data_identity(*self.data), **steps}

    def begin(self, state: TrainState, plans: Mapping[str, Any]) -> None:
        """Makes the steps for a whole minibatch and for the remaining rows, under the plans of an earlier run."""
        rows, self._steps = self._order.shape[-1], dict[int, TrainingStep]()
        for size in dict.fromkeys(size for size in (min(self.batch, rows), rows % self.batch) if size):
            try:
                order = self._order[..., :size]
                self._steps[size] = self._settings.step(state, self.data, order, plans.get(str(size)))
            except InputError as error:
                if not self._steps:
                    raise
                raise InputError(
                    f"`batch` leaves {size} of {rows} rows for the last minibatch of an epoch, on which the network "
                    f"cannot train: choose another `batch`, or leave rows out. {error.details}"
                ) from error
        self.plans = {str(size): dataclasses.asdict(step.call.plan) for size, step in self._steps.items()}

    def epoch(self, number: int, state: TrainState, active: Any) -> tuple[TrainState, np.ndarray]:
        """Returns the state after a step for every minibatch of an epoch, and the losses, `[S, M]`."""
        order = self._numbers(state)
        losses, first = [], 0
        for size, step in self._steps.items():
            count = (order.shape[-1] - first) // size
            rows = order[..., first : first + count * size].reshape(*order.shape[:-1], count, size)
            for part in np.array_split(np.moveaxis(rows, -2, 0), -(-count // _LONGEST)):
                state, found = run_steps(state, self.data, part, active, step=step)
                losses.append(_numbers_of(state, found))
            first += count * size
        return state, np.concatenate(losses)

    def _numbers(self, state: TrainState) -> np.ndarray:
        """Returns the order of the rows in the next epoch."""
        return np.asarray(gather(self._ordered(state.keys, state.steps)))


class Batches:
    """Minibatches that a function of the epoch's number gives.

    `plans` are the plans of the steps, by the shapes and dtypes of all arrays.
    """

    def __init__(self, state: TrainState, given: Callable[..., Any], settings: StepSettings):
        self._state, self._given, self._settings = state, given, settings
        self._steps: dict[str, TrainingStep] = {}
        self.plans: dict[str, Any] = {}
        self._begun: Iterator[Any] | None = None

    @functools.cached_property
    def data(self) -> Any:
        """The first minibatch of epoch 0, which the epoch then uses, so that a stream loses none."""
        minibatches = self._minibatches(0)
        first = next(minibatches)
        self._begun = itertools.chain([first], minibatches)
        return first

    @property
    def batch(self) -> int:
        """The number of rows of the first minibatch."""
        return count_input_rows(self._state.ensemble, self.data[0])

    def identity(self, state: TrainState) -> dict[str, Any]:
        """Returns the identity of the first minibatch and of the steps."""
        steps = steps_identity(state, self.data, None, self._settings.loss, self._settings.augment)
        return {"the first minibatch": data_identity(*self.data), **steps}

    def begin(self, state: TrainState, plans: Mapping[str, Any]) -> None:
        """Takes the plans of an earlier run."""
        self.plans = dict(plans)

    def epoch(self, number: int, state: TrainState, active: Any) -> tuple[TrainState, np.ndarray]:
        """Returns the state after a step for every minibatch of an epoch, and the losses, `[S, M]`."""
        losses: list[Any] = []
        for data in self._of_epoch(number):
            name = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(data))
            if name not in self._steps:
                self._steps[name] = self._settings.step(state, data, None, self.plans.get(name))
                self.plans[name] = dataclasses.asdict(self._steps[name].call.plan)
            placed, _ = put_data(state.ensemble, data, None, each=False)
            state, found = run_step(state, placed, None, active, step=self._steps[name])
            # Waits, so that at most two steps run at once.
            losses[-1:] = [_numbers_of(state, before) for before in losses[-1:]]
            losses.append(found)
        return state, np.stack([_numbers_of(state, found) for found in losses])

    def _of_epoch(self, number: int) -> Iterator[Any]:
        if number == 0 and self._begun is None:
            _ = self.data  # kept for `batch`, which is read after the epoch
        begun, self._begun = self._begun, None
        return begun if begun is not None and number == 0 else self._minibatches(number)

    def _minibatches(self, number: int) -> Iterator[Any]:
        """Yields the data of an epoch, minibatch by minibatch.

        **Raises:** `InputError` for an epoch without minibatches, and for a minibatch that is no pair.
        """
        given = self._given(number)
        if not isinstance(given, Iterable):
            raise InputError(f"the function of the epoch must give minibatches; got {type(given).__name__}")
        count = 0
        for count, pair in enumerate(given, 1):  # noqa: B007 - read below
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"a minibatch must be a pair, (inputs, targets); got {type(pair).__name__}")
            yield as_data(self._state.ensemble, *pair, changed=self._settings.augment is not None)[0]
        if not count:
            raise InputError(
                f"the function of the epoch gave no minibatches for epoch {number}: it must make new ones for every "
                "epoch, which a generator that was made once does not"
            )


def _everywhere(state: TrainState, data: Any) -> Any:
    placement = state.ensemble.placement
    return data if placement is None else placement.put(data, SHARED)


def _numbers_of(state: TrainState, losses: Any) -> np.ndarray:
    """Returns losses `[..., M]` on the host, in float64: those of the members, without those that fill the stack."""
    return np.asarray(gather(losses), np.float64)[..., : len(state.ensemble)]


@functools.partial(jax.jit, static_argnames=("rows", "shuffle", "bootstrap"))
def _epoch_order(keys: jax.Array, steps: jax.Array, *, rows: int, shuffle: Shuffle, bootstrap: bool) -> jax.Array:
    """Returns the order of the rows in an epoch: `[rows]`, or `[M, rows]` where members have their own.

    The order depends on the number of steps made before, so that a second run does not repeat the orders of the first.
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
