"""Errors of both packages: what is wrong, where, why, and what to do about it.

Where `torch.func` raises a built-in error for the same mistake, ours is also of that type, so that code which catches
PyTorch's goes on working.
"""


class JaxEnsembleError(Exception):
    """The base of every error that `jaxensemble` and `torch_bridge` raise themselves."""


class InputError(JaxEnsembleError, ValueError):
    """An argument, an array or a file is not what it has to be."""


class MemberError(JaxEnsembleError, ValueError, RuntimeError):
    """Members of an ensemble differ in more than the values of their weights (`RuntimeError` in `torch.func`)."""


class UnsupportedError(JaxEnsembleError):
    """A model does something that cannot be carried over exactly."""


class ParityError(JaxEnsembleError):
    """The ported ensemble does not give what PyTorch gives."""


class StateError(JaxEnsembleError, RuntimeError):
    """Weights, buffers or random keys do not fit the network that is to use them (`RuntimeError` in `torch.func`)."""


class RandomnessError(StateError):
    """Random numbers are to be drawn, and there is no key to draw them from."""


class NarrowIntegerWarning(UserWarning):
    """A network computes with 64-bit integers, and JAX has only 32-bit ones while x64 is off."""
