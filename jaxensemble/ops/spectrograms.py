"""Short-time Fourier transforms, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Complex, Inexact

from jaxensemble.ops.annotations import AnyArray
from jaxensemble.ops.windows import overlap_add, patches


def stft(
    x: Inexact[AnyArray, "*batch length"],
    n_fft: int,
    hop_length: int,
    window: Inexact[AnyArray, " window"] | None = None,
    *,
    normalized: bool = False,
    onesided: bool = True,
) -> Complex[Array, "*batch frequencies frames"]:
    """The Fourier transforms of frames of a signal, each of `n_fft` numbers; the next begins `hop_length` later.

    **Arguments:**

    - `x`: `[..., length]`. Nothing is added at its ends.
    - `window`: the factor of frames, `[n_fft]`, or fewer numbers, which are put in the middle.
    - `onesided`: whether only the frequencies from 0 on are given, which suffice for real signals.

    **Returns:** `[..., frequencies, frames]`, complex.

    >>> stft(jnp.ones((2, 10)), 4, 2).shape
    (2, 3, 4)
    """
    frames = patches(x[..., None], (n_fft,), hop_length)[..., 0]
    frames = frames if window is None else frames * _pad_window(window, n_fft)
    transform = jnp.fft.rfft if onesided else jnp.fft.fft
    return transform(frames, norm="ortho" if normalized else "backward").swapaxes(-1, -2)


def istft(
    z: Complex[AnyArray, "*batch frequencies frames"],
    n_fft: int,
    hop_length: int,
    window: Inexact[AnyArray, " window"],
    *,
    start: int = 0,
    length: int,
    normalized: bool = False,
    real: bool = True,
) -> Inexact[Array, "*batch {length}"]:
    """The signal whose `stft` is `z`: the sum of overlapping frames, over the sum of the squares of their windows.

    **Arguments:**

    - `z`: `[..., frequencies, frames]`, complex.
    - `start`, `length`: the part of the signal that is given; zeros where there is no frame.
    - `real`: whether the signal is real, so that `z` has the frequencies from 0 on.

    **Returns:** `[..., length]`.

    >>> x = jnp.arange(12.0)
    >>> istft(stft(x, 4, 2, jnp.ones(4)), 4, 2, jnp.ones(4), length=12).round(4).tolist() == x.tolist()
    True
    """
    norm = "ortho" if normalized else "backward"
    frames = z.swapaxes(-1, -2)
    frames = jnp.fft.irfft(frames, n_fft, norm=norm) if real else jnp.fft.ifft(frames, norm=norm)
    window = _pad_window(window, n_fft)
    total = (n_fft + hop_length * (frames.shape[-2] - 1),)
    signal = overlap_add((frames * window)[..., None], total, hop_length)[..., 0]
    weight = jnp.broadcast_to(window**2, frames.shape[-2:])
    weight = overlap_add(weight[..., None], total, hop_length)[..., 0]
    end = min(start + length, *total)
    signal = signal[..., start:end] / weight[start:end]
    return jnp.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(0, start + length - end)])


def _pad_window(window: Inexact[AnyArray, " window"], size: int) -> Inexact[Array, " {size}"]:
    """A window with zeros on both sides."""
    before = (size - window.shape[0]) // 2
    return jnp.pad(window, (before, size - window.shape[0] - before))
