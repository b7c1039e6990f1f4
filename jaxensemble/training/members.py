"""Computation of the members in a step: losses, gradients, and the optimizer's update."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxensemble.modules.state import Tree, flatten, unflatten
from jaxensemble.programs.forms import use_forms
from jaxensemble.programs.rows import Axes
from jaxensemble.running.members import KEPT, EnsembleCall, map_members
from jaxensemble.training.augmentation import Augment, augment_minibatch, augmentation_keys
from jaxensemble.training.data import count_rows, map_along_axes
from jaxensemble.training.losses import Loss, number_of
from jaxensemble.training.state import replace_trained


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One kind of training step, all of it known when it is compiled.

    - `call`: the call of the network on a minibatch. With `call.each`, every member has a minibatch of its own.
    - `axes`: the batch axis of every array of one member's minibatch, inputs first; `given`: of its data.
    - `own_data`, `own_rows`: whether data, and indices of rows, have a member axis.
    - `idle`: the parameters that the loss does not reach, for example behind `lax.stop_gradient`. PyTorch's optimizers
      skip them, decay included, so these parameters and their optimizer state stay as they are.
    - `augment`: the function that changes every member's minibatch.
    """

    call: EnsembleCall
    loss: Loss
    axes: Axes
    given: Axes
    own_data: bool
    own_rows: bool
    idle: frozenset[str] = frozenset()
    augment: Augment | None = None

    @property
    def over_rows(self) -> str | None:
        """The axis of the mesh over which the rows of a minibatch are; None where every device has all of them."""
        return None if self.call.placement is None else self.call.placement.over_rows

    def minibatch(self, data: Any, rows: Any, keys: Any) -> Any:
        """Returns the minibatch of a step: `[N, ...]`, or `[m, N, ...]` where each of m members has its own."""

        def one(data: Any, rows: Any, key: Any) -> Any:
            taken = map_along_axes(
                data, self.given, lambda leaf, axis: leaf if rows is None else jnp.take(leaf, rows, axis)
            )
            return taken if self.augment is None else augment_minibatch(self.augment, key, taken)

        if not self.call.each:
            return one(data, rows, None)
        return jax.vmap(one, (0 if self.own_data else None, 0 if self.own_rows else None, 0))(data, rows, keys)


@dataclasses.dataclass(frozen=True)
class MemberUpdate:
    """Update of `size` members in one step, with the arrays that all of them share."""

    step: TrainingStep
    optimizer: optax.GradientTransformation
    constants: Tree
    steps: jax.Array
    common: tuple[Any, Any]  # data and rows
    size: int

    def __call__(self, part: Any) -> tuple[Any, jax.Array]:
        """Returns parameters, buffers and optimizer states after the step, and the losses before it."""
        (params, buffers, opt_state), everything, rngs, keys, rates, (data, rows) = part
        changing = augmentation_keys(keys, self.steps)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, self.steps)
        over_rows = self.step.over_rows
        if over_rows is not None:  # every part of the minibatch draws numbers of its own
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, lax.axis_index(over_rows))
        common_data, common_rows = self.common
        rows = common_rows if rows is None else rows
        data = self.step.minibatch(common_data if data is None else data, rows, changing)

        def objective(params: Tree, keys: jax.Array, data: Any) -> tuple[jax.Array, Any]:
            held = unflatten(flatten(buffers) | rates)
            losses, after = self.losses(replace_trained(everything, params), held, rngs, keys, data)
            after = unflatten({name: leaf for name, leaf in flatten(after).items() if name not in rates})
            return losses.sum(), (losses, after)

        grads, (losses, buffers) = self._gradients(jax.grad(objective, has_aux=True), params, keys, data)
        if over_rows is not None:
            grads, losses = lax.pmean((grads, losses), over_rows)
        ascent = jax.tree.map(
            jnp.conj, grads
        )  # for complex numbers, `jax.grad` gives the conjugate of the direction of ascent
        updates, held = jax.vmap(self.optimizer.update)(ascent, opt_state, params)
        after = optax.apply_updates(params, updates)
        idle = self.step.idle
        return (_keep_idle(idle, after, params), buffers, _keep_idle(idle, held, opt_state)), losses

    def losses(self, *arguments: Any) -> tuple[jax.Array, Any]:
        """Returns the loss of every member, and its buffers after the call."""
        axes, platform = (0, 0, 0, 0, 0 if self.step.call.each else None), self.step.call.platform
        by_eigen = self.step.call.plan.compiler == "eigen" and self.size == 1
        one = use_forms(self._loss, platform, "loss by eigen" if by_eigen else "loss")
        function = use_forms(map_members(one, axes, self.size), platform, "all members")
        if self.step.call.plan.remat:
            function = jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
        return function(*arguments)

    def _loss(self, params: Tree, buffers: Tree, rngs: Tree, key: Any, data: Any) -> tuple[jax.Array, Any]:
        inputs, targets = data
        outputs, after = self.step.call.member(params, buffers, rngs, self.constants, key, inputs, vmapped=None)
        return number_of(self.step.loss, outputs, targets), after

    def _gradients(self, gradient: Callable[..., Any], params: Tree, keys: jax.Array, data: Any) -> Any:
        """Returns gradients, losses and buffers of a minibatch: at once, or as means over parts of a few rows."""
        size, ahead = self.step.call.plan.rows, int(self.step.call.each)
        if size is None:
            return gradient(params, keys, data)

        def part(k: Any, count: int) -> tuple[Any, Any]:
            rows = lambda leaf, axis: lax.dynamic_slice_in_dim(leaf, k * size, count, axis)  # noqa: E731
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            grads, (losses, buffers) = gradient(params, own, map_along_axes(data, self.step.axes, rows, ahead))
            return jax.tree.map(lambda mean: mean * (count / total), (grads, losses)), buffers

        def body(k: Any, found: Any) -> Any:
            more, buffers = part(k, size)
            return jax.tree.map(jnp.add, found[0], more), buffers

        total = count_rows(data, self.step.axes, ahead)
        sums, buffers = lax.fori_loop(1, total // size, body, part(0, size))
        if total % size:
            more, buffers = part(total // size, total % size)
            sums = jax.tree.map(jnp.add, sums, more)
        grads, losses = sums
        return grads, (losses, buffers)


def _keep_idle(names: Collection[str], after: Any, before: Any) -> Any:
    """Returns the arrays of a tree after a step, except those of the named parameters, which stay as before."""

    def chosen(path: Sequence[Any], new: Any, old: Any) -> Any:
        named = lambda key: isinstance(key, jax.tree_util.DictKey)  # noqa: E731
        keys = itertools.takewhile(named, itertools.dropwhile(lambda key: not named(key), reversed(path)))
        return old if ".".join(str(key.key) for key in reversed([*keys])) in names else new

    return jax.tree_util.tree_map_with_path(chosen, after, before) if names else after
