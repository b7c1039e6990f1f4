"""The definitions of the source, and the units that single modules become: their recipes and their constants."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from flax import nnx

from jaxensemble.errors import InputError
from jaxensemble.network.network import Arg, Layer, Variable
from jaxensemble.network.vocabulary import resolve_name
from jaxensemble.source.names import unused_name
from jaxensemble.source.read.frames import comparison_key
from jaxensemble.source.read.steps import Operand, Step

Place: TypeAlias = tuple[str, ...]
"""The place of a constant in a class: the attributes that lead to a layer, then its option; `("", n)` is a hole."""

Kind: TypeAlias = Literal["layer", "variable", "class", "function", "chain", "list", "dict", "none"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe for the value of an attribute.

    - `name`: the type of a layer, or the kind of a variable.
    - `fixed`: other properties of a layer or variable that are equal in all modules of a class.
    - `definition`: the number of a class.
    - `items`, `keys`: the parts of a list, chain or dict, and their names.

    The function in a chain is a constant, like an option of a layer.
    """

    kind: Kind
    name: str = ""
    fixed: tuple[str, ...] = ()
    definition: int = -1
    keys: tuple[str, ...] = ()
    items: tuple["Recipe", ...] = ()

    def walk(self) -> Iterator["Recipe"]:
        """Yields the recipe and all its parts."""
        yield self
        for item in self.items:
            yield from item.walk()


NONE = Recipe("none")

MISSING = object()
"""The value of a constant in steps that a module skips."""


@dataclasses.dataclass(frozen=True)
class Function:
    """Function of the source as a constant: the number of its definition, and the label of the definition."""

    definition: int
    label: str


IDENTITY = Function(-1, "identity")
"""The function in a chain for a module of PyTorch that does nothing."""

ConstantValue: TypeAlias = Arg | Function

RESIDUAL = "+"
"""The name, among those of children, of a last step that adds the method's argument to its result."""


@dataclasses.dataclass
class Unit:
    """Result for one module: its recipe, its constants, and the defaults of constants that are not given.

    `absent` are the children that other modules of its class have, `skipped` the steps of its class that it skips.
    """

    recipe: Recipe
    constants: dict[Place, ConstantValue] = dataclasses.field(default_factory=dict)
    defaults: dict[Place, ConstantValue] = dataclasses.field(default_factory=dict)
    absent: set[str] = dataclasses.field(default_factory=set)
    skipped: frozenset[tuple[int, int]] = frozenset()


@dataclasses.dataclass
class Argument:
    """Argument of a class: `default` counts only if the argument is not `required`."""

    name: str
    required: bool
    default: "Arg | Function" = None


@dataclasses.dataclass(frozen=True)
class ScaledArgument:
    """Whole multiple of an argument, `times * argument`, or a whole part of an argument, `argument // over`."""

    argument: Argument
    times: int = 1
    over: int = 1

    def value_for(self, value: int) -> int | None:
        """Returns the value for a value of the argument; None if there is a remainder."""
        return None if value % self.over else value * self.times // self.over


@dataclasses.dataclass(frozen=True)
class ShapeItems:
    """Shape, some of whose lengths are arguments or follow from arguments."""

    items: tuple["Argument | ScaledArgument | int", ...]


@dataclasses.dataclass(frozen=True)
class HalfKernel:
    """Padding that keeps the size in a convolution with a square kernel: `kernel_size[0] // 2`."""

    kernel_size: Argument


