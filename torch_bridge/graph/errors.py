"""Errors of `torch.export`, explained to the author of the forward."""

import re
from collections.abc import Mapping

from torch import nn

from jaxensemble.errors import InputError, JaxEnsembleError, UnsupportedError, describe_error
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.forward import describe_shapes, evaluate_model
from torch_bridge.graph.sizes.open_axes import BATCH
from torch_bridge.graph.user_lines import user_line

_MODE_NAMES = {True: "training", False: "evaluation"}


def explain_error(
    error: Exception,
    model: nn.Module,
    inputs: Arguments,
    refusals: Mapping[str, str],
    *,
    training: bool,
    fixed: tuple[str, str] | None = None,
) -> JaxEnsembleError:
    """Returns the error to raise for an error of the exporter: `InputError` if PyTorch itself fails on these inputs.

    **Arguments:**

    - `refusals`: reasons by the names of operations.
    - `fixed`: the size that the forward takes for a fixed number, and the line that does so.
    """
    name = type(model).__name__
    own = None if training else _own_error(model, inputs)
    if own is not None:
        return InputError(
            f"PyTorch itself cannot run {name} on the example inputs ({describe_shapes(inputs)}): "
            f"{describe_error(own)}",
            details=str(own),
        )
    text = str(error)
    said = f"{type(error).__name__}: {text}"
    where = user_line(error)
    if "Could not guard on data-dependent" in text or "DataDependent" in type(error).__name__:
        return UnsupportedError(
            f"torch.export cannot follow {name}.forward, which decides by values{where}: XLA needs the same operations "
            "for all values. Write it with torch.where or a multiplication by a mask, or port the parts on either side "
            "of the decision.",
            details=said,
        )
    if refused := _refused(error, refusals):
        return UnsupportedError(f"torch.export cannot follow {name}.forward{where}: {refused}.", details=said)
    if "Constraints violated" in text or "specialized it to be a constant" in text:
        if fixed is not None and fixed[0] != BATCH:
            return fixed_size_error(model, *fixed, details=said)
        where = f" ({fixed[1]})" if fixed is not None and fixed[1] else where
        return UnsupportedError(
            f"torch.export cannot follow {name}.forward with an open batch size{where}: it takes the size of the batch "
            "axis for a fixed number, or decides by it. Write x.shape[0] or -1 instead; or, if the inputs have no "
            "batch axis or are always of one size, pass batch_axis=None to fix all shapes.",
            details=said,
        )
    return UnsupportedError(
        f"torch.export cannot follow {name}.forward in {_MODE_NAMES[training]} mode{where}: {describe_error(error)}",
        details=said,
    )


def fixed_size_error(model: nn.Module, size: str, line: str, details: str = "") -> UnsupportedError:
    """Returns the error for an open size with a name that a line of the forward fixes."""
    where = f" ({line})" if line else ""
    return UnsupportedError(
        f"{type(model).__name__}.forward takes {size} for a fixed number, or decides by it{where}, so that it cannot "
        "stay open. Write x.shape[...] or -1 instead of a number; give all axes of one size, in all inputs, one name; "
        "take an example of another size, where this one is all of a table or a multiple of a window; or leave it out "
        "of `dynamic`.",
        details=details,
    )


def _refused(error: Exception, refusals: Mapping[str, str]) -> str | None:
    """Returns the operation that the exporter stops at, and why it is refused."""
    stopped = re.search(r"Dynamic\w+Exception: (\S+)", f"{type(error).__name__}: {error}")
    reason = refusals.get(stopped[1]) if stopped else None
    return f"{stopped[1]}: {reason}" if stopped and reason else None


def _own_error(model: nn.Module, inputs: Arguments) -> Exception | None:
    """Returns the error that the forward raises without any exporter, or None."""
    try:
        evaluate_model(model, inputs)
    except Exception as error:
        return error
    return None
