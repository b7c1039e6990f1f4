"""Sizes of a call's arguments that stay open: the batch's, and others by the names that a user gives them."""

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.export import Dim

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.network.network import Network, Ref, Sizes, references
from jaxensemble.network.weight_map import Origin
from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments, BatchAxis, batch_axes

BATCH = "batch"
"""The name of the batch's own size."""

Dynamic: TypeAlias = Mapping[Any, Any] | None
"""`{"ids": {1: "length"}}`: by argument, the names of axes whose sizes stay open."""

Limits: TypeAlias = Mapping[str, Sizes]
"""The limits of open sizes, by name. A size without an entry has none."""


class OpenAxes(NamedTuple):
    """The open axes of an example's shapes.

    - `batch_axis`: the axis along which inputs are batched; a tuple has one for each argument; None fixes shapes.
    - `names`: for each tensor among the arguments, the names of its other open axes; empty if no tensor has any.
    - `limits`: the limits of their sizes that are known beforehand.
    """

    batch_axis: BatchAxis = 0
    names: tuple[Mapping[int, str], ...] = ()
    limits: Limits = types.MappingProxyType({})

    @classmethod
    def of(cls, arguments: Arguments, names: tuple[str, ...], batch_axis: BatchAxis, dynamic: Dynamic) -> "OpenAxes":
        """Reads what a user specifies. `names` are the names of the arguments, from `Arguments.names`.

        **Raises:** `InputError` naming everything that cannot be open.
        """
        if not dynamic:
            return cls(batch_axis)
        if not isinstance(dynamic, Mapping):
            raise InputError(f"`dynamic` must name axes by argument, as {{'ids': {{1: 'length'}}}}; got {dynamic!r}")
        problems: list[str] = []
        places = [name or f"inputs[{k}]" for k, name in enumerate(names)]
        known = {**dict(enumerate(places)), **{place: place for place in places}}
        unknown = [repr(key) for key in dynamic if key not in known]
        if unknown:
            problems.append(f"{', '.join(unknown)}: there is no such argument; there are {', '.join(places)}")
        given = {known[key]: spec for key, spec in dynamic.items() if key in known}
        found = [
            pair
            for place, value in zip(places, arguments.entries, strict=True)
            for pair in _named_axes(value, given.get(place), place, problems)
        ]
        limits: dict[str, Sizes] = {}
        batches = Example.of(arguments, OpenAxes(batch_axis)).names
        sizes: dict[str, tuple[str, int]] = {}
        for (place, tensor, axes), batch in zip(found, batches, strict=True):
            for axis, name in axes.items():
                problems += _problems(f"axis {axis} of {place}", tensor, axis, name, batch, sizes)
                if isinstance(name, Dim):
                    limits[name.__name__] = _limits(name)
        problems += [
            f"{sizes[name][0]}: {name} is {sizes[name][1]} in the example, which must be {limits[name]}"
            for name in limits
            if name in sizes and sizes[name][1] not in limits[name]
        ]
        if problems:
            listing = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
            raise InputError(f"`dynamic` must name axes by argument, as {{'ids': {{1: 'length'}}}}; got\n{listing}")
        return cls(batch_axis, tuple({k: _name(name) for k, name in axes.items()} for *_, axes in found), limits)

    @classmethod
    def of_ensemble(cls, ensemble: Ensemble) -> "OpenAxes":
        """Returns the axes that were open when an ensemble was ported."""
        network, origin = ensemble.network, ensemble.origin
        assert isinstance(origin, Origin) and network is not None
        if not network.sizes:
            return cls(origin.batch_axis)
        shapes = [network.input_shapes[name] for name in _inputs(network)]
        if origin.input_layout == "NHWC":
            shapes = [(shape[0], shape[-1], *shape[1:-1]) if len(shape) >= 3 else shape for shape in shapes]
        names = tuple({k: size for k, size in enumerate(shape) if isinstance(size, str)} for shape in shapes)
        return cls(origin.batch_axis, names, network.sizes)


class Example(NamedTuple):
    """The arguments that a forward is exported with.

    - `inputs`: the arguments.
    - `dynamic`: the names of their open axes: a dict for each tensor, None for other leaves.
    - `limits`: the limits of their sizes.
    """

    inputs: Arguments
    dynamic: Arguments
    limits: Limits

    @classmethod
    def of(cls, arguments: Arguments, opened: OpenAxes) -> "Example":
        """Prepares arguments. A batch of one is doubled, because `torch.export` takes sizes 0 and 1 for constants."""
        axes = batch_axes(arguments, opened.batch_axis)
        size = next((leaf.shape[axis] for leaf, axis in axes if axis is not None), None)
        pairs, names = iter(axes), iter(opened.names)

        def prepare(leaf: Any) -> tuple[Any, Any]:
            if not isinstance(leaf, Tensor):
                return leaf, None
            _, axis = next(pairs)
            leaf = leaf.detach()
            if axis is not None and size == 1:
                leaf = torch.cat([leaf, leaf], axis)
            return leaf, ({} if axis is None else {axis: BATCH}) | dict(next(names, {}))

        leaves, spec = pytree.tree_flatten(arguments)
        both = [prepare(leaf) for leaf in leaves]
        inputs, dynamic = (pytree.tree_unflatten(list(side), spec) for side in zip(*both, strict=True))
        return cls(inputs, dynamic, opened.limits)

    @property
    def axes(self) -> list[Mapping[int, str] | None]:
        """The names of the open axes of every input, in the order of the leaves; None for other leaves."""
        return pytree.tree_structure(self.inputs).flatten_up_to(self.dynamic)

    @property
    def names(self) -> list[Mapping[int, str]]:
        """The names of the open axes of every tensor."""
        return [axes for axes in self.axes if axes is not None]

    @property
    def batch_axes(self) -> list[int | None]:
        """The batch axis of every input, in the order of the leaves; None for inputs without one."""
        return [next((k for k, name in (axes or {}).items() if name == BATCH), None) for axes in self.axes]

    @property
    def sizes(self) -> dict[str, int]:
        """The open sizes, by name."""
        return given_sizes(self.inputs, self.names)

    @property
    def named(self) -> set[str]:
        """The names of open sizes, except the batch's."""
        return {name for axes in self.names for name in axes.values()} - {BATCH}

    def resized(self, sizes: Mapping[str, int]) -> Arguments:
        """Returns the arguments with different open sizes."""
        return resize_open_axes(self.inputs, self.names, sizes)

    def shapes(self) -> Arguments:
        """Returns the open axes in the form that `torch.export` takes."""
        made = {name: _dim(name, self.limits.get(name, Sizes())) for axes in self.names for name in axes.values()}
        return pytree.tree_map(lambda name: None if name is None else made[name], self.dynamic)


