"""The values that rules pass around: arrays of the network being built, with their layouts."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from jaxensemble.dtypes import NARROW
from jaxensemble.network.network import Ref, Var
from jaxensemble.network.weight_map import Rearrangement
from torch_bridge.arrays import DTYPE_NAMES as DTYPE_NAMES
from torch_bridge.compat import free_unbacked_symbols
from torch_bridge.lowering.layouts.layout import Layout, Size, atoms_of, group_size


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the network being built: its expression, its layout, and the dtype that PyTorch gives it.

    A value with a `key` is a weight. A weight is `open` until a rule asks for it: the first arrangement that a rule
    asks for settles how the weight is stored.
    """

    expr: Ref | Var
    layout: Layout
    dtype: torch.dtype
    key: str | None = None
    open: bool = False

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape that PyTorch sees."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return len(self.layout.dims)

    @property
    def axis_order(self) -> tuple[int, ...]:
        """The stored axis of each dimension, for a `tidy` value. Axes of size one are taken in turn."""
        spare = iter([k for k, axis in enumerate(self.layout.axes) if not axis])
        return tuple(self.layout.axes.index(dim) if dim else next(spare) for dim in self.layout.dims)

    def axis(self, dim: int) -> int:
        """The stored axis of PyTorch's dimension `dim`, for a `tidy` value."""
        return self.axis_order[dim % self.ndim]


Operand: TypeAlias = Value | torch.Tensor | bool | int | float | complex
"""An argument of an ATen operation: a value, a constant tensor or a number."""


def is_array(operand: Any) -> bool:
    """Returns whether an operand has dimensions. Numbers, and tensors that are numbers, do not broadcast."""
    return isinstance(operand, Value) or (isinstance(operand, torch.Tensor) and operand.ndim > 0)


def as_number(operand: Any) -> Any:
    """A tensor without dimensions as a Python number. Any other operand stays as it is."""
    return operand.item() if isinstance(operand, torch.Tensor) else operand


def initial_dtype(dtype: torch.dtype) -> str:
    """The dtype of a variable before its array is loaded: 64-bit integers, which need x64, become 32-bit ones."""
    return NARROW.get(DTYPE_NAMES[dtype], DTYPE_NAMES[dtype])


@dataclasses.dataclass(frozen=True)
class Storage:
    """The place and the layout of a stored weight. `flipped` are dimensions that are stored reversed."""

    path: str
    layout: Layout
    flipped: tuple[int, ...] = ()

    @property
    def rearrangement(self) -> Rearrangement:
        """The way from PyTorch's array to the stored one, in as few pieces as possible."""
        before, after = atoms_of(self.layout.dims), atoms_of(self.layout.axes)
        successor = dict(itertools.pairwise(after))
        ends = {dim[-1] for dim in self.layout.dims if dim} if self.flipped else set()
        pieces = [[before[0]]] if before else []
        for previous, atom in itertools.pairwise(before):
            if successor.get(previous) is atom and previous not in ends:
                pieces[-1].append(atom)
            else:
                pieces.append([atom])
        rank = {atom: k for k, atom in enumerate(after)}
        turned = {atom for dim in self.flipped for atom in self.layout.dims[dim]}
        return Rearrangement(
            split=tuple(int(group_size(tuple(piece))) for piece in pieces),
            order=tuple(sorted(range(len(pieces)), key=lambda k: rank[pieces[k][0]])),
            shape=tuple(int(size) for size in self.layout.stored_shape),
            flipped=tuple(k for k, piece in enumerate(pieces) if piece[0] in turned),
        )


def size(entry: Any) -> Any:
    """A torch size, or a number computed from sizes, as a number or an expression in the batch size.

    A float that depends on values stays as it is.
    """
    if isinstance(entry, torch.SymInt) or (isinstance(entry, torch.SymFloat) and not free_unbacked_symbols(entry)):
        expr = _simplify_truncation(entry.node.expr)
        return int(expr) if expr.is_Integer else float(expr) if expr.is_Number else expr
    return entry


@functools.lru_cache(4096)
def _simplify_truncation(expr: Any) -> Any:
    """An expression with `int(2.0 * size)`, which interpolation computes, written as `2 * size`."""
    if not expr.args or type(expr).__name__ != "TruncToInt":
        parts = [_simplify_truncation(part) for part in expr.args]
        return expr if all(new is old for new, old in zip(parts, expr.args, strict=True)) else expr.func(*parts)
    number, floating = expr.args[0].as_coeff_Mul()
    is_exact = type(floating).__name__ == "ToFloat" and float(number).is_integer()
    return int(number) * floating.args[0] if is_exact else expr


def sizes(shape: Any) -> tuple[Size, ...]:
    return tuple(size(entry) for entry in shape)


def fix_sizes(shape: Any, known: Sequence[Size]) -> None:
    """Fixes PyTorch's symbols for sizes that depend on values, once these values are constants: `x[:, mask]`.

    Everything computed from such sizes is known afterwards.
    """
    for entry, number in zip(shape, known, strict=True):
        if isinstance(entry, torch.SymInt) and isinstance(number, int):
            torch._check(entry == number)


def module_scope(node: fx.Node) -> tuple[str, ...]:
    """The module calls around a node, outermost first, without the root. `@n` marks the n-th repeated call."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        path + (f"@{key.rpartition('@')[2]}" if "@" in key else "")
        for key, (path, _) in stack.items()
        if path and not path.startswith("_empty_nn_module_stack")
    )
