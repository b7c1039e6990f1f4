"""`torch.distributions` while a forward is captured."""

import contextlib
from collections.abc import Iterator

from torch.distributions import Distribution


@contextlib.contextmanager
def disable_validation() -> Iterator[None]:
    """Distributions do not check their parameters and samples, where they are not told to: it is a decision by values.

    What they compute is the same. PyTorch's own models, which a network is compared with, check as ever.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
