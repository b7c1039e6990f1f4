"""Settings of PyTorch that a capture needs, each for a while."""

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
    """BatchNorm with `momentum=None` reads a counter's value in training; the lowering takes it from the module."""
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
    """Attention's fused inference path is one opaque operation with another meaning of masks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def silence_torch() -> Iterator[None]:
    """The exporter logs and prints graphs and tracebacks on its way to an error, which is told once it is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def ignore_torch_warnings() -> Iterator[None]:
    """Torch's exporter copies its own deprecated types, which warns the user of what is not theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
