"""A module's forward, run by PyTorch."""

from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments, map_tensors

Inputs = Arguments | tuple[Any, ...]
"""The arguments of one call, or a tuple of its positional ones."""


def describe_shapes(inputs: Any) -> str:
    """Returns dtypes and shapes of inputs, as errors name them."""
    leaves = pytree.tree_leaves(inputs)
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in leaves
    )


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Calls a model with copies of the inputs, which it may write into."""
    return Arguments.of(map_tensors(Tensor.clone, inputs)).call(model)


def evaluate_model(model: nn.Module, inputs: Inputs) -> Any:
    """Calls a model without gradients, or with them if the forward itself takes gradients."""
    try:
        with torch.no_grad():
            return call_model(model, inputs)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return map_tensors(Tensor.detach, call_model(model, inputs))
