"""PyTorch ensembles ported to Flax, checked against PyTorch, and brought back."""

from typing import TYPE_CHECKING

from jaxensemble import __version__ as __version__
from jaxensemble.lazy import lazy_attributes

if TYPE_CHECKING:
    from torch_bridge.public import *  # noqa: F403 - the names are listed once, there
else:
    __getattr__, __dir__ = lazy_attributes(__name__)
