"""Errors of both packages: what is wrong, where, why, and what to do about it.

Where `torch.func` raises a built-in error for the same mistake, the error here also has that type, so that code which
catches PyTorch's error goes on working.
"""

import re
from collections.abc import Sequence
from typing import Any

FIRST = 200
"""The most characters of the first line of a message."""

LINES = 12
"""The most lines of a message; `details` has all lines."""

ROWS = 5
"""The rows of a long list that a message shows."""

_LONGEST = 400
POINTER = "All of it: error.details"
"""The last line of a message that was shortened."""


class JaxEnsembleError(Exception):
    """The base of every error that `jaxensemble` and `torch_bridge` raise themselves.

    The message says what is wrong, where, why, and what to do. It is short: it shows the first few rows of a long list.

    - `details`: the whole list, and the message of PyTorch or JAX, where their error is the cause.

    >>> error = InputError("these do not fit:\\n" + "\\n".join(f"  layer {k}" for k in range(50)) + "\\nTake others.")
    >>> print(error)
    these do not fit:
      layer 0
      layer 1
      layer 2
      layer 3
      ... and 46 more
    Take others.
    All of it: error.details
    >>> len(error.details.splitlines())
    52
    """

    def __init__(self, message: str = "", *, details: str = ""):
        self.details = "\n\n".join(filter(None, (message, details)))
        super().__init__(_shorten_message(message, more=bool(details)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, whatever the library; the name of its class if the message is empty.

    >>> first_line(KeyError("a")), first_line(TypeError())
    ("'a'", 'TypeError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut_line(lines[0] if lines else type(error).__name__)


def describe_error(error: BaseException) -> str:
    """The class of another library's error, and the first line of its message.

    >>> describe_error(ValueError("too few\\nvalues"))
    'ValueError: too few'
    """
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def _shorten_message(message: str, *, more: bool) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    if lines and lines[-1] == POINTER:
        return message  # a pickled error has a shortened message
    rows = [line[:1].isspace() for line in lines]
    kept = _drop_middle([line for line, row in zip(lines, rows, strict=True) if not row])
    groups = sum(row and not (k and rows[k - 1]) for k, row in enumerate(rows))
    few = len(lines) <= LINES - 2  # the first line may become two, and `POINTER` is added
    each = len(lines) if few else min(ROWS, max(1, (LINES - 2 - len(kept)) // max(1, groups)))
    short: list[str] = []
    k = 0
    while k < len(lines):
        end = k
        while end < len(lines) and rows[end]:
            end += 1
        if end > k:
            short += _first_rows(lines[k:end], each)
            k = end
        else:
            short += [lines[k]] if lines[k] in kept else []
            k += 1
    whole = [*_break_line(short[0]), *short[1:]] if short else []
    shown = [_cut_line(line) for line in whole]
    fits = short == lines and shown == whole
    if len(shown) >= LINES:
        shown, fits = [*shown[: LINES - 2], shown[-1]], False
    return "\n".join(shown if fits and not more else [*shown, POINTER])


def _drop_middle(lines: list[str]) -> list[str]:
    """Returns the lines without those in the middle of a long text."""
    most = LINES - 4
    return lines if len(lines) <= most else lines[: most - 2] + lines[-2:]


def _first_rows(rows: list[str], most: int) -> list[str]:
    if len(rows) <= most:
        return rows
    if most == 1:
        return [f"{rows[0]} ... and {len(rows) - 1} more"]
    indent = rows[0][: len(rows[0]) - len(rows[0].lstrip())]
    return [*rows[: most - 1], f"{indent}... and {len(rows) - most + 1} more"]


def _cut_line(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def _break_line(line: str) -> list[str]:
    """Breaks a first line that is too long in two, after a sentence, a clause or a word."""
    if len(line) <= FIRST:
        return [line]
    for end in (r"[.:;] ", r", ", r" "):
        if ends := [found.end() for found in re.finditer(end, line[: FIRST + 1])]:
            return [line[: ends[-1]].rstrip(), line[ends[-1] :]]
    return [line[:FIRST], line[FIRST:]]


def porting_advice(value: Any) -> str:
    """The end of an error about a PyTorch module or tensor, which says what ports it; empty for any other object."""
    if not any(base.__module__.partition(".")[0] == "torch" for base in type(value).__mro__):
        return ""
    return ". PyTorch's modules, with their weights, are ported by torch_bridge.to_flax and torch_bridge.to_ensemble"


class InputError(JaxEnsembleError, ValueError):
    """An argument, an array or a file is not valid."""


class MemberError(JaxEnsembleError, ValueError, RuntimeError):
    """Members of an ensemble differ in more than the values of their weights (`RuntimeError` in `torch.func`)."""


class MemberIndexError(InputError, IndexError):
    """An index selects members that the ensemble does not have."""


class UnsupportedError(JaxEnsembleError):
    """A model does something that cannot be carried over exactly."""


class ParityError(JaxEnsembleError):
    """The outputs of the ported ensemble differ from PyTorch's."""


class StateError(JaxEnsembleError, RuntimeError):
    """Weights, buffers or random keys do not fit their network (`RuntimeError` in `torch.func`)."""


class RandomnessError(StateError):
    """A network draws random numbers, and has no key to draw them from."""


class EqualMembersWarning(UserWarning):
    """Members have equal weights: a file, or a module, was probably given twice."""


class ManySizesWarning(UserWarning):
    """Calls of an ensemble have compiled programs for many batch sizes, where a few programs would do."""


class NarrowIntegerWarning(UserWarning):
    """A network computes with 64-bit integers, and JAX has only 32-bit ones while x64 is off."""


class NotANumberWarning(UserWarning):
    """Members give NaN, so that the prediction of those rows, such as a class, is an arbitrary number."""


class TrainingModeWarning(UserWarning):
    """Layers are in training mode where evaluation is probably meant: a forgotten `.eval()`."""


def shorten_list(names: Sequence[str]) -> str:
    """Returns the first few of many names, and the number of all others.

    >>> shorten_list(["a", "b"]), shorten_list(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
