"""Functions of PyTorch that fix a size, computed in a different way that leaves the size open."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_bridge.graph.stand_ins import stand_in


class DirectDistances(TorchFunctionMode):
    """Has `torch.cdist` compute every distance directly, within it.

    By default PyTorch uses a product of matrices for more than 25 rows. That is a decision by the size of a batch, and
    gives a distance of about 1e-8 in float64 between equal rows.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cdist:
            args, kwargs = args[:3], {**kwargs, "compute_mode": "donot_use_mm_for_euclid_dist"}
        return func(*args, **kwargs)


class OpenSizes(TorchFunctionMode):
    """Has functions that are called with open sizes leave them open, within it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = _OTHER_WAYS.get(func)
        result = other(*args, **kwargs) if other is not None else NotImplemented
        return func(*args, **kwargs) if result is NotImplemented else result


def _linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if not isinstance(steps, torch.SymInt) or isinstance(start, Tensor) or isinstance(end, Tensor):
        return NotImplemented
    return stand_in("linspace")(start, end, steps, dtype=dtype or torch.get_default_dtype())


def _fill_diagonal(x: Tensor, fill_value: Any, wrap: bool = False) -> Any:
    if wrap or x.ndim != 2 or not _is_open(x):
        return NotImplemented
    x.diagonal().fill_(fill_value)
    return x


def _take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or x.ndim != indices.ndim or not (_is_open(x) or _is_open(indices)):
        return NotImplemented
    pairs = zip(x.shape, indices.shape, strict=True)
    same = all(own == other for k, (own, other) in enumerate(pairs) if k != dim % x.ndim)
    return x.gather(dim, indices) if same else NotImplemented


def _cov(x: Tensor, *, correction: Any = 1, fweights: Any = None, aweights: Any = None) -> Any:
    if x.ndim != 2 or x.shape[0] == 1 or fweights is not None or aweights is not None:
        return NotImplemented
    centred, count = x - x.mean(1, keepdim=True), x.shape[1] - correction
    return centred @ centred.mH / (count if isinstance(count, torch.SymInt) else max(count, 0))


def _corrcoef(x: Tensor) -> Any:
    if x.is_complex() or (covariances := _cov(x)) is NotImplemented:
        return NotImplemented
    deviations = covariances.diagonal().sqrt()
    return (covariances / deviations.unsqueeze(1) / deviations).clip(-1, 1)


def _einsum(equation: Any, *operands: Any) -> Any:
    """Contracts three or more operands from the left: the search for a better order needs fixed sizes."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(tensors) < 3 or not any(map(_is_open, tensors)):
        return NotImplemented
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(equation, *tensors)


def _max_pool1d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or not _is_open(x):
        return NotImplemented
    return torch.max_pool1d_with_indices(x, kernel_size, stride or (), padding, dilation, ceil_mode)[0]


def _make_pool(whole: Callable[[Tensor], Tensor], otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Returns a pooling whose single window may cover everything, of open size: `F.avg_pool2d(x, x.shape[2:])`."""

    def pool(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **options: Any) -> Any:
        window = kernel_size if isinstance(kernel_size, list | tuple) else (kernel_size,)
        given = x.shape[x.ndim - len(window) :]
        is_whole = any(isinstance(entry, torch.SymInt) for entry in window)
        is_whole = is_whole and [_size(entry) for entry in window] == [_size(entry) for entry in given]
        plain = not rest and not options.get("return_indices") and options.get("divisor_override") is None
        if is_whole and padding == 0 and plain:
            return whole(x.flatten(-len(window))).reshape(*x.shape[: x.ndim - len(window)], *(1 for _ in window))
        return NotImplemented if otherwise is None else otherwise(x, kernel_size, stride, padding, *rest, **options)

    return pool


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1)


def _max(x: Tensor) -> Tensor:
    return x.max(-1).values


def _recurrent(name: str) -> Callable[..., Any]:
    """Returns a recurrent layer over a sequence. The exporter would write it out step by step to find its shapes.

    A layer with dropout is left to the exporter if the length is fixed, so that both modes can be compared.
    """

    def layer(x: Tensor, hx: Any, params: Any, *options: Any) -> Any:
        if not isinstance(params, list | tuple) or not isinstance(options[0], bool):  # packed sequences
            return NotImplemented
        has_biases, num_layers, dropout, train, bidirectional, batch_first = options
        drops = dropout and num_layers > 1
        if x.ndim != 3 or (drops and not isinstance(x.shape[1 if batch_first else 0], torch.SymInt)):
            return NotImplemented
        mode = "always" if train and drops else "never"
        return stand_in(name)(x, hx, params, has_biases, num_layers, dropout, bidirectional, batch_first, mode)

    return layer


def _size(entry: Any) -> Any:
    return entry.node.expr if isinstance(entry, torch.SymInt) else entry


def _is_open(x: Tensor) -> bool:
    return any(isinstance(entry, torch.SymInt) for entry in x.shape)


_OTHER_WAYS: dict[Any, Callable[..., Any]] = {
    torch.linspace: _linspace,
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), _take_along_dim),
    **dict.fromkeys((torch.cov, Tensor.cov), _cov),
    **dict.fromkeys((torch.corrcoef, Tensor.corrcoef), _corrcoef),
    Tensor.fill_diagonal_: _fill_diagonal,
    torch.einsum: _einsum,
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), _make_pool(_max, _max_pool1d)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d, F.max_pool3d, torch.max_pool3d), _make_pool(_max)),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _make_pool(_mean)),
    **{getattr(torch, name): _recurrent(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


@contextlib.contextmanager
def keep_roots_open() -> Iterator[None]:
    """Has `math.sqrt` of an open size stay open, within it."""
    before = math.sqrt
    math.sqrt = lambda x: torch.sym_sqrt(x) if isinstance(x, torch.SymInt | torch.SymFloat) else before(x)
    try:
        yield
    finally:
        math.sqrt = before
