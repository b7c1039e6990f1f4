"""Gradients of every parameter, compared with autograd's."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import first_line
from jaxensemble.modules.state import Tree, flatten
from jaxensemble.network.weight_map import Origin
from torch_bridge.graph.forward import Inputs, call_model
from torch_bridge.graph.outputs import arrays_of
from torch_bridge.parity import precision
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.metrics import is_same_where_not_finite
from torch_bridge.parity.result import Row
from torch_bridge.parity.rounding import allowed_error, move_last_bits

LIMIT = 1e-11
"""Largest float64 error of a parameter's gradient, relative to the largest entry of this gradient."""

FLOOR = 1e-4
"""The part of a member's largest gradient with which errors of smaller gradients, sums that cancel, are compared."""

ZERO = 1e-13
"""The part of a member's largest gradient below which a gradient is zero except for rounding, on both sides.

The gradient of a bias before InstanceNorm is an example: its 14,000 terms leave 2e-15 of the largest gradient.
"""


ROUNDING = 1e-14
"""The part of the outputs over the parameters below which a gradient is zero except for rounding, on both sides.

It serves where all gradients are zero: a single number that is normalised gives 1 or -1. Outputs count as 1 at most, so
that the fill of a mask does not hide errors.
"""


def compare(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: Inputs, arrays: tuple[Any, ...], draws: Draws
) -> list[Row] | str:
    """Compares the gradients of all parameters of all members.

    **Arguments:** `arrays` are `inputs` as the ensemble takes them.

    **Returns:** one row, for the worst parameter of the worst member, or the reason why there is none.
    """
    assert isinstance(ensemble.origin, Origin)
    found = flatten(_gradients(ensemble, arrays, draws))
    ours = {name: np.conj(grad) for name, grad in found.items()}  # PyTorch's convention for complex gradients
    rows = []
    for k, model in enumerate(doubles):
        try:
            theirs, size = _torch_gradients(model, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # for example a forward that overwrites what its backward needs
            return f"gradients not compared, since PyTorch cannot compute them: {first_line(error)}"
        narrow = functools.cache(functools.partial(_single_gradients, model, inputs))
        largest = max((float(np.abs(grad).max(initial=0.0)) for grad in theirs.values()), default=0.0)
        for entry in ensemble.origin.weights.entries:
            key = next((key for key in entry.keys if key in theirs), None)
            if key is None or entry.path not in ours:
                continue
            error = _relative_error(
                ours[entry.path][k], entry.rearrangement.apply(theirs[key]), largest, ROUNDING * size
            )
            coarse = lambda key=key: max(_relative_error(grads[key], theirs[key], largest) for grads in narrow())  # noqa: B023, E731
            limit, remark = allowed_error(error, LIMIT, coarse)
            rows.append(Row("gradients, float64", "every parameter", error, limit, f"member {k}, {key}{remark}"))
    return [max(rows, key=lambda row: (row.error / row.limit, row.error))] if rows else []


Grads = dict[str, np.ndarray]


def _single_gradients(model: nn.Module, inputs: Inputs) -> list[Grads]:
    """The gradients in float32 of the model, and of a few nearly equal models: one alone may be right by chance."""
    found = []
    for models, given in itertools.chain([([model], inputs)], move_last_bits([model], inputs, torch.float32)):
        (narrow,), given = precision.single_copies(models, given)
        with precision.single_precision():
            found.append(_torch_gradients(narrow, given)[0])
    return found


def _relative_error(actual: np.ndarray, expected: np.ndarray, largest: float, rounding: float = 0.0) -> float:
    """The largest error relative to the largest entry, with small gradients compared as `FLOOR` and `ZERO` say."""
    if not is_same_where_not_finite(actual, expected):
        return np.inf
    finite = np.isfinite(expected)
    size = np.abs(expected[finite]).max(initial=0.0)
    if max(size, np.abs(actual[finite]).max(initial=0.0)) <= max(ZERO * largest, rounding):
        return 0.0
    difference = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    scale = max(size, FLOOR * largest)
    return float(difference / scale) if scale else float(difference)


def _gradients(ensemble: Ensemble, arrays: tuple[Any, ...], draws: Draws) -> Tree:
    """The gradients of the ensemble, `[M, ...]`, by path."""

    def objective(params: Tree) -> tuple[jax.Array, Any]:
        result = dataclasses.replace(ensemble, params=params)(*arrays, **draws.options)
        outputs = result[0] if draws else result
        total = sum(
            (jnp.sum(loss_weights(leaf[0].size, leaf.shape[1:]) * leaf) for leaf in float_leaves(outputs)),
            start=jnp.zeros(()),
        )
        return total, result

    grads, result = jax.jit(jax.grad(objective, has_aux=True))(ensemble.params)
    draws.outputs(result)
    return grads


def float_leaves(outputs: Any) -> list[Any]:
    """The arrays or tensors of real numbers among the outputs. A complex array gives its two parts."""
    found: list[Any] = []
    for leaf in arrays_of(outputs).values():
        name = str(leaf.dtype)
        found += [leaf.real, leaf.imag] if "complex" in name else [leaf] if "float" in name else []
    return found


def loss_weights(size: int, shape: Sequence[int]) -> np.ndarray:
    """Uneven weights for the entries of an output, so that their gradients do not cancel by symmetry."""
    return np.cos(np.arange(size, dtype=np.float64)).reshape(shape)


def _torch_gradients(model: nn.Module, inputs: Inputs) -> tuple[Grads, float]:
    """The gradients, and the sum of all outputs (each counts as 1 at most) over the largest parameter."""
    named = dict(model.named_parameters())
    params = list(named.values())
    with torch.enable_grad():
        for param in params:
            param.requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        leaves = float_leaves(call_model(model, inputs))
        for leaf in leaves:
            total = total + (leaf * torch.from_numpy(loss_weights(leaf.numel(), leaf.shape)).to(leaf)).sum()
        differs = total.requires_grad and params
        grads = torch.autograd.grad(total, params, allow_unused=True) if differs else [None] * len(params)
    precision.detach_computed_weights(model)
    found = {
        name: (torch.zeros_like(param) if grad is None else grad).detach().cpu().numpy()
        for (name, param), grad in zip(named.items(), grads, strict=True)
    }
    outputs = sum(float(leaf.detach().abs().clamp(max=1).nan_to_num().sum()) for leaf in leaves)
    largest = max((float(param.detach().abs().max()) for param in params if param.numel()), default=0.0)
    return found, outputs / largest if largest else 0.0
