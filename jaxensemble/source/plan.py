"""What each module becomes: a class of its own, a list or dict of what it holds, a function, or steps of the module around.

Modules are looked at from the leaves up, all of one height at a time, so that whatever a module holds and calls has been
settled before it. Modules of one height whose structure and steps are the same but for numbers share a definition.
"""

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from jaxensemble.errors import InputError
from jaxensemble.network import Arg, Layer, Network, Ref, Variable
from jaxensemble.source.bodies import Body, Called, Operand, Reader, Slot, Step, ToFunction, ToLayer, ToModule, ToName
from jaxensemble.source.bodies import Hole, Local, leaves, matched_slots
from jaxensemble.source.names import resolve
from jaxensemble.source.tree import (
    Frame,
    Module,
    Path,
    frame_tree,
    freeze,
    module_tree,
    operands,
    scope_path,
    without_shapes,
    without_unused,
)

Place = tuple[str, ...]
"""Where a constant stands in a class: the attributes that lead to a layer and its option, or `("", number of the hole)`."""

SMALL = 2
"""A module that holds nothing is written out where it is called, if it has no more steps than this."""


@dataclasses.dataclass(frozen=True)
class Make:
    """How the value of an attribute is made.

    `items` are the parts of a list, chain or dict, `keys` the keys of a dict; `name` is the type of a layer or the kind of
    a variable, `fixed` what else of it cannot differ between modules that share a class; `definition` is the number of a
    class or function.
    """

    kind: Literal["layer", "variable", "class", "chain", "list", "dict", "function", "identity", "none"]
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


NONE = Make("none")


@dataclasses.dataclass
class Argument:
    """An argument of a class: `default` is absent where `required`."""

    name: str
    required: bool
    default: Arg = None


@dataclasses.dataclass
class Definition:
    """A class or function of the source.

    `slots` says which argument of the method each slot is, of `inputs` in all; `returns` are its results. `constants`
    holds those of the first module it was made for, `bound` the arguments that replace some of them.
    """

    number: int
    kind: Literal["class", "function"]
    label: str
    base: str = "nnx.Module"
    make: Make = NONE
    steps: tuple[Step, ...] | None = None
    slots: list[int] = dataclasses.field(default_factory=list)
    inputs: int = 0
    returns: tuple[Operand, ...] = ()
    constants: dict[Place, Arg] = dataclasses.field(default_factory=dict)
    bound: dict[Place, Argument] = dataclasses.field(default_factory=dict)
    arguments: list[Argument] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Unit:
    """What one module became: how it is made, and with which constants."""

    make: Make
    constants: dict[Place, Arg] = dataclasses.field(default_factory=dict)
    defaults: dict[Place, Arg] = dataclasses.field(default_factory=dict)


