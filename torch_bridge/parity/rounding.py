"""Rounding in PyTorch's own results, below which no comparison can go.

Where sums cancel, for example in the mean of normalised values, only rounding is left, and two frameworks cannot agree
on it. PyTorch itself shows the size of rounding, by the distance between float32 and float64: a precision that is finer
by a factor rounds less by that factor.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_bridge.compat import pytree
from torch_bridge.members.finite import has_fractions

FACTOR = 32.0
"""The largest ratio of an error in float64 to PyTorch's own in float32, scaled by `SCALE`."""

SCALE = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

DRAWS = 4
"""The number of times that models and inputs are moved by their last bits."""


def allowed_error(error: float, limit: float, coarse: Callable[[], float]) -> tuple[float, str]:
    """The largest error in float64 that passes, and a remark on it.

    It is `limit`, unless the error exceeds `limit` and PyTorch's own rounding explains the error: `coarse` gives the
    distance between PyTorch in float32 and in float64, by the same measure as `error`.
    """
    if error <= limit or error == np.inf:
        return limit, ""
    try:
        own = coarse()
    except Exception:  # a forward that insists on float64 may raise anything
        return limit, ""
    bound = FACTOR * SCALE * own
    if not np.isfinite(bound) or bound <= limit:
        return limit, ""
    return bound, f"; PyTorch's own error in float32 is {own:.1e}"


def coarse_error(narrow: np.ndarray, exact: np.ndarray) -> float:
    """The largest error of any member in float32, relative to that member's largest value, as in `normwise_error`.

    Values that float32 cannot hold are left out, for example the lowest float64, which fills masks.
    """
    if exact.dtype.kind in "biu":
        return 0.0
    errors = [0.0]
    with np.errstate(all="ignore"):
        for ours, theirs in zip(narrow, exact, strict=True):
            held = np.abs(theirs) <= np.finfo(np.float32).max
            difference, scale = (np.abs(x[held]).max(initial=0.0) for x in (ours - theirs, theirs))
            errors.append(float(difference / scale) if scale else float(difference))
    return max(errors)


def move_last_bits(
    models: Sequence[nn.Module], inputs: Any, dtype: torch.dtype | None = None
) -> Iterator[tuple[list[nn.Module], Any]]:
    """Yields models and inputs a few times, with every number made larger or smaller by its last bit. Zeros stay.

    PyTorch's error for them is as good a sample as its error for the models themselves. With `dtype`, the bit is that
    of the number in this precision.
    """
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)

        def move(x: Any, generator: torch.Generator = generator) -> Any:
            if not isinstance(x, Tensor) or not has_fractions(x):
                return x
            signs = 2 * torch.randint(2, x.shape, generator=generator).to(x) - 1
            return x * (1 + torch.finfo(dtype or x.dtype).eps * signs)

        copies = [copy.deepcopy(model) for model in models]
        with torch.no_grad():
            for model in copies:
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.copy_(move(tensor))
        yield copies, pytree.tree_map(move, inputs)
        del copies  # before the next ones are made
