"""Ensembles of networks as one JAX program."""

import importlib.metadata
from typing import TYPE_CHECKING

from jaxensemble.lazy import lazily

if TYPE_CHECKING:
    from jaxensemble.public import *  # noqa: F403 - the names are listed once, there
else:
    __getattr__, __dir__ = lazily(__name__)

try:
    __version__ = importlib.metadata.version("jaxensemble")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"
