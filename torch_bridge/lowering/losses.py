"""Losses have no rules: PyTorch's own decompositions take them apart. Here stands what these get wrong."""

from torch_bridge.lowering.table import refuse

refuse(
    "aten.multilabel_margin_loss.default",
    "PyTorch traces it with another shape of result than it computes for one-dimensional input and no reduction; "
    "compute the loss from the network's outputs",
)
