"""The result for each module: a class, a list or dict of its content, a function, or steps of the module around.

Modules are settled from the leaves up, level by level, so that the content and the calls of a module are settled before
the module. Modules of one level whose structure and steps are equal except for numbers share a class.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxensemble.network.network import Fixed, Network, Record, Ref
from jaxensemble.network.validation import validate_network
from jaxensemble.source.names import TAKEN, make_identifier, unused_name
from jaxensemble.source.plan.arguments import Sharing
from jaxensemble.source.plan.candidates import (
    Candidate,
    Members,
    chain_children,
    chain_run,
    chain_steps,
    children_in_turn,
    function_label,
    hole_constants,
    join_by_last_functions,
    join_by_optional_parts,
)
from jaxensemble.source.plan.definitions import (
    IDENTITY,
    NONE,
    Definition,
    Function,
    Unit,
    class_unit,
    container_unit,
    function_unit,
    layer_unit,
    variable_unit,
)
from jaxensemble.source.plan.loops import FEWEST_CHILDREN, split_number
from jaxensemble.source.read.frames import (
    Frame,
    comparison_key,
    drop_unused,
    fill_gaps,
    frame_tree,
    inline_shapes,
    operands,
    splice_frames,
    trim_frames,
)
from jaxensemble.source.read.modules import Module, Path, module_levels, module_tree
from jaxensemble.source.read.steps import (
    Body,
    FrameCall,
    Local,
    Reader,
    Slot,
    Step,
    Target,
    ToFunction,
    ToModule,
    match_slots,
    returned_uses,
)
from jaxensemble.source.read.tidy import tidy_calls

SMALL = 2
"""The most steps of a module without content that is written out where it is called."""

SHORT = 3
"""The most steps in a call of a container of PyTorch with named children that becomes a dict."""

CHAIN = -1
"""The definition of a module that only calls its children one after the other."""


class Outline:
    """Definitions of a network's source, each after the definitions that it names; the last one is the root's.

    `root_body` fills the slots of the root; `root_returns` are its results, nested like the outputs.
    """

    def __init__(self, network: Network):
        validate_network(network)
        calls, self.outputs = inline_shapes(network.calls, network.outputs)
        self.calls = tidy_calls(drop_unused(calls, self.outputs), network, self.outputs)
        self.network = network
        self.root = module_tree(network)
        self.top = frame_tree(self.calls, self.root)
        fill_gaps(self.top, self.root)
        self._keep_long_mappings()
        self.definitions: list[Definition] = []
        self._functions: dict[object, int] = {}
        self._units: dict[Path, Unit] = {}
        self._frame_calls: dict[int, FrameCall] = {}
        self._position = {call.out: k for k, call in enumerate(self.calls)}
        self._last_use = self._last_uses()
        self._settle_all()
        self._settle_root()

    def _last_uses(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for k, call in enumerate(self.calls):
            last |= {ref.name: k for ref in operands((call.args, dict(call.kwargs))) if isinstance(ref, Ref)}
        return last | {ref.name: len(self.calls) for ref in operands(self.outputs) if isinstance(ref, Ref)}

    def _keep_long_mappings(self) -> None:
        """Gives a method to mappings that are called, for example `nn.Sequential(OrderedDict(...))`, if they are long.

        Mappings in a list get one too, as the list may call its items one after the other.
        """
        for frame in self.top.frames():
            module = self.root.descendant(frame.path)
            if module.kind == "mapping" and (len(frame.items) > SHORT or self._is_in_chain(module)):
                module.kind = "module"

    def _settle_all(self) -> None:
        levels: dict[int, list[Module]] = defaultdict(list)
        for module, level in module_levels(self.root):
            levels[level].append(module)
        for level in sorted(levels):
            self._settle(levels[level])

    def _settle(self, modules: list[Module]) -> None:
        """Settles the modules of one level."""
        frames: dict[Path, list[Frame]] = defaultdict(list)
        for frame in self.top.frames():
            frames[frame.path].append(frame)
        classes: dict[object, Members] = defaultdict(list)
        for module in modules:
            if module.layer:
                self._units[module.path] = layer_unit(module.layer)
                continue
            found = self._candidate(module, frames[module.path])
            unit = self._structure(module, found)
            if not module.has_content:
                self._settle_function(found)
            elif found.bodies and module.is_numbered and module.has_no_class:
                self._settle_chain(found, unit)
            elif module.kind == "module" or (found.bodies and module.is_numbered):
                if module.is_numbered:
                    found = dataclasses.replace(found, bodies=list(map(_chain_body, found.bodies)))
                key = (module.class_name, unit.recipe, found.bodies[0].steps if found.bodies else None)
                classes[key].append((found, unit))
            else:
                self._units[module.path] = unit
        groups = join_by_last_functions(list(classes.values()))
        for members in join_by_optional_parts(groups, self._results_of):
            self._settle_class(members)

    # Methods of modules

    def _candidate(self, module: Module, frames: list[Frame]) -> Candidate:
        if not (module.is_numbered and module.has_content):
            for frame in frames:
                self._open_small(frame)
        else:
            trim_frames(self.top, {id(frame) for frame in frames})
        found = Candidate(module, frames, [self._read_body(frame) for frame in frames])
        if found.bodies and self._is_dict(found):
            module.kind = "mapping"
        if frames and not self._can_be_called(found):
            self._dissolve(frames)
            return Candidate(module, [], [])
        return found

    def _is_dict(self, found: Candidate) -> bool:
        """Returns whether a container of PyTorch only calls children with numbered names in turn."""
        module, names = found.module, children_in_turn(found.bodies[0])
        stems = {name and name[0] for name in map(split_number, names)}
        same = len({self._units[module.children[name].path].recipe for name in names}) == 1
        return module.has_no_class and len(names) >= FEWEST_CHILDREN and len(stems) == 1 and None not in stems and same

    def _read_body(self, frame: Frame) -> Body:
        return Reader(frame.path).read(frame, lambda inner: self._frame_calls[id(inner)])

    def _can_be_called(self, found: Candidate) -> bool:
        first, results = found.bodies[0], self._results(found.bodies, found.frames)
        if len({(body.steps, tuple(map(comparison_key, body.constants))) for body in found.bodies}) > 1 or not results:
            return False
        if not found.module.has_content:
            return True
        if found.module.is_numbered:
            return chain_children(found.module, first, results) is not None
        return found.module.kind == "module"

    def _results(self, bodies: Sequence[Body], frames: Sequence[Frame]) -> tuple[int, ...]:
        """Returns the numbers of the bodies' values that are used after any of the frames."""
        used = set()
        for body, frame in zip(bodies, frames, strict=True):
            end = max(self._position[call.out] for call in frame.calls())
            used |= {k for k, name in enumerate(body.names) if self._last_use.get(name, -1) > end}
        return tuple(sorted(used))

    def _results_of(self, members: Members) -> tuple[int, ...]:
        """Returns the numbers of the values that are used after any call of several modules."""
        bodies = [body for found, _ in members for body in found.bodies]
        return self._results(bodies, [frame for found, _ in members for frame in found.frames])

    def _dissolve(self, frames: Iterable[Frame]) -> None:
        """Replaces frames by their steps; small functions directly within are replaced by their steps too."""
        for frame in frames:
            self._open_small(frame)
        splice_frames(self.top, {id(frame) for frame in frames})

    def _open_small(self, frame: Frame) -> None:
        """Replaces the frames of small functions directly within a frame by their steps."""
        splice_frames(frame, {id(item) for item in frame.items if isinstance(item, Frame) and self._is_small(item)})

    def _is_small(self, frame: Frame) -> bool:
        called = self._frame_calls.get(id(frame))
        target = called.target(frame.path) if called else None
        if not isinstance(target, ToFunction):
            return False
        return (
            self.root.descendant(frame.path).is_filler or len(self.definitions[target.definition].steps or ()) <= SMALL
        )

    # Results for modules

    def _structure(self, module: Module, found: Candidate | None = None) -> Unit:
        """Returns the unit of a module's content: a list or chain for a numbered module, a dict for any other."""
        units = {name: self._units.get(child.path, Unit(NONE)) for name, child in module.children.items()}
        if not module.is_numbered:
            held = {name: unit for name, unit in units.items() if module.children[name].has_content}
            return container_unit("dict", held | {name: variable_unit(v) for name, v in module.variables.items()})
        called = (found is not None and bool(found.bodies) and chain_children(module, found.bodies[0])) or {}
        entries = {}
        for name in map(str, range(1 + max(map(int, units), default=-1))):
            entries[name] = units.get(name, Unit(NONE))
            if not (name in module.children and module.children[name].has_content) and name not in called:
                entries[name] = function_unit(IDENTITY) if called else Unit(NONE)
        return container_unit("chain" if called else "list", entries)

    def _settle_function(self, found: Candidate) -> None:
        if not found.bodies:
            return
        results = self._results(found.bodies, found.frames)
        slots, inputs = match_slots(found.bodies)
        body = found.bodies[0]
        key = (body.steps, tuple(slots), results, tuple(map(comparison_key, body.constants)))
        label = function_label(found.module, body)
        if key not in self._functions:
            self._functions[key] = len(self.definitions)
            self.definitions.append(
                Definition(
                    "function",
                    label,
                    steps=body.steps,
                    slots=slots,
                    parameters=self._parameters(inputs),
                    returns=tuple(map(Local, results)),
                    constants=hole_constants(body),
                )
            )
        number = self._functions[key]
        self._units[found.module.path] = function_unit(Function(number, self.definitions[number].label))
        self._record_call(found, lambda path: ToFunction(path, number), inputs, results)
        if not self._is_in_chain(found.module):
            self._dissolve([frame for frame in found.frames if self._is_small(frame)])

    def _parameters(self, calls: Sequence[Sequence[str]]) -> list[str]:
        """Returns names for a method's parameters. A parameter that is always an input of the network has its name."""
        names: list[str] = []
        inputs = {ref.name for ref in operands(self.network.inputs) if isinstance(ref, Ref)}
        for k, column in enumerate(zip(*calls, strict=True)):
            own = make_identifier(column[0], "") if len(set(column)) == 1 and column[0] in inputs and k else ""
            names.append(unused_name(own or "xyz"[k : k + 1] or f"x{k + 1}", {*TAKEN, *names}))
        return names

    def _is_in_chain(self, module: Module) -> bool:
        """Returns whether the module may still become an item of a list that is called."""
        parent = self.root.descendant(module.path[:-1])
        return parent.is_numbered and parent.has_content

    def _settle_chain(self, found: Candidate, unit: Unit) -> None:
        self._units[found.module.path] = unit
        results = self._results(found.bodies, found.frames)
        self._record_call(found, lambda path: ToModule(path, CHAIN), [body.slots[:1] for body in found.bodies], results)

    def _settle_class(self, members: Members) -> None:
        bodies = [body for found, _ in members for body in found.bodies]
        first, unit = members[0]
        results = self._results_of(members)
        slots, inputs = match_slots(bodies) if bodies else ([], [])
        made = Definition(
            "class",
            first.module.class_name,
            recipe=unit.recipe,
            is_list=first.module.is_numbered,
            steps=bodies[0].steps if bodies else None,
            slots=slots,
            parameters=self._parameters(inputs),
            returns=tuple(map(Local, results)),
        )
        made.uses = len(members)
        number = len(self.definitions)
        self.definitions.append(made)
        for found, own in members:
            own.constants |= hole_constants(found.bodies[0]) if found.bodies else {}
        sharing = Sharing(made, [own for _, own in members], bodies[0].hints if bodies else [])
        for (found, _), given in zip(members, sharing.values, strict=True):
            self._units[found.module.path] = class_unit(number, made.arguments, given)
            count = len(found.frames)
            self._record_call(found, lambda path: ToModule(path, number), inputs[:count], results)
            inputs = inputs[count:]

    def _record_call(
        self, found: Candidate, target: Callable[[Path], Target], inputs: list[list[str]], results: Sequence[int]
    ) -> None:
        """Records the calls that replace a module's frames in the frames around."""
        for frame, body, arguments in zip(found.frames, found.bodies, inputs, strict=True):
            self._frame_calls[id(frame)] = FrameCall(target, arguments, [body.names[k] for k in results])

    # The root

    def _settle_root(self) -> None:
        numbered = self.root.is_numbered and bool(self.root.children)
        self._read_root()
        run = chain_run(self.root, self.root_body, returned_uses(self.root_returns)) if numbered else None
        if run is None:
            self._open_small(self.top)
            self._read_root()
        found = Candidate(self.root, [self.top], [self._only_run(run)]) if run else None
        unit = self._structure(self.root, found)
        self.definitions.append(
            Definition(
                "class",
                self.network.name,
                recipe=unit.recipe,
                is_list=numbered,
                run=run,
                steps=self.root_body.steps,
                slots=list(range(len(self.root_body.slots))),
                constants=unit.constants | hole_constants(self.root_body),
            )
        )

    def _only_run(self, run: tuple[int, int]) -> Body:
        return Body(chain_steps(self.root_body, run))

    def _read_root(self) -> None:
        reader = Reader(())
        self.root_body = reader.read(self.top, lambda inner: self._frame_calls[id(inner)])
        self.root_returns = _read_tree(reader, self.outputs)


def _chain_body(body: Body) -> Body:
    """Returns the body of a chain as one step, independent of its items."""
    return Body((Step(ToModule((), CHAIN), (Slot(0),)),), body.slots[:1], names=body.names[-1:])


def _read_tree(reader: Reader, tree: Any) -> Any:
    match tree:
        case dict():
            return {key: _read_tree(reader, value) for key, value in tree.items()}
        case tuple() | list():
            return type(tree)(_read_tree(reader, item) for item in tree)
        case Record():
            return dataclasses.replace(tree, fields=_read_tree(reader, dict(tree.fields)))
        case Fixed():
            return tree
    return reader.operand(tree)