def given_sizes(inputs: Arguments, names: Iterable[Mapping[int, str]]) -> dict[str, int]:
    """Returns the open sizes of arguments by name. `names` are the names of the open axes of every tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    pairs = list(zip(tensors, names, strict=False))
    return {name: tensor.shape[axis] for tensor, axes in reversed(pairs) for axis, name in axes.items()}


def resize_open_axes(inputs: Arguments, names: Iterable[Mapping[int, str]], sizes: Mapping[str, int]) -> Arguments:
    """Returns the arguments with different open sizes. Their own entries are repeated in turn."""
    leaves, spec = pytree.tree_flatten(inputs)
    axes = iter(names)
    return pytree.tree_unflatten(
        [_resize(leaf, next(axes, {}), sizes) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )


def _resize(x: Tensor, names: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
    for axis, name in names.items():
        if name in sizes:
            x = x.index_select(axis, torch.arange(sizes[name], device=x.device) % x.shape[axis])
    return x


def _dim(name: str, sizes: Sizes) -> Any:
    if sizes.multiple > 1:
        return sizes.multiple * _dim(f"_{name}", count_multiples(sizes))
    bounds = {"min": sizes.least} if sizes.least > 2 else {}  # the exporter assumes 2 at least
    return Dim(name, **bounds, **({} if sizes.most is None else {"max": sizes.most}))


def count_multiples(sizes: Sizes) -> Sizes:
    """Returns the limits of how many multiples a size has, for sizes that are multiples of a number."""
    most = None if sizes.most is None else sizes.most // sizes.multiple
    return Sizes(-(-sizes.least // sizes.multiple), most)


def _inputs(network: Network) -> Iterator[str]:
    """Yields the names of the inputs that hold arrays, in order."""
    yield from (ref.name for ref in references(network.inputs) if isinstance(ref, Ref))


def _named_axes(
    value: Any, spec: Any, place: str, problems: list[str]
) -> Iterator[tuple[str, Tensor, Mapping[Any, Any]]]:
    """Yields every tensor of an argument, its place and the names of its axes. Adds what does not fit to `problems`."""
    match value:
        case Tensor():
            if spec is not None and not isinstance(spec, Mapping):
                problems.append(f"{place}: expected the names of axes by their numbers; got {spec!r}")
                spec = None
            yield place, value, spec or {}
        case dict() | list() | tuple():
            items = value if isinstance(value, dict) else dict(enumerate(value))
            spec = dict(enumerate(spec)) if isinstance(spec, list | tuple) else spec or {}
            if not isinstance(spec, Mapping) or not spec.keys() <= items.keys():
                problems.append(f"{place}: expected some of {list(items)}; got {spec!r}")
                spec = {}
            for key, item in items.items():
                yield from _named_axes(item, spec.get(key), f"{place}[{key!r}]", problems)
        case _ if spec:
            problems.append(f"{place}: {type(value).__name__} has no axes")


def _problems(
    what: str, tensor: Tensor, axis: Any, name: Any, batch: Mapping[int, str], sizes: dict[str, tuple[str, int]]
) -> Iterator[str]:
    if not isinstance(axis, int) or not 0 <= axis < tensor.ndim:
        yield f"{what}: there are axes 0 to {tensor.ndim - 1}"
    elif not isinstance(name, str | Dim) or not _name(name).isidentifier() or _name(name) in (BATCH, "N"):
        yield f"{what}: expected a name, such as 'length'; got {name!r}"
    elif axis in batch:
        yield f"{what}: it is the batch axis, which is open by itself"
    elif tensor.shape[axis] < 2:
        yield f"{what}: its size is {tensor.shape[axis]} in the example, which says nothing of others; take 2 or more"
    elif sizes.setdefault(_name(name), (what, tensor.shape[axis]))[1] != tensor.shape[axis]:
        first, size = sizes[_name(name)]
        yield f"{what}: {_name(name)} is {tensor.shape[axis]}, but {size} for {first}"


def _name(name: Any) -> str:
    return name.__name__ if isinstance(name, Dim) else str(name)


def _limits(dim: Any) -> Sizes:
    most = int(dim.max) if dim.max < 2**31 else None
    return Sizes(max(1, int(dim.min)), most)
