"""The minibatches of an epoch, and the steps that are made with them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.errors import InputError
from jaxensemble.inputs import batch_axes
from jaxensemble.plan import Plan
from jaxensemble.training.data import rows_of
from jaxensemble.training.losses import Loss
from jaxensemble.training.state import TrainState
from jaxensemble.training.step import Step, programs_of, step_for, stepped_through

Shuffle = Literal["different", "same", "never"]

_SHUFFLE, _BOOTSTRAP = 2**32 - 1, 2**32 - 2
"""What is folded into a member's key, where steps fold in their number."""

_LONGEST = 100
"""Steps of one program at most: while it runs, no interruption is heard."""


class Rows:
    """Minibatches of rows of arrays, in an order that keys give.

    `plans` are those of its steps, by the number of rows; before the first epoch, those of an earlier run.
    """

    def __init__(
        self,
        state: TrainState,
        data: Any,
        *,
        loss: Loss,
        batch: int,
        shuffle: Shuffle,
        bootstrap: bool,
        plan: Plan | None,
    ):
        self.data, self.loss, self.batch, self.plan = data, loss, batch, plan
        rows = rows_of(data, batch_axes(state.ensemble.network, data[0], each=False))
        self._ordered = functools.partial(_order, rows=rows, shuffle=shuffle, bootstrap=bootstrap)
        self.plans: dict[str, Any] = {}
        self._order = np.asarray(self._ordered(state.keys, state.steps))

    def programs(self, state: TrainState) -> dict[str, str]:
        """Hashes of what the steps compute."""
        return programs_of(state, self.data, self._order[..., : self.batch], self.loss)

    def begin(self, state: TrainState, plans: Mapping[str, Any]) -> None:
        """Makes the steps for a whole minibatch and for what is left of the rows, under the plans of an earlier run."""
        rows, self._steps = self._order.shape[-1], dict[int, Step]()
        for size in dict.fromkeys(size for size in (min(self.batch, rows), rows % self.batch) if size):
            before = Plan(**plans[str(size)]) if str(size) in plans else None
            try:
                self._steps[size] = step_for(
                    state, self.data, self._order[..., :size], self.loss, each=False, plan=self.plan or before
                )
            except InputError as error:
                if not self._steps:
                    raise
                raise InputError(
                    f"`batch` leaves {size} of {rows} rows for the last minibatch of an epoch, on which the network "
                    f"cannot train: choose another, or leave rows out. {error.details}"
                ) from error
        self.plans = {str(size): dataclasses.asdict(step.call.plan) for size, step in self._steps.items()}

    def epoch(self, number: int, state: TrainState, active: Any) -> tuple[TrainState, np.ndarray]:
        """The state after a step for every minibatch of an epoch, and the losses, `[S, M]`."""
        order = np.asarray(self._ordered(state.keys, state.steps))
        losses, first = [], 0
        for size, step in self._steps.items():
            count = (order.shape[-1] - first) // size
            rows = order[..., first : first + count * size].reshape(*order.shape[:-1], count, size)
            for part in np.array_split(np.moveaxis(rows, -2, 0), -(-count // _LONGEST)):
                state, found = stepped_through(state, self.data, part, active, step=step)
                losses.append(np.asarray(found, np.float64))
            first += count * size
        return state, np.concatenate(losses)


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
