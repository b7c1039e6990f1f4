"""Abilities of the installed PyTorch, which are fewer in older versions: exporting, differentiating and mapping."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tests.helpers.porting import Fn


def can_export(forward: Callable[[Tensor], Any], x: Tensor, *, open_batch: bool = True) -> bool:
    """Returns whether `torch.export` follows a forward, without any code of ours."""
    dynamic = {0: torch.export.Dim("batch")} if open_batch else {}
    try:
        torch.export.export(Fn(forward), (x,), dynamic_shapes=((dynamic,),), strict=False)
    except Exception:  # errors of many kinds
        return False
    return True


def can_differentiate(forward: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Returns whether PyTorch has a derivative of a forward."""
    outputs = pytree.tree_leaves(forward(x.detach().requires_grad_()))
    try:
        torch.stack([output.sum() for output in outputs]).sum().backward()
    except RuntimeError:
        return False
    return True


def can_map(model: nn.Module, x: Tensor) -> bool:
    """Returns whether `torch.func.vmap` runs a model over stacked weights."""
    params, buffers = torch.func.stack_module_state([model])
    call: Callable[..., Any] = lambda *state: torch.func.functional_call(model, state, (x,))  # noqa: E731
    try:
        torch.func.vmap(call)(params, buffers)
    except RuntimeError:
        return False
    return True
