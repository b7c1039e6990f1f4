"""PyTorch ensembles ported to Flax, checked against PyTorch, and brought back."""

from importlib.metadata import version as _version

from torch_bridge.convert import to_ensemble, to_flax
from torch_bridge.lowering import register
from torch_bridge.parity import ParityReport, check
from torch_bridge.stacking import to_torch

__all__ = ["ParityReport", "check", "register", "to_ensemble", "to_flax", "to_torch"]

__version__ = _version("jaxensemble")
