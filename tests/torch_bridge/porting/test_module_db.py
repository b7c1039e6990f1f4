"""PyTorch's own module database: every sample of every module in float64, in evaluation mode, exact or refused.

The first two distinct samples of each module by default, all of them among the slow tests.
"""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import assert_close, compiled
from torch_bridge.graph.settings import disable_fast_paths
from torch_bridge.porting.port import to_flax

# Warnings of PyTorch about options of its own samples.
pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
]

ENTRIES = {entry.name: entry for entry in module_db}

REFUSED = {
    # Windows are drawn at random, in evaluation mode too.
    "nn.FractionalMaxPool2d": "draws its windows at random",
    "nn.FractionalMaxPool3d": "draws its windows at random",
    # It looks at the values of the variance, and raises if one is negative.
    "nn.GaussianNLLLoss": r"torch\.export cannot follow",
    # The shape of its kernel's second result depends on the lengths, which are values.
    "nn.CTCLoss": r"torch\.export cannot follow",
    # Traced with another shape than it has.
    "nn.MultiLabelMarginLoss": "a different result shape",
}
"""Modules that are refused, and what the error says."""


class Fixed(nn.Module):
    """A module with all arguments fixed that are no tensors."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.module = module
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.given = [isinstance(leaf, Tensor) for leaf in leaves]
        self.fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Any:
        queue = iter(tensors)
        leaves = [next(queue) if given else fixed for given, fixed in zip(self.given, self.fixed, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


Sample = tuple[nn.Module, tuple[Tensor, ...]]


def samples(name: str) -> Iterator[Sample]:
    """The module's samples, and the tensors that each is called with."""
    entry: Any = ENTRIES[name]
    inputs = entry.module_inputs_func(entry, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
    seen = set()
    for sample in inputs:
        made, given = sample.constructor_input, sample.forward_input
        tensors = tuple(leaf for leaf in pytree.tree_leaves((given.args, given.kwargs)) if isinstance(leaf, Tensor))
        key = str((made.args, made.kwargs, [tuple(tensor.shape) for tensor in tensors], list(given.kwargs)))
        if key in seen:
            continue
        seen.add(key)
        torch.manual_seed(0)
        module = entry.module_cls(*made.args, **made.kwargs).double().eval()
        yield Fixed(module, given.args, given.kwargs).eval(), tensors


def check(sample: Sample) -> None:
    model, tensors = sample
    with torch.no_grad(), disable_fast_paths():  # fast paths give zeros at padded positions
        expected = model(*(tensor.clone() for tensor in tensors))  # some work in place
    module = to_flax(model, tensors, batch_axis=None)
    assert_close(compiled(module)(*[tensor.numpy() for tensor in tensors]), expected)


def check_all(name: str, limit: int | None) -> None:
    with jax.enable_x64(True):
        for k, sample in enumerate(samples(name)):
            if k == limit:
                return
            if name in REFUSED:
                with pytest.raises(UnsupportedError, match=REFUSED[name]):
                    check(sample)
            else:
                check(sample)


@pytest.mark.thinned
@pytest.mark.parametrize("name", ENTRIES)
def test_two_samples(name: str) -> None:
    check_all(name, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ENTRIES)
def test_all_samples(name: str) -> None:
    check_all(name, None)


def test_database_is_there() -> None:
    """All of it, and no refusal of what it does not hold. `nn.LinearCrossEntropyLoss` came after PyTorch 2.11."""
    assert len(ENTRIES) >= 113 + hasattr(nn, "LinearCrossEntropyLoss") and set(REFUSED) <= set(ENTRIES)
