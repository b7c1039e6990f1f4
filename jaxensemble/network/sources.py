"""`Source`: the checkpoint file from which a member's weights were read, and what was taken from the file."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

_LISTED = 4
"""Most members or names that a line lists."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Part of a checkpoint file that was taken.

    - `key`: the place of the set of weights in the file, with dots between the keys; empty for the whole file.
    - `prefix`: the text that was removed from the beginning of every name.
    - `renamed`: the names, or beginnings of names, that were replaced.
    - `left_out`: the rest of the file: keys next to the set of weights, then names within this set. `criterion.*` is
      all names that begin with `criterion.`; patterns that the caller gave are listed unchanged.
    - `not_held`: counters of batches that the file lacks. They keep the values of the factory's model, as in PyTorch's
      `load_state_dict`; PyTorch before 0.4.1 wrote no counters.

    >>> print(Selection("state_dict", "model.", {}, ("epoch", "criterion.*")))
    taken from `state_dict`; prefix `model.` removed; left out: `epoch`, `criterion.*`
    """

    key: str = ""
    prefix: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    not_held: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"taken from `{self.key}`"] if self.key else []
        parts += [f"prefix `{self.prefix}` removed"] if self.prefix else []
        parts += [_renaming_text(old, new) for old, new in self.renamed.items()]
        parts += [f"left out: {', '.join(f'`{name}`' for name in self.left_out)}"] if self.left_out else []
        names = [f"`{name}`" for name in self.not_held]
        parts += [f"not in the file, and as the factory makes it: {_shortened_list(names)}"] if names else []
        return "; ".join(parts)


def _renaming_text(old: str, new: str) -> str:
    if not old:
        return f"`{new}.` put before every name"
    return f"`{old}` renamed `{new}`" if new else f"`{old}` removed"


@dataclasses.dataclass(frozen=True)
class Source:
    """File from which a member's weights were read: its name without folders, its SHA-256, and the part taken."""

    file: str
    sha256: str
    taken: Selection


def describe_sources(sources: Sequence[Source] | None) -> list[str]:
    """Returns one line for each way in which files were read, with the members whose files were read in this way.

    There is no line for a file that holds only the weights, under the names that the model has.

    >>> taken = Selection("model_ema", left_out=("model",))
    >>> describe_sources([Source(f"seed{k}.pt", "", taken) for k in range(3)])
    ['members 0 (seed0.pt), 1 (seed1.pt), 2 (seed2.pt): taken from `model_ema`; left out: `model`']
    """
    found: dict[str, list[str]] = defaultdict(list)
    for member, source in enumerate(sources or ()):
        if str(source.taken):
            found[str(source.taken)].append(f"{member} ({source.file})")
    return [f"member{'s' if len(which) > 1 else ''} {_shortened_list(which)}: {text}" for text, which in found.items()]


def _shortened_list(which: Sequence[str]) -> str:
    return ", ".join(which if len(which) <= _LISTED else [*which[: _LISTED - 1], f"{len(which) - _LISTED + 1} more"])
