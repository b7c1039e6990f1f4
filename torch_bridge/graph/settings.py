"""Context managers for the settings of PyTorch that a capture needs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_bridge.compat import (
    has_cumulative_average,
)


@contextlib.contextmanager
def fix_cumulative_averages(model: nn.Module) -> Iterator[None]:
    """Gives BatchNorms with `momentum=None` a number: otherwise they read a counter's value in training.

    The lowering takes the momentum from the module.
    """
    modules: list[Any] = [module for module in model.modules() if has_cumulative_average(module)]
    try:
        for module in modules:
            module.momentum = 0.0
        yield
    finally:
        for module in modules:
            module.momentum = None


@contextlib.contextmanager
def disable_fast_paths() -> Iterator[None]:
    """Turns off attention's fused inference path: it is one opaque operation, and reads masks differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def silence_torch() -> Iterator[None]:
    """Hides the graphs and tracebacks that the exporter logs and prints before it raises an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def ignore_torch_warnings() -> Iterator[None]:
    """Hides warnings, for example those of the exporter when it copies its own deprecated types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
