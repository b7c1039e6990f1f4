"""A network as plain data: its layers and variables, its calls, its inputs and outputs.

Porting makes a `Network`, `jaxensemble.source` prints the network as Flax source, and JSON keeps it without loss.
A network knows nothing of PyTorch and holds no arrays. An `Ensemble` holds the weights, under the paths named here.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from types import EllipsisType
from typing import Any, Literal, TypeAlias


@dataclasses.dataclass(frozen=True)
class Ref:
    """Result of an earlier call, or an input, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Var:
    """Array of a `Variable`, or of one leaf of a layer (`encoder.embedding`), by dotted path."""

    path: str


@dataclasses.dataclass(frozen=True)
class Dtype:
    """Dtype as an argument, by its JAX name: `float32`, `int32`, `bool_` ..."""

    name: str


@dataclasses.dataclass(frozen=True)
class Slice:
    """`start:stop:step` within an index."""

    start: "Arg" = None
    stop: "Arg" = None
    step: "Arg" = None


@dataclasses.dataclass(frozen=True)
class Func:
    """Function as an argument, by the name that the target of a call has: `nnx.relu`, `jnp.add`."""

    name: str


Arg: TypeAlias = (
    Ref | Var | Dtype | Slice | Func | bool | int | float | complex | str | EllipsisType
    | tuple["Arg", ...] | list["Arg"] | None
)  # fmt: skip
"""Argument of a call or of a layer's constructor. Tuples and lists nest."""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Number, boolean or string among the inputs or outputs: its value is fixed since the network was ported."""

    value: bool | int | float | complex | str


RecordKind: TypeAlias = Literal["dataclass", "namedtuple", "mapping"]


@dataclasses.dataclass(frozen=True)
class Record:
    """Outputs with named fields, as `jaxensemble.records` makes them: the name of the class, and the fields in order.

    `kind` is the kind of the class: a `dataclass`, a `namedtuple`, or a `mapping` with attributes.
    """

    name: str
    kind: RecordKind
    fields: Mapping[str, "ReferenceTree"]


ReferenceTree: TypeAlias = (
    Ref | Fixed | Record
    | tuple["ReferenceTree", ...] | list["ReferenceTree"] | dict[str, "ReferenceTree"] | None
)  # fmt: skip
"""The nested form of inputs or outputs. Inputs hold no records."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that an open axis may have: multiples of a number, from the least to the most (None: no upper limit).

    >>> 96 in Sizes(least=32, multiple=32), 100 in Sizes(least=32, multiple=32)
    (True, False)
    >>> print(Sizes(least=32, multiple=32))
    a multiple of 32, at least 32
    """

    least: int = 1
    most: int | None = None
    multiple: int = 1

    def __contains__(self, size: int) -> bool:
        return size >= self.least and (self.most is None or size <= self.most) and size % self.multiple == 0

    def __str__(self) -> str:
        parts = [f"a multiple of {self.multiple}"] if self.multiple > 1 else []
        parts += [f"at least {self.least}"] + ([] if self.most is None else [f"at most {self.most}"])
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Submodule that is a layer of Flax or of `jaxensemble.layers`.

    `type` names the layer's class as the source does: `nnx.Linear`, `layers.BatchNorm`. `options` are the keyword
    arguments of the constructor, without `rngs`.
    """

    path: str
    type: str
    options: Mapping[str, Arg] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Variable:
    """Array that a module holds itself: a parameter or buffer of each member, or a constant that all members share."""

    path: str
    kind: Literal["param", "buffer", "constant"]
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Call:
    """One step: `out = target(*args, **kwargs)`.

    `target` is one of

    - `layer:encoder.conv1`: the layer at that path is called;
    - an operator: `+ - * / // % ** @ & | ^ ~ neg < <= > >= == !=`, `[]` (args: value, index);
    - `=`: args are a variable, the value that a call in training mode leaves in the variable, and as a `Var` the
      `layers.Training` that says whether a call is in training mode; there is no result;
    - `.shape`: args are a value and an axis; the result is a Python int;
    - `.reshape`, `.astype` ...: a method of the first argument;
    - a function by its dotted name: `jnp.concatenate`, `jax.nn.gelu`, `nnx.relu`, `lax.rsqrt`, `ops.max_pool`.

    `scope` names the module calls that contain the step, outermost first. Each entry is the module's path, with `@n`
    appended for the n-th repeated call of the same module: `("layer1", "layer1.0", "layer1.0.relu@1")`. The steps of
    the root module itself have an empty scope.
    """

    out: str
    target: str
    args: tuple[Arg, ...] = ()
    kwargs: Mapping[str, Arg] = dataclasses.field(default_factory=dict)
    scope: tuple[str, ...] = ()