class Plan:
    """The definitions of a network's source, in an order in which each one names earlier ones only.

    The last definition is the root class; `body` is the root's own.
    """

    def __init__(self, network: Network):
        calls, self.outputs = without_shapes(network.calls, network.outputs)
        self.calls = without_unused(calls, self.outputs)
        self.network = network
        self.root = module_tree(network)
        self.frames = frame_tree(self.calls, self.root)
        self.definitions: list[Definition] = []
        self._units: dict[Path, Unit] = {}
        self._called: dict[int, Called] = {}
        self._last_use = self._last_uses()
        self._position = {call.out: k for k, call in enumerate(self.calls)}
        self._make_all()

    def _last_uses(self) -> dict[str, int]:
        last = {}
        for k, call in enumerate(self.calls):
            last |= {ref.name: k for ref in operands((call.args, dict(call.kwargs))) if isinstance(ref, Ref)}
        return last | {ref.name: len(self.calls) for ref in operands(self.outputs) if isinstance(ref, Ref)}

    def _make_all(self) -> None:
        by_height: dict[int, list[Module]] = defaultdict(list)
        for module in self.root.walk():
            by_height[module.height].append(module)
        for height in sorted(by_height):
            self._make_level([module for module in by_height[height] if module.path])
        self._make_root()

    def _make_level(self, modules: list[Module]) -> None:
        frames: dict[Path, list[Frame]] = defaultdict(list)
        for frame in self.frames.frames():
            frames[frame.path].append(frame)
        candidates = []
        for module in modules:
            if module.layer:
                self._units[module.path] = layer_unit(module.layer)
                continue
            bodies = [Reader(module.path).read(frame, self._look_up) for frame in frames[module.path]]
            if bodies and not self._can_be_called(module, bodies, frames[module.path]):
                self._dissolve(frames[module.path])
                bodies = []
            candidates.append((module, frames[module.path] if bodies else [], bodies))
        self._define(candidates)

    def _look_up(self, frame: Frame) -> Called:
        return self._called[id(frame)]

    # Whether a module can have a method

    def _can_be_called(self, module: Module, bodies: list[Body], frames: list[Frame]) -> bool:
        first = bodies[0]
        same = all(b.steps == first.steps and list(map(freeze, b.constants)) == list(map(freeze, first.constants)) for b in bodies)
        if not same or not self._results(bodies, frames):
            return False
        if not module.holds:
            return True
        if module.is_numbered:
            return chain_order(first, self._results(bodies, frames)) is not None
        return module.kind == "module"

    def _results(self, bodies: list[Body], frames: list[Frame]) -> tuple[int, ...]:
        """Which of the bodies' values are used after any of the frames."""
        used = set()
        for body, frame in zip(bodies, frames, strict=True):
            end = max(self._position[call.out] for call in frame.calls())
            used |= {k for k, name in enumerate(body.names) if self._last_use.get(name, -1) > end}
        return tuple(sorted(used))

    def _dissolve(self, frames: Iterable[Frame]) -> None:
        """Puts the steps of frames in their place, those of small functions within them too."""
        gone = {id(frame) for frame in frames}

        def tidy(frame: Frame) -> None:
            items = []
            for item in frame.items:
                if isinstance(item, Frame):
                    tidy(item)
                    items += item.items if id(item) in gone else [item]
                else:
                    items.append(item)
            frame.items = items

        inner = [item for frame in frames for item in frame.items if isinstance(item, Frame) and self._is_small(item)]
        gone |= {id(frame) for frame in inner}
        tidy(self.frames)

    def _is_small(self, frame: Frame) -> bool:
        called = self._called.get(id(frame))
        target = called.target(frame.path) if called else None
        if not isinstance(target, ToFunction):
            return False
        return len(self.definitions[target.definition].steps or ()) <= SMALL

    # Definitions

    def _define(self, candidates: list[tuple[Module, list[Frame], list[Body]]]) -> None:
        groups: dict[object, list[tuple[Module, list[Frame], list[Body], Unit]]] = defaultdict(list)
        for module, frames, bodies in candidates:
            unit = self._structure(module)
            if not module.holds:
                self._define_function(module, frames, bodies)
            elif bodies and module.is_numbered and module.class_name in ("", "Sequential"):
                self._make_chain(module, frames, bodies, unit)
            elif module.kind == "module" or (bodies and module.is_numbered):
                key = (module.class_name, unit.make, bodies[0].steps if bodies else None)
                groups[key].append((module, frames, bodies, unit))
            else:
                self._units[module.path] = unit
        for members in groups.values():
            self._define_class(members)

    def _structure(self, module: Module) -> Unit:
        """How what a module holds is made, as a list where it is numbered and as a dict elsewhere."""
        entries: dict[str, Unit] = {name: self._units.get(child.path, Unit(NONE)) for name, child in module.children.items()}
        if module.is_numbered:
            count = 1 + max(map(int, entries), default=-1)
            entries = {str(k): entries.get(str(k), Unit(NONE)) for k in range(count)}
            kind = "list"
        else:
            entries = {name: unit for name, unit in entries.items() if module.children[name].holds}
            entries |= {name: variable_unit(variable) for name, variable in module.variables.items()}
            kind = "dict"
        return joined(kind, entries)

    def _define_function(self, module: Module, frames: list[Frame], bodies: list[Body]) -> None:
        if not bodies:
            self._units[module.path] = Unit(NONE)
            return
        results = self._results(bodies, frames)
        slots, arguments = matched_slots(bodies)
        constants = {("", str(k)): constant for k, constant in enumerate(bodies[0].constants)}
        made = Definition(
            len(self.definitions), "function", function_label(module, bodies[0]), steps=bodies[0].steps, slots=slots,
            inputs=len(arguments[0]), returns=tuple(map(Local, results)), constants=constants,
        )  # fmt: skip
        key = (made.steps, tuple(slots), results, tuple(map(freeze, bodies[0].constants)))
        for old in self.definitions:
            if old.kind == "function" and key == (
                old.steps,
                tuple(old.slots),
                tuple(r.index for r in old.returns if isinstance(r, Local)),
                tuple(map(freeze, old.constants.values())),
            ):
                made = old
                break
        else:
            self.definitions.append(made)
        number = made.number
        self._units[module.path] = Unit(Make("function", definition=number))
        for frame, body, inputs in zip(frames, bodies, arguments, strict=True):
            outputs = [body.names[k] for k in results]
            self._called[id(frame)] = Called(lambda path: ToFunction(number), inputs, outputs)
        self._dissolve([frame for frame in frames if self._is_small(frame) and not self._stands_in_list(module)])

    def _stands_in_list(self, module: Module) -> bool:
        parent = self.root
        for name in module.path[:-1]:
            parent = parent.children[name]
        return parent.is_numbered and parent.holds and bool(parent.path)

    def _make_chain(self, module: Module, frames: list[Frame], bodies: list[Body], unit: Unit) -> None:
        unit = dataclasses.replace(unit, make=self._chained(unit.make))
        self._units[module.path] = unit
        for frame, body in zip(frames, bodies, strict=True):
            (result,) = self._results(bodies, frames)
            self._called[id(frame)] = Called(lambda path: ToModule(path, -1), body.slots[:1], [body.names[result]])

    def _chained(self, make: Make) -> Make:
        items = tuple(Make("identity") if item == NONE else item for item in make.items)
        return dataclasses.replace(make, kind="chain", items=items)

    def _define_class(self, members: list[tuple[Module, list[Frame], list[Body], Unit]]) -> None:
        frames = [frame for _, own, _, _ in members for frame in own]
        bodies = [body for _, _, own, _ in members for body in own]
        results = self._results(bodies, frames)
        slots, inputs = matched_slots(bodies) if bodies else ([], [])
        module, _, own, unit = members[0]
        made = Definition(
            len(self.definitions), "class", module.class_name,
            base="nnx.List" if module.is_numbered else "nnx.Module",
            make=self._chained(unit.make) if module.is_numbered else unit.make,
            steps=own[0].steps if own else None, slots=slots, inputs=len(inputs[0]) if inputs else 0,
            returns=tuple(map(Local, results)),
        )  # fmt: skip
        self.definitions.append(made)
        rows = [with_holes(unit, own) for _, _, own, unit in members]
        values = share_constants(made, rows, [hint_of(own) for _, _, own, _ in members][0])
        for (member, _, _, _), given in zip(members, values, strict=True):
            constants = {(name,): value for name, value in given.items()}
            self._units[member.path] = Unit(Make("class", definition=made.number), constants)
        for frame, body, arguments in zip(frames, bodies, inputs, strict=True):
            outputs = [body.names[k] for k in results]
            self._called[id(frame)] = Called(lambda path: ToModule(path, made.number), arguments, outputs)

    def _make_root(self) -> None:
        reader = Reader(())
        small = [f for f in self.frames.items if isinstance(f, Frame) and self._is_small(f)]
        if not (self.root.is_numbered and self.root.holds):
            self._dissolve(small)
        body = reader.read(self.frames, self._look_up)
        self.returns = self._read_tree(reader, self.outputs)
        unit = self._structure(self.root)
        numbered = self.root.is_numbered and bool(self.root.children)
        order = chain_order(body, [r.index for r in [self.returns] if isinstance(r, Local)]) if numbered else None
        if numbered and order is None and small:
            self._dissolve(small)
            reader = Reader(())
            body = reader.read(self.frames, self._look_up)
            self.returns = self._read_tree(reader, self.outputs)
        self.body = body
        make = self._chained(unit.make) if order is not None else unit.make
        constants = with_holes(unit, [body])[0]
        self.definitions.append(
            Definition(
                len(self.definitions), "class", self.network.name, base="nnx.List" if numbered else "nnx.Module",
                make=make, steps=body.steps, slots=list(range(len(body.slots))), inputs=len(self.network.inputs),
                constants=constants,
            )  # fmt: skip
        )

    def _read_tree(self, reader: Reader, tree):
        match tree:
            case dict():
                return {key: self._read_tree(reader, value) for key, value in tree.items()}
            case tuple() | list():
                return type(tree)(self._read_tree(reader, item) for item in tree)
        return reader.operand(tree)


