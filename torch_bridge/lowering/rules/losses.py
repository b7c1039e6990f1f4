"""Losses.

They have no rules: PyTorch's own decompositions write them in other operations. This file has those that PyTorch lacks
or gets wrong.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torch_bridge.compat import linear_cross_entropy
from torch_bridge.lowering.table import DECOMPOSITIONS, refuse

refuse(
    "aten.multilabel_margin_loss.default",
    "PyTorch traces it with a different result shape than it computes for one-dimensional input and no reduction; "
    "compute the loss from the network's outputs",
)


def _chunked(
    x: Tensor,
    kernel: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nn.LinearCrossEntropyLoss` in chunks. The other results are its gradients, which no forward takes."""
    loss = F.cross_entropy(
        F.linear(x, kernel, bias),
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    none = x.new_empty(0)
    return loss, none, none, none


def _chunked_of_each(
    x: Tensor, kernel: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, ignore_index: int, *_: Any
) -> Tensor:
    return _chunked(x, kernel, target, bias, weight, "none", ignore_index, 0.0)[0]


_CHUNKED = {
    "_linear_cross_entropy_batch_chunked": _chunked,
    "_linear_cross_entropy_batch_chunked_no_reduction": _chunked_of_each,
}

DECOMPOSITIONS |= {
    getattr(linear_cross_entropy, name)._opoverload: function
    for name, function in _CHUNKED.items()
    if hasattr(linear_cross_entropy, name)  # private to PyTorch, so that the names may change
}