InputShape: TypeAlias = tuple[int | str | None, ...]
"""Shape of an input: see `Network`."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Computation of one member, channels-last inside.

    **Fields**

    - `name`: the class name of the root module.
    - `inputs`: one entry per argument; an argument that is itself a tuple or dict is a tree of references. An argument
      that is no array, for example a flag or None, is fixed.
    - `outputs`: the tree that is returned.
    - `layers`, `variables`: everything that holds state or is called by path, in the order of definition.
    - `calls`: the steps in the order of execution; each name is defined once.
    - `modules`: module path to (class name, kind), for every module on the way to a layer, a variable or a call.
      Kind is `sequence` for a module whose children are numbered (`nn.Sequential`, `nn.ModuleList`), `mapping` for
      named children without a class of their own (`nn.ModuleDict`), `function` for a module that holds nothing
      (`nn.ReLU`) and whose calls are in the module around, and `module` otherwise. The root has path `""`.
    - `evaluation_only`: the reason why this network has no training mode, or None if there is a training mode.
    - `input_shapes`: the shape of every input by its name. Each size is a number, None for the size of the batch, or
      the name of another open size. Sizes may be part of the computation, so an input of any other size is refused.
    - `sizes`: the sizes that each open size with a name may have.
    - `input_dtypes`: the dtype of every input by its name; all dtypes of the same kind (floating, integer ...) are
      accepted.
    - `training`: the paths of the layers that are in training mode; all other layers are in evaluation mode.
    - `arguments`: the name by which a call may give each input; `""` for an input that is given by position only.
      Empty if all inputs are given by position only.
    """

    name: str
    inputs: tuple[ReferenceTree, ...]
    outputs: ReferenceTree
    layers: tuple[Layer, ...]
    variables: tuple[Variable, ...]
    calls: tuple[Call, ...]
    modules: Mapping[str, tuple[str, str]]
    evaluation_only: str | None = None
    training: tuple[str, ...] = ()
    input_shapes: Mapping[str, InputShape] = dataclasses.field(default_factory=dict)
    input_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    sizes: Mapping[str, Sizes] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def open_inputs(self) -> dict[int, ReferenceTree]:
        """Inputs that hold arrays, by their position among all inputs: the arguments of the network's module.

        Fixed values within these inputs are None.
        """
        return {k: _drop_fixed(tree) for k, tree in enumerate(self.inputs) if next(references(tree), None)}

    @functools.cached_property
    def fixed(self) -> dict[str, bool | int | float | complex | str | None]:
        """Inputs that were no arrays when the network was ported, by place: `scale`, `pair[1]`."""
        names = self.arguments or ("",) * len(self.inputs)
        trees = {name or f"inputs[{k}]": tree for k, (name, tree) in enumerate(zip(names, self.inputs, strict=True))}
        return {place: value for name, tree in trees.items() for place, value in _fixed_leaves(tree, name)}


def with_param_dtype(network: Network, paths: Collection[str], dtype: str) -> Network:
    """Returns the network with another dtype for the parameters of some layers. Flax's default is left out.

    >>> network = Network("Net", (Ref("x"),), Ref("x"), (Layer("embed", "nnx.Embed"),), (), (), {"": ("Net", "module")})
    >>> with_param_dtype(network, {"embed"}, "bfloat16").layers[0].options
    {'param_dtype': Dtype(name='bfloat16')}
    """
    options_added: dict[str, Arg] = {} if dtype == "float32" else {"param_dtype": Dtype(dtype)}

    def change_layer(layer: Layer) -> Layer:
        if layer.path not in paths:
            return layer
        options = {name: value for name, value in layer.options.items() if name != "param_dtype"}
        return dataclasses.replace(layer, options=options | options_added)

    return dataclasses.replace(network, layers=tuple(map(change_layer, network.layers)))


def references(arg: object) -> Iterator[Ref | Var]:
    """Yields every `Ref` and `Var` within an argument or tree, depth first."""
    match arg:
        case Ref() | Var():
            yield arg
        case Slice(start, stop, step):
            yield from references((start, stop, step))
        case tuple() | list():
            for item in arg:
                yield from references(item)
        case Mapping():
            yield from references(list(arg.values()))
        case Record():
            yield from references(arg.fields)


def _drop_fixed(tree: ReferenceTree) -> ReferenceTree:
    match tree:
        case dict():
            return {key: _drop_fixed(item) for key, item in tree.items()}
        case tuple() | list():
            return [_drop_fixed(item) for item in tree]
    return tree if isinstance(tree, Ref) else None


def _fixed_leaves(tree: ReferenceTree, place: str) -> Iterator[tuple[str, Any]]:
    match tree:
        case None:
            yield place, None
        case Fixed(value):
            yield place, value
        case dict():
            for key, item in tree.items():
                yield from _fixed_leaves(item, f"{place}[{key!r}]")
        case tuple() | list():
            for k, item in enumerate(tree):
                yield from _fixed_leaves(item, f"{place}[{k}]")
