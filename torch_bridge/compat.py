"""What we use of PyTorch that has no public way, or that differs from version to version, in this one place.

Tried with PyTorch 2.11.0 (Python 3.12), 2.13.0 (3.11) and 2.15.0 (3.13).

What differs is asked of PyTorch itself (`hasattr`), never of its version.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import has_side_effect, map_aggregate
from torch.nn.modules import transformer

__all__ = [
    "REMOVED",
    "compiled_graphs",
    "free_unbacked_symbols",
    "has_side_effect",
    "keeps_cumulative_average",
    "linear_cross_entropy",
    "map_aggregate",
    "masks_not_looked_into",
    "pytree",
    "schema_of",
    "writes",
]

REMOVED = {"aten.cholesky.default": "2.15"}
"""Operations that have a rule and that later versions lack, each with one of these. All others must be there."""

_LINEAR_CROSS_ENTROPY = "torch.nn.modules.linear_cross_entropy"
linear_cross_entropy: Any = (
    importlib.import_module(_LINEAR_CROSS_ENTROPY) if importlib.util.find_spec(_LINEAR_CROSS_ENTROPY) else None
)
"""The module behind `nn.LinearCrossEntropyLoss`, or None before it came (2.13)."""


def schema_of(operation: Any) -> Any:
    """The schema of an ATen operation; None for any other function."""
    return getattr(operation, "_schema", None)


def writes(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return getattr(schema_of(node.target), "is_mutable", False)


def keeps_cumulative_average(module: nn.Module) -> bool:
    """Whether a module is a normalisation with `momentum=None`."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None


@contextlib.contextmanager
def masks_not_looked_into() -> Iterator[None]:
    """Transformer layers compare masks with a causal one where they are not told; either way they give the same.

    `torch.export` cannot follow decisions by values.
    """
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has compiled in this process."""
    from torch._dynamo.utils import counters  # which takes seconds to import

    return counters["stats"]["unique_graphs"]
