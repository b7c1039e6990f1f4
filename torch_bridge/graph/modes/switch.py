"""Switches of the mode of models, and the mode that they are ported in."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

from flax.nnx import GraphDef
from torch import nn

from jaxensemble.errors import InputError, TrainingModeWarning, shorten_list
from jaxensemble.modules.structure import Structure


@contextlib.contextmanager
def switch_mode(models: Sequence[nn.Module], training: bool | None) -> Iterator[None]:
    """Switches all modules of the models to one mode within it; None leaves them as they are.

    >>> model = nn.Sequential(nn.Dropout())
    >>> with switch_mode([model], training=False):
    ...     print(model[0].training)
    False
    >>> model[0].training
    True
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        if training is not None:
            for model in models:
                model.train(training)  # a module may override `train` and keep a part of itself in evaluation mode
        yield
    finally:
        for module, training_flag in before:
            module.training = training_flag


PortedMode = Literal["eval", "train", "as_is"]


def ported_mode(models: Sequence[nn.Module], mode: PortedMode | None) -> contextlib.AbstractContextManager[None]:
    """Switches the models to the mode that they are ported in.

    **Raises:** `InputError` for an unknown mode.
    """
    if mode not in ("eval", "train", "as_is", None):
        raise InputError(f"`mode` must be 'eval', 'train' or 'as_is'; got {mode!r}")
    return switch_mode(models, {"eval": False, "train": True}.get(mode or "as_is"))


def warn_of_training(graphdef: GraphDef, mode: PortedMode | None) -> None:
    """Warns of layers in training mode if `mode` does not say that they are intended."""
    structure = Structure.of(graphdef)
    layers = structure.training_layers()
    if mode is None and layers:
        warnings.warn(
            f"{structure.root.type.__name__} was ported in training mode ({shorten_list(layers)}): "
            "mode='eval' ports it in evaluation mode, mode='as_is' says that this is meant",
            TrainingModeWarning,
            stacklevel=3,
        )