def layer_unit(layer: Layer) -> Unit:
    """A layer: its options are constants, some of which have defaults."""
    defaults = option_defaults(layer.type)
    fixed = tuple(sorted(set(layer.options) - set(defaults)))
    return Unit(
        Make("layer", layer.type, fixed),
        {(name,): value for name, value in layer.options.items()},
        {(name,): value for name, value in defaults.items()},
    )


def option_defaults(type_: str) -> dict[str, Arg]:
    """The options of a layer that have a number, string or truth value as their default."""
    parameters = signature(type_).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str | None)}


def signature(type_: str) -> inspect.Signature:
    """What the constructor of a layer takes.

    **Raises**

    `InputError` if the name is not that of a class.
    """
    found = resolve(type_)
    if not inspect.isclass(found):
        raise InputError(f"a layer has to be a class; got {type_!r}")
    return inspect.signature(found.__init__)


def variable_unit(variable: Variable) -> Unit:
    return Unit(Make("variable", variable.kind, (variable.dtype,)), {("shape",): variable.shape})


def joined(kind: Literal["list", "dict"], entries: dict[str, Unit]) -> Unit:
    """One unit from those of the parts."""
    make = Make(kind, keys=tuple(entries), items=tuple(unit.make for unit in entries.values()))
    constants = {(name, *place): v for name, unit in entries.items() for place, v in unit.constants.items()}
    defaults = {(name, *place): v for name, unit in entries.items() for place, v in unit.defaults.items()}
    return Unit(make, constants, defaults)


def chain_order(body: Body, results: Iterable[int]) -> list[str] | None:
    """The children of a numbered module in the order of their calls, if all that its body does is chain them."""
    children, carried = [], None
    for k, step in enumerate(body.steps):
        if step.outs != 1 or step.kwargs or len(step.args) != 1 or step.args[0] != (Slot(0) if carried is None else carried):
            return None
        if not isinstance(step.target, ToLayer | ToModule | ToFunction):
            return None
        carried = Local(k)
    return children if carried and list(results) == [carried.index] else None


def function_label(module: Module, body: Body) -> str:
    names = [step.target.name for step in body.steps if isinstance(step.target, ToName)]
    return names[0].rpartition(".")[2] if len(names) == 1 and names[0][-1].isalnum() else module.class_name


def with_holes(unit: Unit, bodies: list[Body]) -> tuple[dict[Place, Arg], dict[Place, Arg]]:
    holes = {("", str(k)): constant for k, constant in enumerate(bodies[0].constants)} if bodies else {}
    return unit.constants | holes, unit.defaults


def hint_of(bodies: list[Body]) -> list[str]:
    return bodies[0].hints if bodies else []