Formula: TypeAlias = Argument | ScaledArgument | ShapeItems | HalfKernel
"""Expression of arguments for a constant that differs from module to module."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """Condition that says whether a part exists, instead of an argument for this purpose: `a != b or c != d`.

    If `equal` is set, the condition is `a == b and c == d` instead.
    """

    pairs: tuple[tuple[Argument | ScaledArgument, Argument | ScaledArgument | Arg], ...]
    equal: bool


@dataclasses.dataclass
class Definition:
    """Class or function of the source.

    - `run`: where the steps of the root, a list, call all its items in turn.
    - `slots`: for each slot, the number of the method's parameter in `parameters`.
    - `returns`: the results of the method.
    - `constants`: the constants that all its modules agree on.
    - `formulas`: what takes the place of constants that differ between its modules.
    - `optional`: what says whether a child exists; under `RESIDUAL`, whether the last step is taken.
    - `segments`: what says whether some steps are taken: a child, if it exists, or an attribute that `flags` sets.
    - `uses`: the number of modules.
    """

    kind: Literal["class", "function"]
    label: str
    recipe: Recipe = NONE
    is_list: bool = False
    uses: int = 0
    run: tuple[int, int] | None = None
    steps: tuple[Step, ...] | None = None
    slots: list[int] = dataclasses.field(default_factory=list)
    parameters: list[str] = dataclasses.field(default_factory=list)
    returns: tuple[Operand, ...] = ()
    constants: dict[Place, ConstantValue] = dataclasses.field(default_factory=dict)
    formulas: dict[Place, Formula] = dataclasses.field(default_factory=dict)
    optional: dict[str, Argument | Condition] = dataclasses.field(default_factory=dict)
    segments: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    flags: dict[str, Argument | Condition] = dataclasses.field(default_factory=dict)
    arguments: list[Argument] = dataclasses.field(default_factory=list)

    @property
    def functions(self) -> set[Function]:
        """Functions among the constants and the defaults."""
        values = [*self.constants.values(), *(argument.default for argument in self.arguments)]
        return {value for value in values if isinstance(value, Function)}

    @property
    def residual(self) -> str:
        """Attribute that says whether the last step is taken."""
        return unused_name("residual", self.recipe.keys)


def layer_unit(layer: Layer) -> Unit:
    """Returns the unit of a layer. Its constants are its options, some of which have defaults."""
    defaults = option_defaults(layer.type)
    options = shortest_options(layer)
    fixed = tuple(sorted(set(options) - set(defaults)))
    return Unit(
        Recipe("layer", layer.type, fixed),
        {(name,): value for name, value in options.items()},
        {(name,): value for name, value in defaults.items()},
    )


def function_unit(function: Function) -> Unit:
    """Returns the unit of a module that holds nothing, as an item of a chain."""
    return Unit(Recipe("function"), {("function",): function})


def class_unit(number: int, arguments: Sequence[Argument], given: Mapping[str, ConstantValue]) -> Unit:
    """Returns the unit of a module of a class. Arguments that equal their defaults are left out."""
    defaults = {(a.name,): a.default for a in arguments if not a.required}
    constants = {(a.name,): given[a.name] for a in arguments}
    differing = {
        place: value
        for place, value in constants.items()
        if place not in defaults or comparison_key(value) != comparison_key(defaults[place])
    }
    return Unit(Recipe("class", definition=number), differing, defaults)


def variable_unit(variable: Variable) -> Unit:
    """Returns the unit of a variable. Its shape is a constant."""
    fixed = (variable.dtype, str(len(variable.shape)))
    return Unit(Recipe("variable", variable.kind, fixed), {("shape",): variable.shape})


def container_unit(kind: Kind, entries: Mapping[str, Unit]) -> Unit:
    """Returns the unit of a list, chain or dict of units, or of a class with its attributes."""
    recipe = Recipe(kind, keys=tuple(entries), items=tuple(unit.recipe for unit in entries.values()))
    constants = {(name, *place): value for name, unit in entries.items() for place, value in unit.constants.items()}
    defaults = {(name, *place): value for name, unit in entries.items() for place, value in unit.defaults.items()}
    return Unit(recipe, constants, defaults)


def shortest_options(layer: Layer) -> dict[str, Arg]:
    """Returns the options of a layer in the shortest form with the same meaning.

    >>> shortest_options(Layer("conv", "nnx.Conv", {"kernel_size": (1, 1), "strides": (2, 2), "padding": "VALID"}))
    {'kernel_size': (1, 1), 'strides': 2}
    >>> shortest_options(Layer("conv", "nnx.Conv", {"kernel_size": (1, 7), "padding": ((0, 0), (3, 3))}))
    {'kernel_size': (1, 7), 'padding': (0, 3)}
    """
    options = dict(layer.options)
    if layer.type != "nnx.Conv":
        return options
    kernel, padding = options.get("kernel_size"), options.get("padding")
    if isinstance(kernel, tuple) and set(kernel) == {1} and padding in ("VALID", 0):
        del options["padding"]  # the default, "SAME", adds nothing to a kernel of one
    if isinstance(padding, tuple) and all(isinstance(p, tuple) and len(p) == 2 and p[0] == p[1] for p in padding):
        sides = tuple(p[0] for p in padding if isinstance(p, tuple))
        options["padding"] = sides[0] if len(set(sides)) == 1 else sides
    for name in ("strides", "kernel_dilation", "input_dilation"):
        value = options.get(name)
        if isinstance(value, tuple) and len(set(value)) == 1:
            options[name] = value[0]
    return options


def option_defaults(type_: str) -> dict[str, Arg]:
    """Returns the options of a layer that have a number, string, boolean or None as their default.

    >>> option_defaults("nnx.Conv")["strides"]
    1
    """
    parameters = signature(type_).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def signature(type_: str) -> inspect.Signature:
    """Returns the signature of a layer's constructor.

    **Raises:** `InputError` for a name that refers to no `nnx.Module`.
    """
    found = resolve_name(type_)
    if type_.partition(".")[0] not in ("nnx", "layers") or not (
        inspect.isclass(found) and issubclass(found, nnx.Module)
    ):
        raise InputError(f"the type of a layer has to be a layer of nnx or jaxensemble.layers; got {type_!r}")
    return inspect.signature(found.__init__)
