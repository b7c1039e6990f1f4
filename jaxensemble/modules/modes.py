"""Training and evaluation mode of a state."""

import warnings
from collections.abc import Collection
from typing import Literal

from jaxensemble.errors import TrainingModeWarning, shorten_list
from jaxensemble.modules.state import State, merge, split
from jaxensemble.modules.structure import Structure


def set_mode(state: State, mode: Literal["train", "eval"]) -> State:
    """Returns the state in another mode, as `nnx.Module.train` and `nnx.Module.eval` set it."""
    module = merge(*state)
    getattr(module, mode)()
    return split(module)


def warn_of_training_layers(
    structure: Structure, flags: Collection[str], finding: str, advice: str, stacklevel: int
) -> None:
    """Warns of the layers that are in training mode by one of the flags; `finding` says why that is odd."""
    layers = structure.training_layers(flags)
    if layers:
        message = f"{structure.root.type.__name__} {finding} ({shorten_list(layers)}): {advice}"
        warnings.warn(message, TrainingModeWarning, stacklevel=stacklevel)
