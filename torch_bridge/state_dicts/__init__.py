"""State dicts for a Flax module that was written by hand: names, layouts and orders found, all of it accounted for."""

from torch_bridge.state_dicts.stack import stack_state_dicts

__all__ = ["stack_state_dicts"]
