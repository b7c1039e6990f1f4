"""Gradients that a user defines: `torch.autograd.Function`, of which the exporter follows the forward only.

JAX would differentiate that forward. This is right only if the function's backward gives the same gradient.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from jaxensemble.errors import UnsupportedError
from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments


@contextlib.contextmanager
def watch_custom_functions(*, plain: bool = False) -> Iterator[set[type]]:
    """Yields the set of autograd functions that are applied within it. With `plain`, their backwards are left out."""
    found: set[type] = set()
    apply = vars(Function)["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            found.add(cls)
            if plain:
                takes_context = cls.setup_context is Function.setup_context
                return cls.forward(*([_Context()] if takes_context else []), *args, **kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(applied)  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        Function.apply = apply


class _Context:
    """A context that ignores what a forward saves for its backward."""

    needs_input_grad: tuple[bool, ...] = (True,) * 64

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


def check_custom_gradients(model: nn.Module, inputs: Arguments, functions: set[type]) -> None:
    """Checks that the backwards of functions are the gradients of their forwards.

    **Raises:** `UnsupportedError` if they are not.
    """
    if not functions:
        return
    if not all(
        _has_same_gradients(model, inputs, scale) for scale in (1.0, 1e-4, 1e4)
    ):  # for example, a backward may clip
        names = ", ".join(sorted(function.__qualname__ for function in functions))
        raise UnsupportedError(
            f"{type(model).__name__}.forward uses {names}, whose backward is not the gradient of its forward: JAX "
            "would take the latter. Write it without torch.autograd.Function, for instance as x + (f(x) - x).detach(), "
            "whose gradient passes straight through."
        )


def _has_same_gradients(model: nn.Module, inputs: Arguments, scale: float) -> bool:
    with watch_custom_functions():
        own = _gradients(copy.deepcopy(model), inputs, scale)  # a call in training mode writes into buffers
    with watch_custom_functions(plain=True):
        plain = _gradients(copy.deepcopy(model), inputs, scale)
    return own is not None and plain is not None and all(map(_is_close, own, plain))


def _gradients(model: nn.Module, inputs: Arguments, scale: float) -> list[Tensor] | None:
    """Returns the gradients of parameters and inputs; None if a backward fails."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    copies = {id(leaf): leaf.detach().clone().requires_grad_() for leaf in leaves}
    given = pytree.tree_map(lambda leaf: copies.get(id(leaf), leaf), inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = [*parameters, *copies.values()]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [
            leaf
            for leaf in pytree.tree_leaves(Arguments(*given).call(model))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not outputs:
            return [torch.zeros_like(tensor) for tensor in wanted]
        weights = [torch.linspace(0.5, 1.5, leaf.numel()).to(leaf).reshape(leaf.shape) for leaf in outputs]
        total = torch.stack([(leaf * weight).sum().abs() for leaf, weight in zip(outputs, weights, strict=True)]).sum()
        try:
            grads = torch.autograd.grad(scale * total, wanted, allow_unused=True)
        except RuntimeError:
            return None
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, grads, strict=True)]


def _is_close(a: Tensor, b: Tensor) -> bool:
    size = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=size * torch.finfo(a.dtype).eps ** 0.5, equal_nan=True)
