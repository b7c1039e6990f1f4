"""PyTorch's optimizers carried over to optax: the same updates, and the current state."""

from torch_bridge.optimizers.state import train_state as train_state
from torch_bridge.optimizers.twins import optimizer as optimizer
