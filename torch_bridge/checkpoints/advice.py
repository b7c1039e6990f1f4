"""Advice on how to choose one of the sets of weights in a checkpoint file."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from jaxensemble.errors import InputError
from torch_bridge.checkpoints.readings import tensor_shape

CHOICE_ADVICE = "These are arguments of load_ensemble; on the command line: --key, --prefix, --rename, --ignore."


def several_error(rows: Sequence[str], why: str = "and a guess could be wrong", more: int = 0) -> InputError:
    rest = f",\n  or one of {more} more" if more > 0 else ""
    one_each = len({re.sub(r"\d+", "", row) for row in rows}) == 1  # member0, member1
    joined = (
        "\nIf each is a member: load each in a call of its own, and join them with Ensemble.concatenate."
        if one_each
        else ""
    )
    return InputError(
        f"holds more than one set of weights, {why}. Name the one that is meant:\n  "
        + ",\n  or ".join(rows)
        + f"{rest}.{joined}\n{CHOICE_ADVICE}"
    )


def quote_value(value: Any) -> str:
    """Returns a value as an argument is written, in Python and in JSON."""
    return json.dumps(value, ensure_ascii=False)


def describe_content(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {len(value)} keys"
    return f"a tensor of shape {tensor_shape(value)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
