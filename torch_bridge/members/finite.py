"""Weights that are NaN or infinite, for example after a training that diverged."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from jaxensemble.errors import InputError


def check_finite(members: Sequence[nn.Module]) -> None:
    """Checks that parameters are finite, and that buffers are not NaN. Masks are made of infinities in buffers.

    **Raises:** `InputError` with all tensors that are not.
    """
    check_no_rows(f"  member {k}, {row}" for k, member in enumerate(members) for row in _nonfinite_weights(member))


def _nonfinite_weights(model: nn.Module) -> Iterator[str]:
    yield from nonfinite_values(dict(model.named_parameters()), {})
    buffers = {key: buffer for key, buffer in model.named_buffers() if has_fractions(buffer)}
    yield from nonfinite_values(buffers, {key: buffer.isinf() for key, buffer in buffers.items()})


def nonfinite_values(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields every tensor with NaN or infinite values that are not expected, their number, and the first of them."""
    for key, tensor in tensors.items():
        if not has_fractions(tensor) or bool((finite := tensor.isfinite()).all()):
            continue
        bad = ~finite & ~expected[key] if key in expected else ~finite
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            yield f"`{key}`: {int(bad.sum())} of {tensor.numel()} values, the first at {first}: {tensor[first]:g}"


def has_fractions(tensor: Tensor) -> bool:
    """Returns whether a tensor's dtype has NaN and infinity."""
    return tensor.is_floating_point() or tensor.is_complex()


def check_no_rows(rows: Iterable[str]) -> None:
    """Checks that there are no rows of tensors that are not finite.

    **Raises:** `InputError` with all rows.
    """
    if found := list(rows):
        raise InputError(
            "weights must be finite; got\n"
            + "\n".join(found)
            + "\nPass allow_nonfinite=True (--allow-nonfinite) to port them as they are."
        )
