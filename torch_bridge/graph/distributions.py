"""`torch.distributions` while a forward is captured."""

import contextlib
from collections.abc import Iterator

from torch.distributions import Distribution


@contextlib.contextmanager
def disable_validation() -> Iterator[None]:
    """Turns off the checks of parameters and samples by distributions that do not ask for them.

    Such a check is a decision by values, which `torch.export` cannot follow. The results stay the same.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
