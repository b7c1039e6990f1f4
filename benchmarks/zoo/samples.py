"""Samples of the operators of PyTorch's own database, and a module that applies several."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db

SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """A function, and arguments for it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def key(self) -> str:
        """Returns a key that is equal for samples that differ in values alone."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return str(
            [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves] + [str(spec)]
        )


class Applied(nn.Module):
    """Functions with all arguments fixed except tensors; the tensors of all functions are the inputs."""

    def __init__(self, samples: Sequence[Sample]):
        super().__init__()
        self.samples = samples
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        queue = iter(tensors)
        results: list[Tensor] = []
        for sample in self.samples:
            leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
            given = [self._given(leaf, queue) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(given, spec)
            results += tensors_in(sample.function(*args, **kwargs))
        return tuple(results)

    def _given(self, own: Tensor, queue: Iterator[Tensor]) -> Tensor:
        """Returns a copy of an input: some operators write into their inputs."""
        return next(queue) * self.one if own.requires_grad else next(queue).clone()


def tensors_in(result: Any) -> list[Tensor]:
    """Returns the tensors within a result, also in named tuples."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return [tensor for item in result for tensor in tensors_in(item)]
    return [result] if isinstance(result, Tensor) else []


def entries() -> dict[str, Any]:
    """Returns the operators that compute with float64, by name; some take sizes alone, and have no samples."""
    return {
        ".".join(filter(None, (entry.name, entry.variant_test_name))): entry
        for entry in op_db
        if torch.float64 in entry.supported_dtypes("cpu") and "empty" not in entry.name
    }


def samples_of(entry: Any, limit: int = SAMPLES) -> list[Sample]:
    """Returns up to `limit` samples that differ in more than values, spread evenly over all samples."""
    torch.manual_seed(0)
    found: dict[str, Sample] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in itertools.islice(
            entry.sample_inputs("cpu", torch.float64, requires_grad=entry.supports_autograd), 200
        ):
            sample = Sample(_compared(entry.op, given.output_process_fn_grad), (given.input, *given.args), given.kwargs)
            if sample.tensors and all(tensor.layout is torch.strided for tensor in sample.tensors):
                found.setdefault(sample.key, sample)
    chosen = list(found.values())
    return [chosen[round(k)] for k in np.linspace(0, len(chosen) - 1, min(limit, len(chosen)))]


def _compared(function: Callable[..., Any], result: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns a function that gives the meaningful part of the results: singular vectors without their signs."""
    return lambda *args, **kwargs: result(function(*args, **kwargs))
