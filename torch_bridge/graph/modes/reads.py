"""Modules whose mode a forward reads."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

_WATCH = threading.RLock()


@contextlib.contextmanager
def watch_mode_reads() -> Iterator[list[nn.Module]]:
    """Yields the list of modules whose mode is read within, in order, without those that the exporter makes.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with watch_mode_reads() as read:
    ...     _ = model(torch.ones(1, 2))
    >>> read
    [Dropout(p=0.5, inplace=False)]
    """
    read = []

    def get(module: nn.Module) -> bool:
        if type(module) is not nn.Module and not isinstance(module, fx.GraphModule):
            read.append(module)
        held: dict[str, Any] = vars(module)
        if "training" in held:
            return held["training"]
        return bool(module.__getattr__("training"))  # for example, modules of TorchScript

    def put(module: nn.Module, training: bool) -> None:
        vars(module)["training"] = training

    with _WATCH:
        before = vars(nn.Module).get("training")
        nn.Module.training = property(get, put)  # type: ignore[assignment]
        try:
            yield read
        finally:
            if before is None:
                del nn.Module.training
            else:
                nn.Module.training = before


def has_hidden_mode(module: nn.Module) -> bool:
    """Returns whether a module may depend on its mode without a read that can be watched."""
    kind = type(module)
    own = "train" in vars(module) or (kind.train, kind.__setattr__) != (nn.Module.train, nn.Module.__setattr__)
    names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
    return own or not {"__dict__", "vars"}.isdisjoint(names)
