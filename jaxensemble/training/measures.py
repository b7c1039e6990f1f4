"""The loss and metrics of members on a validation set."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxensemble.devices.placement import gather
from jaxensemble.ensemble import Ensemble
from jaxensemble.network.inputs import batch_axes
from jaxensemble.running.plan import Plan
from jaxensemble.training.data import count_rows, map_along_axes
from jaxensemble.training.identity import function_identity
from jaxensemble.training.losses import Loss, number_of


def measure_members(
    ensemble: Ensemble, data: Any, functions: Mapping[str, Loss], batch: int, plan: Plan | None = None
) -> dict[str, np.ndarray]:
    """Returns the means over all rows of functions of (outputs, targets), in evaluation mode: `[M]` each."""
    axes = (*batch_axes(ensemble.network, data[0], each=False), *[0] * len(jax.tree.leaves(data[1])))
    rows, ensemble = count_rows(data, axes), ensemble.eval()
    sums = dict.fromkeys(functions, np.zeros(len(ensemble)))
    for first in range(0, rows, batch):
        last = min(first + batch, rows)
        part = lambda leaf, axis: lax.slice_in_dim(leaf, first, last, axis=axis)  # noqa: B023, E731
        inputs, targets = map_along_axes(data, axes, part)
        outputs = ensemble(*inputs, plan=plan)
        for name, function in functions.items():
            found = np.asarray(gather(_measure(outputs, targets, function=function)), np.float64)
            sums[name] = sums[name] + found * (last - first) / rows
    return sums


def measures_identity(ensemble: Ensemble, data: Any, functions: Mapping[str, Loss], batch: int) -> dict[str, Any]:
    """Returns the identity of these functions for a first minibatch, as `measure_members` calls them."""
    axes = (*batch_axes(ensemble.network, data[0], each=False), *[0] * len(jax.tree.leaves(data[1])))
    part = lambda leaf, axis: lax.slice_in_dim(leaf, 0, min(batch, leaf.shape[axis]), axis=axis)  # noqa: E731
    inputs, targets = jax.eval_shape(lambda data: map_along_axes(data, axes, part), data)
    plain = dataclasses.replace(ensemble.eval(), plan=None)
    outputs = jax.eval_shape(lambda ensemble, inputs: ensemble(*inputs), plain, inputs)
    outputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), outputs)
    loss, *metrics = (function_identity(function, outputs, targets) for function in functions.values())
    names = [f"the metric {name}" for name in functions if name != "loss"]
    return {
        "the loss of the validation set": loss | {"kind": "derived", "parts": {}},
        **dict(zip(names, metrics, strict=True)),
    }


@functools.partial(jax.jit, static_argnames=("function",))
def _measure(outputs: Any, targets: Any, *, function: Loss) -> jax.Array:
    return jax.vmap(functools.partial(number_of, function), (0, None))(outputs, targets)
