"""Products summed over dimensions, which letters name: one call for operands stored in any order."""

import string
from collections.abc import Sequence

import torch

from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import settled_value, stored_order
from torch_bridge.lowering.dtypes import cast
from torch_bridge.lowering.layouts.layout import Group, Layout, Size, new_group, tidy_axes
from torch_bridge.lowering.values import Operand, Value

Letters = Sequence[str]


def contract(b: Builder, operands: Sequence[Operand], letters: Sequence[Letters], out: Letters) -> Value:
    """The product of operands, summed over every letter that is not in `out`.

    `letters[k]` names the dimensions of operand `k`. Dimensions of size one are left out of the call, so that they
    broadcast. The call is `@` where the product is a matrix product, else `jnp.einsum`.
    """
    values = [_cast_to_result(b, settled_value(b, operand)) for operand in operands]
    sizes = _sizes(values, letters)
    groups: dict[str, Group] = {letter: new_group(size) for letter, size in sizes.items()}
    exprs, terms = [], []
    plain = is_matmul(letters, out) and all(
        stored_order(value) == tuple(range(value.ndim)) and _is_whole(value, sizes, names)
        for value, names in zip(values, letters, strict=True)
    )
    for value, names in zip(values, letters, strict=True):
        axes = value.layout.dims if plain else tuple(axis for axis in tidy_axes(value.layout) if axis)
        exprs.append(b.arrange(value, axes).expr)
        terms.append("".join(names[value.layout.dims.index(axis)] for axis in axes) if not plain else "")
    dims = tuple(groups[letter] for letter in out)
    if plain:
        return b.laid(b.emit("@", *exprs), Layout(dims, dims))
    kept = _stored_letters([letter for letter in out if groups[letter]], terms, letters)
    equation = f"{','.join(terms)}->{''.join(kept)}"
    return b.laid(b.emit("jnp.einsum", equation, *exprs), Layout(dims, tuple(groups[letter] for letter in kept)))


def _stored_letters(out: list[str], terms: Sequence[str], letters: Sequence[Letters]) -> list[str]:
    """The order in which the result is stored: that of an operand not stored in PyTorch's order, with features last.

    The result has one dimension of the other operand instead of the dimension summed over: attention's values `[b, k,
    h, d]` give `[b, q, h, d]`.
    """
    for term, names in zip(terms, letters, strict=True):
        if term and term[-1] in out and list(term) != [letter for letter in names if letter in term]:
            summed = [letter for letter in term if letter not in out]
            new = [letter for letter in out if letter not in term]
            if len(summed) == len(new) <= 1:
                return [new[0] if letter in summed else letter for letter in term]
    return out


def _cast_to_result(b: Builder, value: Value) -> Value:
    """The operand in the dtype of the result, unless the result is boolean."""
    return cast(b, value, b.dtype) if b.dtype != torch.bool else value


def _sizes(values: Sequence[Value], letters: Sequence[Letters]) -> dict[str, Size]:
    """The size of each letter: the size in the operands where it is not one."""
    sizes: dict[str, Size] = {}
    for value, names in zip(values, letters, strict=True):
        for letter, size in zip(names, value.shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    return sizes


def _is_whole(value: Value, sizes: dict[str, Size], names: Letters) -> bool:
    """Returns whether no summed or matrix dimension of the operand is broadcast."""
    return all(value.shape[k] == sizes[letter] for k, letter in enumerate(names) if k >= len(names) - 2)


def is_matmul(letters: Sequence[Letters], out: Letters) -> bool:
    """Returns whether `@` computes a product: `...ij,...jk->...ik`, with vectors on either side."""
    if len(letters) != 2:
        return False
    left, right = map(list, letters)
    if not left or not right or len(set(left)) < len(left) or len(set(right)) < len(right):
        return False
    row, inner = (left[-2:-1], left[-1])
    if inner != (right[-2] if len(right) > 1 else right[0]):
        return False
    column = right[-1:] if len(right) > 1 else []
    batches = [left[:-2], right[:-2]]
    batch = max(batches, key=len)
    shared = all(batch[len(batch) - len(one) :] == one for one in batches)
    return shared and list(out) == [*batch, *row, *column]


def parse_equation(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of an einsum equation, with `...` written out, and the letters of its output, even if implied.

    >>> parse_equation("...i,ij", (3, 2))
    ([['A', 'B', 'i'], ['i', 'j']], ['A', 'B', 'j'])
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    used = set(equation) - {".", ",", "-", ">", " "}
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    free = [letter for letter in string.ascii_uppercase + string.ascii_lowercase if letter not in used]
    dots = free[: max(widths, default=0)]
    letters = []
    for term, rank in zip(terms, ranks, strict=True):
        before, ellipsis, after = term.partition("...")
        width = rank - len(before) - len(after) if ellipsis else 0
        letters.append([*before, *dots[len(dots) - width :], *after])
    if arrow:
        before, ellipsis, after = out.partition("...")
        return letters, [*before, *(dots if ellipsis else []), *after]
    names = [letter for term in letters for letter in term if letter not in dots]
    return letters, [*dots, *sorted(letter for letter in set(names) if names.count(letter) == 1)]
