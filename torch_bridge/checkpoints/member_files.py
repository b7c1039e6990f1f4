"""Files of the members of an ensemble, and their comparison with the model."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jaxensemble.errors import InputError, MemberError
from jaxensemble.network.sources import Selection
from torch_bridge.checkpoints.advice import quote_value
from torch_bridge.checkpoints.choice import Choice
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.files import checkpoint_path, read_state_dict

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MemberFiles:
    """Files of the members, and the way to read each.

    - `numbers`: the numbers of the members in the ensemble, where the files are those of a part of them.
    """

    files: list[Path]
    expected: Expected
    choice: Choice
    numbers: Sequence[int] | None = None

    def read(self, member: int) -> tuple[dict[str, Tensor], Selection]:
        tensors, taken = read_state_dict(self.files[member], self.expected, self.choice)
        if str(taken):
            _LOG.info("%s: %s", self.files[member], taken)
        return tensors, taken

    def put_into(self, model: nn.Module, member: int) -> nn.Module:
        """Copies the tensors of a member into a model, and returns it."""
        model.load_state_dict(self.read(member)[0])
        return model

    def named(self, member: int) -> str:
        number = member if self.numbers is None else self.numbers[member]
        return f"{number} ({self.files[member].name})"

    def __len__(self) -> int:
        return len(self.files)

    def check(self) -> None:
        """Reads every file once.

        **Raises:** `InputError` with all unreadable files, for a renaming or a pattern that fits no name in any file,
        or if not all are read in the same way; `MemberError` with all differences from the model.
        """
        unreadable: dict[str, list[str]] = defaultdict(list)
        found: dict[str, list[str]] = defaultdict(list)
        ways: dict[tuple[str, str], list[str]] = defaultdict(list)
        read: list[Selection] = []
        for member, file in enumerate(self.files):
            try:
                tensors, taken = self.read(member)
            except InputError as error:
                unreadable[error.details.removeprefix(f"`{file}` ")].append(self.named(member))
                continue
            read.append(taken)
            ways[taken.key, taken.prefix].append(self.named(member))
            for problem in self.expected.problems(tensors):
                found[problem].append(self.named(member))
            del tensors  # before the next are read
        if unreadable:
            rows = [f"  {_member_list(which)}: {' '.join(text.split())}" for text, which in unreadable.items()]
            raise InputError("these checkpoints cannot be read:\n" + "\n".join(rows))
        if unused := self.choice.unused(read):
            raise InputError(
                f"{', '.join(unused)}: no name in any of these checkpoints fits it. Correct it, or leave it out. Only "
                "names of the chosen weights count, for `rename` without the prefix"
            )
        if found:
            raise MemberError(_difference_table(found))
        if len(ways) > 1:
            raise InputError(_mixed_ways(ways))


def check_paths(paths: Any, members: Sequence[int] | None = None) -> list[Path]:
    """Returns the files, or those of some members.

    **Raises:** `InputError` for anything but a sequence of files that can be read.
    """
    count_paths(paths)
    files, problems = [], []
    for path in paths if members is None else [paths[member] for member in members]:
        try:
            files.append(checkpoint_path(path))
        except InputError as error:
            problems.append(error.details)
    if problems:
        raise InputError("`paths` must be checkpoints that can be read; got\n" + "\n".join(f"  {p}" for p in problems))
    return files


def count_paths(paths: Any) -> int:
    """Returns the number of paths.

    **Raises:** `InputError` for anything but a sequence of one path or more.
    """
    if isinstance(paths, str | Path) or not isinstance(paths, Sequence):
        raise InputError(f"`paths` must be a sequence of files, one for each member; got {paths!r}")
    if not paths:
        raise InputError("`paths` must name at least one file; got none")
    return len(paths)


def _difference_table(found: Mapping[str, Sequence[str]]) -> str:
    rows = [f"  {problem}, in {_member_list(which)}" for problem, which in found.items()]
    return (
        "the checkpoints must hold the tensors of the factory's model, and no others:\n"
        + "\n".join(rows)
        + "\nMake `factory` return the network that was saved. Where dtypes differ, convert it to the dtype of the "
        "files, for example with .half(), or save the files again in the dtype of the model. prefix= and "
        'rename={"old": "new"} change names, and ignore=["pattern.*"] leaves out names that the model does not use.'
    )


def _mixed_ways(ways: Mapping[tuple[str, str], Sequence[str]]) -> str:
    rows = [
        f"  {_member_list(which)}: key={quote_value(key)}, prefix={quote_value(prefix)}"
        for (key, prefix), which in ways.items()
    ]
    return (
        "these checkpoints are not all read in the same way, and some may hold averaged weights, others the last:\n"
        + "\n".join(rows)
        + "\nChoose weights with key= and prefix=, if all files have them. To use the weights above, load the files of "
        "each way in a call of its own, and join the ensembles with Ensemble.concatenate."
    )


def _member_list(which: Sequence[str]) -> str:
    return f"member{'s' if len(which) > 1 else ''} {', '.join(which)}"
