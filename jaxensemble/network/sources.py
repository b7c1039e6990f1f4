"""`Source`: the checkpoint file that a member's weights were read from, and what was taken of it."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

_LISTED = 4
"""Members that a line lists at most."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was taken of a checkpoint file.

    - `key`: where in the file the set of weights is, with dots between the keys; empty where it is the whole file.
    - `prefix`: what was removed from the beginning of every name.
    - `renamed`: the names, or beginnings of names, that were replaced.
    - `left_out`: what else is in the file: keys beside the set of weights, then names in it. `criterion.*` is all
      names that begin with `criterion.`; patterns that were given are listed as they are.
    - `not_held`: counters of batches that the file lacks, and that are as in the factory's model: PyTorch before 0.4.1
      wrote none, and its own `load_state_dict` does the same.

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
        parts += [_renaming(old, new) for old, new in self.renamed.items()]
        parts += [f"left out: {', '.join(f'`{name}`' for name in self.left_out)}"] if self.left_out else []
        names = [f"`{name}`" for name in self.not_held]
        parts += [f"not in the file, and as the factory makes it: {_shortened_list(names)}"] if names else []
        return "; ".join(parts)


def _renaming(old: str, new: str) -> str:
    if not old:
        return f"`{new}.` put before every name"
    return f"`{old}` renamed `{new}`" if new else f"`{old}` removed"


@dataclasses.dataclass(frozen=True)
class Source:
    """The file that a member's weights were read from: its name without folders, its SHA-256, what was taken of it."""

    file: str
    sha256: str
    taken: Selection


def describe_sources(sources: Sequence[Source] | None) -> list[str]:
    """A line for each way in which files were read, with the members whose files were read so.

    There is none for files that hold the weights and nothing else, by the names that the model has.

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
