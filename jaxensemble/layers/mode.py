"""The mode of a module whose forward asks for it."""

from typing import Any

from flax import nnx


class Training(nnx.Module):
    """The mode of its module: true in training mode, for `if self.training`.

    `deterministic`, named as in `nnx.Dropout` and set by `nnx.Module.train` and `eval`, is the opposite. Called
    with two values, it gives the first in training mode, else the second.

    >>> training = Training()
    >>> bool(training), training(1, 2)
    (True, 1)
    >>> training.eval()
    >>> bool(training), training(1, 2)
    (False, 2)
    """

    def __init__(self, *, deterministic: bool = False):
        self.deterministic = deterministic

    def __bool__(self) -> bool:
        return not self.deterministic

    def __call__(self, training: Any, evaluation: Any) -> Any:
        return training if self else evaluation
