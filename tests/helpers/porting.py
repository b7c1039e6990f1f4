"""Checks that ported modules give PyTorch's results, in float64, for several batch sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import torch_bridge
from jaxensemble.ensemble import Ensemble
from torch_bridge.graph.examples import BatchAxis
from torch_bridge.members.finite import has_fractions
from torch_bridge.parity import precision, training
from torch_bridge.parity.float64 import convert_to_float64
from torch_bridge.parity.gradients import float_leaves
from torch_bridge.parity.metrics import EXACT
from torch_bridge.porting.port import to_flax

TOLERANCE = 1e-12
"""Largest difference, relative to the largest value of the output: float64 rounding, and nothing else."""


class Fn(nn.Module):
    """A forward without weights; of several functions, a tuple of their results."""

    def __init__(self, *forwards: Callable[..., Any]):
        super().__init__()
        self.forwards = forwards

    def forward(self, *xs: Tensor) -> Any:
        results = [forward(*xs) for forward in self.forwards]
        return tuple(results) if len(results) > 1 else results[0]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Returns a float64 copy with random parameters and floating buffers: defaults (zeros, ones) hide errors."""
    generator = torch.Generator().manual_seed(seed)
    (model,) = precision.double_copies([model])
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5)
        for name, tensor in model.named_buffers():
            if has_fractions(tensor):
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)  # means around 0: no ReLU may die
    return model


def assert_ports(
    model: nn.Module,
    *inputs: Tensor,
    batch_axis: BatchAxis = 0,
    batches: Sequence[int] = (1, 3),
    randomise: bool = True,
    gradients: bool = True,
) -> Any:
    """Ports the model in evaluation mode and compares outputs (and gradients of inputs) with PyTorch's in float64.

    The batch sizes tried beyond the example's are `batches`, cut from or repeated along `batch_axis`. Returns the
    ported module.
    """
    model = randomised(model).eval() if randomise else precision.double_copies([model])[0]
    examples = precision.doubled(inputs)
    with jax.enable_x64(True):
        module = to_flax(model, examples, batch_axis=batch_axis)
        for size in (None, *(batches if isinstance(batch_axis, int) else ())):
            now = examples if size is None else tuple(_resized(x, size, examples[0], batch_axis) for x in examples)
            with torch.no_grad():
                expected = model(*now)
            assert_close(compiled(module)(*[x.numpy() for x in now]), expected)
        if gradients and all(map(has_fractions, examples)):
            assert_gradients(module, model, examples)
    return module


def compiled(module: Any) -> Callable[..., Any]:
    """Returns the module's call under `jax.jit`, which takes a tenth of the time of compiling each operation by itself.

    Dicts keep their order, which JAX's trees do not.
    """

    def call(*xs: Any) -> Any:
        specs = []

        def leaves(*xs: jax.Array) -> list[Any]:
            flat, spec = pytree.tree_flatten(module(*xs))
            specs.append(spec)
            return flat

        return pytree.tree_unflatten(jax.jit(leaves)(*xs), specs[0])

    return call


def _resized(x: Tensor, size: int, first: Tensor, axis: Any) -> Tensor:
    if x.ndim <= axis or x.shape[axis] != first.shape[axis]:
        return x
    index = torch.arange(size) % x.shape[axis]
    return x.index_select(axis, index) * (
        torch.arange(1, size + 1, dtype=x.dtype.to_real()).reshape([-1] + [1] * (x.ndim - 1))
        if has_fractions(x) and axis == 0
        else 1
    )


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compares trees of outputs leaf by leaf: structure, shape, dtype kind, positions of NaN and infinity, values."""
    if isinstance(expected, Tensor):
        want, got = expected.detach().resolve_conj().resolve_neg().numpy(), np.asarray(actual)
        assert got.shape == want.shape, f"expected shape {want.shape}, got {got.shape}"
        assert got.dtype.kind == want.dtype.kind, f"expected {want.dtype}, got {got.dtype}"
        if got.dtype.kind in "biu":
            np.testing.assert_array_equal(got, want)
            return
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        scale = np.abs(want[finite]).max(initial=0.0)
        error = np.abs(got[finite] - want[finite]).max(initial=0.0)
        assert error <= tolerance * max(scale, 1e-30), f"error {error:.3g} at scale {scale:.3g}"
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_close(actual[key], expected[key], tolerance)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tolerance)
    else:
        assert actual is expected or actual == expected


def assert_gradients(module: Any, model: nn.Module, examples: tuple[Tensor, ...]) -> None:
    """Compares the gradient of the sum of all outputs, both parts of complex ones, weighted unevenly, by every input.

    `jax.grad` gives the conjugates of PyTorch's.
    """
    tracked = tuple(x.clone().requires_grad_() for x in examples)
    leaves = float_leaves(model(*tracked))
    if not any(leaf.requires_grad for leaf in leaves):
        return
    torch.stack(
        [_weighted(leaf, torch.linspace(0.5, 1.5, leaf.numel(), dtype=torch.float64)) for leaf in leaves]
    ).sum().backward()

    def objective(*xs: jax.Array) -> jax.Array:
        outputs = float_leaves(module(*xs))
        return sum((_weighted(leaf, np.linspace(0.5, 1.5, leaf.size)) for leaf in outputs), start=jnp.zeros(()))

    grad = jax.jit(jax.grad(objective, argnums=tuple(range(len(examples)))))
    grads = grad(*[x.detach().numpy() for x in examples])
    for got, x in zip(grads, tracked, strict=True):
        assert_close(np.conj(got), torch.zeros_like(x) if x.grad is None else x.grad)


def _weighted(leaf: Any, weights: Any) -> Any:
    return (leaf.reshape(-1) * weights).sum()


def assert_trains(make: Callable[[], nn.Module], *inputs: Tensor, members: int = 2) -> Ensemble:
    """Ports an ensemble and compares a call in training mode: outputs, and buffers after the call.

    Random numbers are the same on both sides. Returns the ensemble, which `to_ensemble` has compared in evaluation.
    """
    models = [make().eval() for _ in range(members)]
    ensemble = torch_bridge.to_ensemble(models, inputs)
    assert ensemble.proof is not None
    assert ensemble.network.evaluation_only is None, ensemble.network.evaluation_only
    doubles, wide = precision.double_copies(models), precision.doubled(inputs)
    with jax.enable_x64(True), precision.double_precision():
        exact = convert_to_float64(ensemble, doubles[0], wide)
        rows = training.compare(exact, doubles, wide, wide, EXACT, jax.random.key(0))
    assert isinstance(rows, list), rows
    assert rows
    for row in rows:
        assert row.passed, row
    return ensemble
