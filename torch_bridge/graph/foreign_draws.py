"""Random numbers of Python and NumPy: a captured graph would repeat those of one call for ever."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import nn

_GENERATORS: dict[str, Callable[[], Any]] = {
    "Python's `random`": random.getstate,
    "numpy's `np.random`": lambda: [*_comparable_parts(np.random.get_state())],
}


def _comparable_parts(state: Any) -> Iterator[Any]:
    for part in state:
        yield part.tobytes() if isinstance(part, np.ndarray) else part


@contextlib.contextmanager
def watch_foreign_draws(model: nn.Module) -> Iterator[set[str]]:
    """Yields the set of global generators, other than PyTorch's, that the model's forward draws from within it.

    A user's own generators (`random.Random()`, `np.random.default_rng()`) are not watched.

    >>> class Flipping(nn.Module):
    ...     def forward(self, x):
    ...         return x if random.random() < 0.5 else -x
    >>> model = Flipping()
    >>> with watch_foreign_draws(model) as drawn:
    ...     _ = model(3)
    >>> drawn
    {"Python's `random`"}
    """
    found: set[str] = set()
    before: list[dict[str, Any]] = []

    def begin(*_: Any) -> None:
        before.append({name: state() for name, state in _GENERATORS.items()})

    def end(*_: Any) -> None:
        states = before.pop()
        found.update(name for name, state in _GENERATORS.items() if state() != states[name])

    hooks = model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end, always_call=True)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
