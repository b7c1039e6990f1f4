"""The arguments of one call that a network is captured with, and their batch axes."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from jaxensemble.errors import InputError
from jaxensemble.network.arguments import ENSEMBLE_ARGUMENTS
from torch_bridge.arrays import unsupported_kind
from torch_bridge.compat import pytree

BatchAxis = int | None | tuple[int | None, ...]

FIXED = (bool, int, float, complex, str, type(None))
"""Types of arguments other than tensors. Their values are fixed in the ported network."""


class Arguments(NamedTuple):
    """The arguments of one call, by position and by name: tensors, values of `FIXED` types, and trees of these.

    >>> Arguments((1, 2), {"base": 5}).call(lambda x, y, base: x + y * base)
    11
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any, named: Mapping[str, Any] | None = None, what: str = "example_inputs") -> "Arguments":
        """Checks the arguments that a user gives. An `Arguments` is returned as it is.

        **Raises:** `InputError` naming everything that cannot be an argument of a ported network.
        """
        if isinstance(inputs, cls):
            return inputs
        if not isinstance(inputs, tuple) or not (inputs or named):
            foreign = hasattr(inputs, "__dlpack__") and not isinstance(inputs, Tensor)
            raise InputError(
                f"`{what}` must be a tuple with the positional arguments of one call; got {type(inputs).__name__}. For "
                f"a single tensor x, pass (x,). {_advice([inputs]) if foreign else ''}".rstrip()
            )
        arguments = cls(inputs, dict(named or {}))
        own = sorted(ENSEMBLE_ARGUMENTS & arguments.named.keys())
        if own:
            raise InputError(
                f"{', '.join(own)}: an ensemble has arguments of its own by such names; give the example by position"
            )
        strangers = [
            (leaf, place)
            for place, value in zip(arguments.places, arguments.entries, strict=True)
            for leaf in pytree.tree_leaves(value)
            if not (isinstance(leaf, Tensor) or type(leaf) in FIXED)
        ]
        others = [f"{type(leaf).__name__} in {place}" for leaf, place in strangers]
        others += [
            kind
            for leaf in pytree.tree_leaves(arguments)
            if isinstance(leaf, Tensor) and (kind := unsupported_kind(leaf))
        ]
        if others:
            raise InputError(
                f"`{what}` must hold tensors, and numbers, strings and None, which are fixed in the ported network; "
                f"got {', '.join(others)}. {_advice([leaf for leaf, _ in strangers])}"
            )
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(arguments)):
            raise InputError(f"`{what}` must hold a tensor: a network of none has nothing to compute with")
        return arguments

    @property
    def entries(self) -> tuple[Any, ...]:
        """All arguments, first by position, then by name, in the order of the ported network's inputs."""
        return (*self.positional, *self.named.values())

    @property
    def places(self) -> list[str]:
        """Names of the arguments in errors."""
        return [*(f"input {k}" for k in range(len(self.positional))), *(f"`{name}`" for name in self.named)]

    def replaced(self, entries: Sequence[Any]) -> "Arguments":
        """Returns the arguments with different values."""
        count = len(self.positional)
        return Arguments(tuple(entries[:count]), dict(zip(self.named, entries[count:], strict=True)))

    def call(self, function: Callable[..., Any]) -> Any:
        """Calls a function with the arguments."""
        return function(*self.positional, **self.named)

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the name of each argument among the forward's parameters; empty for arguments of `*args`."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        parameters = inspect.signature(model.forward).parameters.values()
        names = [parameter.name if parameter.kind in kinds else "" for parameter in parameters]
        by_position = [*names, *[""] * len(self.positional)][: len(self.positional)]
        return (*("" if name in ENSEMBLE_ARGUMENTS else name for name in by_position), *self.named)

    def by_parameter(self, model: nn.Module) -> dict[str, Any]:
        """Returns the arguments by the forward's parameters. The arguments of `*args` are one tuple."""
        return self.call(inspect.signature(model.forward).bind).arguments


def _advice(strangers: Sequence[Any]) -> str:
    """Returns what to write instead of values that cannot be arguments."""
    if any(isinstance(leaf, np.ndarray) for leaf in strangers):
        return "Of an array of NumPy, write torch.from_numpy(x)."
    if any(isinstance(leaf, np.generic) for leaf in strangers):
        return "Of a number of NumPy, write x.item()."
    if any(hasattr(leaf, "__dlpack__") for leaf in strangers):
        return "Of an array of another library, write torch.from_dlpack(x)."
    return "Leave it out where it has a default, or fix it in a module around this one."


@contextlib.contextmanager
def declare_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Adds names to the signature of a forward with `**kwargs`: otherwise the exporter counts them twice."""
    forward, signature = model.forward, inspect.signature(model.forward)
    known = signature.parameters
    own = [p for p in known.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name not in signature.parameters
    ]
    if len(own) == len(known) or not more:
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    before = vars(model).get("forward")
    named.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    vars(model)["forward"] = named
    try:
        yield
    finally:
        vars(model).pop("forward")
        vars(model).update({} if before is None else {"forward": before})


def map_tensors(function: Callable[[Tensor], Any], inputs: Any) -> Any:
    """Returns inputs with a function applied to every tensor."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)


def axes_of(arguments: Arguments, batch_axis: BatchAxis) -> tuple[int | None, ...]:
    """Returns the batch axis of each argument."""
    return batch_axis if isinstance(batch_axis, tuple) else (batch_axis,) * len(arguments.entries)


def batch_axes(arguments: Arguments, batch_axis: BatchAxis) -> list[tuple[Tensor, int | None]]:
    """Returns every tensor of the arguments with its batch axis; None for a tensor without rows of the batch.

    **Raises:** `InputError` if `batch_axis` does not fit the arguments.
    """
    entries, axes = arguments.entries, axes_of(arguments, batch_axis)
    if len(axes) != len(entries):
        raise InputError(
            f"`batch_axis` must hold one axis for each of the {len(entries)} example inputs; got {len(axes)}."
        )
    if not all(axis is None or (isinstance(axis, int) and axis >= 0) for axis in axes):
        raise InputError(
            f"`batch_axis` must be None or an axis counted from 0, or one for each input; got {batch_axis!r}."
        )
    size = _batch_size(entries, axes, explicit=isinstance(batch_axis, tuple))
    if size == 0:
        raise InputError("the example inputs must have at least one row, of which the network is captured; got none.")
    if size is None and any(axes):
        raise InputError(f"`batch_axis` is {batch_axis!r}, but no example input has as many axes.")
    return [
        (leaf, axis if axis is not None and leaf.ndim > axis and leaf.shape[axis] == size else None)
        for value, axis in zip(entries, axes, strict=True)
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor)
    ]


def _batch_size(inputs: tuple[Any, ...], axes: tuple[int | None, ...], *, explicit: bool) -> int | None:
    """Returns the batch size of the first tensor. Tensors of a different size have no batch."""
    sizes = [
        (index, leaf.shape[axis])
        for index, (value, axis) in enumerate(zip(inputs, axes, strict=True))
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and axis is not None and leaf.ndim > axis
    ]
    if explicit and len({size for _, size in sizes}) > 1:
        listing = ", ".join(f"input {index}: {size}" for index, size in sizes)
        raise InputError(f"the batch sizes along `batch_axis` must be equal; got {listing}.")
    return sizes[0][1] if sizes else None
