"""Checkpoint files: state dicts read from them safely, and ensembles streamed out of them."""

from torch_bridge.checkpoints.choice import Choice
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.files import read_state_dict
from torch_bridge.checkpoints.load import load_ensemble, load_members

__all__ = ["Choice", "Expected", "load_ensemble", "load_members", "read_state_dict"]
