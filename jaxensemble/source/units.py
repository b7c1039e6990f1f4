"""What modules become, one by one: how each is made, and with which constants."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

from flax import nnx

from jaxensemble.errors import InputError
from jaxensemble.network import Arg, Layer, Variable
from jaxensemble.source.bodies import Operand, Step
from jaxensemble.source.names import resolve

Place: TypeAlias = tuple[str, ...]
"""Where a constant stands in a class: the attributes that lead to a layer, then its option; `("", n)` is a hole."""

Kind: TypeAlias = Literal["layer", "variable", "class", "function", "chain", "list", "dict", "identity", "none"]


@dataclasses.dataclass(frozen=True)
class Make:
    """How the value of an attribute is made.

    `name` is the type of a layer or the kind of a variable, `fixed` what else of it has to be equal in modules that
    share a class; `definition` is the number of a class or function; `items` are the parts of a list, chain or dict,
    and `keys` their names.
    """

    kind: Kind
    name: str = ""
    fixed: tuple[str, ...] = ()
    definition: int = -1
    keys: tuple[str, ...] = ()
    items: tuple["Make", ...] = ()

    def walk(self) -> Iterator["Make"]:
        """It and its parts."""
        yield self
        for item in self.items:
            yield from item.walk()


NONE, IDENTITY = Make("none"), Make("identity")


@dataclasses.dataclass
class Unit:
    """What one module became: how it is made, its constants, and what those that are not given are.

    `absent` are the children that others of its class have.
    """

    make: Make
    constants: dict[Place, Arg] = dataclasses.field(default_factory=dict)
    defaults: dict[Place, Arg] = dataclasses.field(default_factory=dict)
    absent: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Argument:
    """An argument of a class: `default` counts only where it is not `required`."""

    name: str
    required: bool
    default: Arg = None


@dataclasses.dataclass
class Definition:
    """A class or function of the source.

    `run` is where the steps of the root, a list, call all of its items in turn. `slots` says which of the method's
    `parameters` each slot is; `returns` are its results. `constants` are those that all its modules agree on, `bound`
    names the arguments that stand for the others, `optional` those that say whether a child is there.
    """

    kind: Literal["class", "function"]
    label: str
    make: Make = NONE
    is_list: bool = False
    run: tuple[int, int] | None = None
    steps: tuple[Step, ...] | None = None
    slots: list[int] = dataclasses.field(default_factory=list)
    parameters: list[str] = dataclasses.field(default_factory=list)
    returns: tuple[Operand, ...] = ()
    constants: dict[Place, Arg] = dataclasses.field(default_factory=dict)
    bound: dict[Place, Argument] = dataclasses.field(default_factory=dict)
    optional: dict[str, Argument] = dataclasses.field(default_factory=dict)
    arguments: list[Argument] = dataclasses.field(default_factory=list)


def layer_unit(layer: Layer) -> Unit:
    """A layer: its options are its constants, some of which have defaults."""
    defaults = option_defaults(layer.type)
    fixed = tuple(sorted(set(layer.options) - set(defaults)))
    return Unit(
        Make("layer", layer.type, fixed),
        {(name,): value for name, value in layer.options.items()},
        {(name,): value for name, value in defaults.items()},
    )


def variable_unit(variable: Variable) -> Unit:
    """A bare array: its shape is a constant."""
    return Unit(Make("variable", variable.kind, (variable.dtype,)), {("shape",): variable.shape})


def container_unit(kind: Kind, entries: Mapping[str, Unit]) -> Unit:
    """A list, chain or dict of units, or what a class holds."""
    make = Make(kind, keys=tuple(entries), items=tuple(unit.make for unit in entries.values()))
    constants = {(name, *place): value for name, unit in entries.items() for place, value in unit.constants.items()}
    defaults = {(name, *place): value for name, unit in entries.items() for place, value in unit.defaults.items()}
    return Unit(make, constants, defaults)


def option_defaults(type_: str) -> dict[str, Arg]:
    """The options of a layer that have a number, string or truth value as their default.

    >>> option_defaults("nnx.Conv")["strides"]
    1
    """
    parameters = signature(type_).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def signature(type_: str) -> inspect.Signature:
    """What the constructor of a layer takes.

    **Raises:** `InputError` if the name is not that of an `nnx.Module`.
    """
    found = resolve(type_)
    if type_.partition(".")[0] not in ("nnx", "layers") or not (
        inspect.isclass(found) and issubclass(found, nnx.Module)
    ):
        raise InputError(f"the type of a layer has to be a layer of nnx or jaxensemble.layers; got {type_!r}")
    return inspect.signature(found.__init__)
