"""Ensembles of networks as one JAX program."""

from typing import TYPE_CHECKING

from jaxensemble.lazy import lazy_attributes
from jaxensemble.version import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:
    from jaxensemble.public import *  # noqa: F403 - the names are listed once, there
else:
    __getattr__, __dir__ = lazy_attributes(__name__)
