"""Numbers in plain attributes of modules that a forward changes: the next call may compute with them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
_OWN = vars(nn.Module()).keys()  # including `training`, which the exporter knows


@dataclasses.dataclass
class Changes:
    """The attributes of a module and its submodules that calls of its forward change; false if there are none."""

    model: nn.Module
    after: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.after)

    def __str__(self) -> str:
        before = _attributes(self.model)
        return ", ".join(
            f"`{'.'.join(filter(None, place))}` from {before[place]!r} to {value!r}"
            for place, value in self.after.items()
        )

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Gives the module the attributes that it has after a call, within it."""
        before = _attributes(self.model)
        _set(self.model, self.after)
        try:
            yield
        finally:
            _set(self.model, {place: before[place] for place in self.after})


@contextlib.contextmanager
def record_changes(model: nn.Module) -> Iterator[Changes]:
    """Yields the changes by the calls within it. They are read when a call ends, because the exporter reverts them.

    >>> class Counting(nn.Linear):
    ...     calls = 0
    ...
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return super().forward(x)
    >>> import torch
    >>> model = Counting(2, 2)
    >>> model.calls = 0
    >>> with record_changes(model) as changes:
    ...     _ = model(torch.ones(1, 2))
    >>> changes.after
    {('', 'calls'): 1}
    """
    changes, before = Changes(model), _attributes(model)

    def look(*_: Any) -> None:
        after = _attributes(model)
        changes.after = {k: x for k, x in after.items() if k in before and x is not before[k] and x != before[k]}

    handle = model.register_forward_hook(look)
    try:
        yield changes
    finally:
        handle.remove()


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OWN and type(value) in _PLAIN
    }


def _set(model: nn.Module, values: dict[tuple[str, str], Any]) -> None:
    for (path, name), value in values.items():
        vars(model.get_submodule(path))[name] = value
