"""Run of `fit` after some epochs, and every member as it was after its best epoch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.devices.placement import gather
from jaxensemble.training.history import History
from jaxensemble.training.state import TrainState, select_members


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loss", "waited", "active", "state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Best:
    """Every member as it was after its best epoch, the epochs since then, and whether it is still trained."""

    loss: jax.Array
    waited: jax.Array
    active: jax.Array
    state: TrainState

    @classmethod
    def of(cls, state: TrainState) -> "Best":
        members, slots, dtype = len(state.ensemble), state.keys.shape[0], jnp.result_type(float)
        loss, waited, active = jnp.full(slots, jnp.inf, dtype), jnp.zeros(slots, jnp.int32), jnp.arange(slots) < members
        loss, waited, active = _put_beside(state, (loss, waited, active))
        return cls(loss, waited, active, state)

    def map_members(self, function: Callable[[Any], Any]) -> "Best":
        """Returns the best members with a function of trees applied to the arrays that begin with members."""
        loss, waited, active = function((self.loss, self.waited, self.active))
        return Best(loss, waited, active, self.state.map_members(function))

    @jax.jit
    def after(self, loss: jax.Array, state: TrainState, patience: Any) -> "Best":
        """Returns the best members after another epoch, with these losses."""
        better = self.active & (loss < self.loss)
        waited = jnp.where(better, 0, self.waited + self.active)
        now, then = ((s.ensemble.params, s.ensemble.buffers, s.opt_state) for s in (state, self.state))
        params, buffers, opt_state = select_members(better, now, then)
        ensemble = dataclasses.replace(state.ensemble, params=params, buffers=buffers)
        best = dataclasses.replace(state, ensemble=ensemble, opt_state=opt_state)
        return Best(jnp.where(better, loss, self.loss), waited, self.active & (waited < patience), best)


def _put_beside(state: TrainState, tree: Any) -> Any:
    """Returns arrays `[slots]` where the members of a state are."""
    placement = state.ensemble.placement
    if placement is not None:
        return placement.put(tree, placement.stacked)
    return jax.device_put(tree, state.keys.sharding) if state.keys.committed else tree


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Run after some epochs. `stopped`: whether a callback has stopped it."""

    state: TrainState
    best: Best | None
    history: History
    stopped: bool = False

    @property
    def epoch(self) -> int:
        return len(self.history)

    @property
    def active(self) -> jax.Array | None:
        """The members that are still trained, as booleans `[M]`; None for all."""
        return None if self.best is None else self.best.active

    @property
    def goes_on(self) -> bool:
        return not self.stopped and (self.active is None or bool(gather(self.active).any()))

    def after(
        self, state: TrainState, loss: np.ndarray, measured: dict[str, np.ndarray], patience: Any
    ) -> "TrainingRun":
        """Returns the run one epoch later."""
        active = np.ones(len(loss), bool) if self.active is None else np.asarray(gather(self.active))[: len(loss)]
        history = self.history.after(loss, measured, active)
        best = self.best and self.best.after(self._losses(measured["loss"], self.best.loss.dtype), state, patience)
        return TrainingRun(state.trained_from(self.state), best, history)

    def _losses(self, found: np.ndarray, dtype: Any) -> jax.Array:
        """Returns losses `[M]` where the members are."""
        placement, losses = self.state.ensemble.placement, jnp.asarray(found, dtype)
        return _put_beside(self.state, losses if placement is None else placement.fill(losses))

    def final_state(self) -> TrainState:
        """Returns the state, with every member as it was after its best epoch if that is recorded."""
        return self.state if self.best is None else self.best.state.trained_from(self.state)
