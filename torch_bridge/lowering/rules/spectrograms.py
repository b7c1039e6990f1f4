"""Short-time Fourier transforms and their inverses."""

import torch
from torch import Tensor

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.rules.complex_numbers import view_as_real
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.stft.default")
def stft(
    b: Builder,
    x: Operand,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Operand | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Value:
    if align_to_window:
        raise b.unsupported("`align_to_window` is not carried over; pad the input instead")
    value, held = b.plain(x), _window(window, n_fft, win_length, b.dtype.to_real())
    args: list[Arg] = [value.expr, n_fft, n_fft // 4 if hop_length is None else hop_length]
    has_complex = value.dtype.is_complex
    if held is not None:
        args.append(b.plain(held).expr)
        has_complex |= held.dtype.is_complex
    options: dict[str, Arg] = {"normalized": True} if normalized else {}
    options |= {"onesided": False} if (has_complex if onesided is None else not onesided) else {}
    expr = b.emit("ops.stft", *args, **options)
    if b.dtype.is_complex:
        return b.new(expr)
    return view_as_real(b, b.new(expr, b.result_shape[:-1], b.dtype.to_complex()))  # for return_complex=False


@register("aten.istft.default")
def istft(
    b: Builder,
    x: Operand,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Operand | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Value:
    held = _window(window, n_fft, win_length, b.dtype.to_real())
    held = torch.ones(n_fft, dtype=b.dtype.to_real()) if held is None else held
    options: dict[str, Arg] = {"start": n_fft // 2} if center else {}
    options |= {"length": b.size(b.result_shape[-1])}
    options |= {"normalized": True} if normalized else {}
    options |= {"real": False} if return_complex else {}
    hop = n_fft // 4 if hop_length is None else hop_length
    return b.new(b.emit("ops.istft", b.plain(x).expr, n_fft, hop, b.plain(held).expr, **options))


def _window(window: Operand | None, n_fft: int, win_length: int | None, dtype: torch.dtype) -> Value | Tensor | None:
    """The window; or the window of ones that a shorter length stands for."""
    if window is None and win_length not in (None, n_fft):
        return torch.ones(win_length, dtype=dtype)  # type: ignore[arg-type]
    return window  # type: ignore[return-value]
