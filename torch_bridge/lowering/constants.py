"""Nodes that depend on no input and no weight, which PyTorch computes once while porting."""

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.graph.nodes import has_tensors
from torch_bridge.lowering.rules.draws import is_draw
from torch_bridge.lowering.values import Value, fix_sizes, size, sizes

_RANDOM = torch.Tag.nondeterministic_seeded


def is_structural(node: fx.Node) -> bool:
    """Returns whether a node only picks from results or computes sizes."""
    return node.target is operator.getitem or not has_tensors(node)


def is_constant(node: fx.Node) -> bool:
    """Returns whether a node depends on no input and no weight."""
    return not node.all_input_nodes and not is_open(node) and not is_random(node)


def is_open(node: fx.Node) -> bool:
    """Returns whether a result has a size that depends on the batch size. Sizes that depend on values do not count."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    open_sizes = [size(entry) for leaf in leaves if isinstance(leaf, Tensor) for entry in leaf.shape]
    return any(not isinstance(entry, int) and not free_unbacked_symbols(entry) for entry in open_sizes)


def is_random(node: fx.Node) -> bool:
    """Returns whether a node draws random numbers."""
    return is_draw(node.target) or _RANDOM in getattr(node.target, "tags", ())


def is_foldable(node: fx.Node, args: Any, kwargs: Any) -> bool:
    """Returns whether a node can be computed now: all its arguments are constants, and its result has fixed sizes."""
    leaves = pytree.tree_leaves((args, kwargs))
    symbolic = any(hasattr(leaf, "free_symbols") for leaf in leaves)
    opaque = getattr(node.target, "namespace", "") == "torch_bridge"  # a stand-in has no values
    return not (
        symbolic or opaque or any(isinstance(leaf, Value) for leaf in leaves) or is_open(node) or is_random(node)
    )


def compute_constant(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Computes a foldable node by PyTorch, and fixes the sizes that depend on its values."""
    with torch.no_grad():
        result = cast(Callable[..., Any], node.target)(*args, **kwargs)
    for constant, val in zip(pytree.tree_leaves(result), pytree.tree_leaves(node.meta["val"]), strict=True):
        if isinstance(constant, Tensor):
            fix_sizes(val.shape, constant.shape)
    return result


MADE_ALIKE = {
    *(f"aten.new_{name}.default" for name in ("zeros", "ones", "full", "empty")),
    *(f"aten.{name}_like.default" for name in ("zeros", "ones", "full", "empty")),
}
"""Operations that take only the dtype, the device and the shape of an array."""


def make_alike(node: fx.Node, args: Any, kwargs: Any) -> Tensor:
    """Makes the result of an operation of `MADE_ALIKE`, so that masks that begin with one are folded.

    Empty memory becomes zeros.
    """
    template = node.args[0]
    assert isinstance(template, fx.Node)
    held = template.meta["val"]
    shape = sizes(held.shape) if str(node.target).endswith("_like.default") else ()
    with torch.no_grad():
        result = node.target(torch.zeros(shape, dtype=held.dtype), *args[1:], **{**kwargs, "device": "cpu"})  # type: ignore[operator]
    return torch.zeros_like(result) if "empty" in str(node.target) else result
