"""Training all members of an ensemble in one program, with any optax optimizer."""

from jaxensemble.training.fit import fit as fit
from jaxensemble.training.history import History as History
from jaxensemble.training.state import TrainState as TrainState
from jaxensemble.training.step import train_step as train_step
