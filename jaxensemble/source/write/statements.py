"""The statements of a method: the names of its values, and its lines."""

import ast
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from jaxensemble.network.network import Fixed, Record
from jaxensemble.source.names import TAKEN, make_identifier, unused_name
from jaxensemble.source.plan.loops import CARRIED, Loop
from jaxensemble.source.read.steps import Hole, Length, Local, Slot, Step, ToLayer, ToName, leaves, returned_uses
from jaxensemble.source.read.tidy import PAIRS
from jaxensemble.source.write.expressions import (
    call,
    called_child,
    child,
    is_operator,
    literal,
    name,
    number_range,
    record_key,
)
from jaxensemble.source.write.folding import Entry, Folding
from jaxensemble.source.write.layout import INDENT, WIDTH, flat_text, statement_lines

ATTENTION = ("ops.attention", "nnx.dot_product_attention", "jax.nn.dot_product_attention")
"""Functions of queries, keys and values."""


def method_lines(
    folding: Folding, arguments: Mapping[Hashable, str], reserved: Iterable[str], indent: int
) -> list[str]:
    """Returns the lines of a method's body, with `return`.

    `arguments` names the values from outside; `reserved` are names that no value may get. If a line turns out too long,
    the values nested in it get names.
    """
    reserved, banned = {*TAKEN, *reserved}, set()
    while True:
        order = folding.fold_values(banned)
        writer = _Writer(folding, arguments, reserved, indent)
        lines = writer.write(order)
        if not writer.overlong:
            return lines
        banned |= writer.overlong


class _Writer:
    def __init__(self, folding: Folding, arguments: Mapping[Hashable, str], reserved: set[str], indent: int):
        self.folding = folding
        self.names = dict(arguments)
        self.reserved = reserved
        self.indent = indent
        self.overlong: set[Local] = set()

    def write(self, order: list[Entry]) -> list[str]:
        lines: list[str] = []
        outer, segment = self.indent, None
        waiting = list(zip(order, self._live_after(order), strict=True))
        while waiting:
            entry, after = waiting.pop(0)
            if entry.segment not in (segment, None):
                lines.append(f"{INDENT * outer}if {flat_text(self._condition(entry.segment))}:")
            segment = entry.segment
            self.indent = outer if segment is None else outer + 1
            if entry.is_residual:
                return lines + self._residual_lines(entry)
            if _depends_on_mode(entry):
                block = [(entry, after)]
                while waiting and _depends_on_mode(waiting[0][0]) and _block_key(waiting[0][0]) == _block_key(entry):
                    block.append(waiting.pop(0))
                lines += self._mode_lines(block)
            elif entry.is_optional:
                lines += self._optional_lines(entry, after)
            elif entry.loop is not None:
                lines += self._loop_lines(entry, entry.loop, after)
            else:
                lines += self._assignment_lines(entry, after)
        self.indent = outer
        return lines + self._return_lines()

    def _condition(self, segment: tuple[int, int]) -> ast.expr:
        """Returns the condition under which steps are taken."""
        definition = self.folding.expressions.definition
        attribute = self.folding.expressions.child((definition.segments[segment],))
        is_flag = definition.segments[segment] in definition.flags
        return attribute if is_flag else ast.Compare(attribute, [ast.IsNot()], [ast.Constant(None)])

    def _live_after(self, order: list[Entry]) -> list[set[Hashable]]:
        """Returns for each statement the values that later statements read."""
        last = self.folding.returned_entry
        ending = (
            self.folding.values_read(last) if last else map(self.folding.value, returned_uses(self.folding.returns))
        )
        live = [set(ending)]
        for entry in order[:0:-1]:
            live.append(live[-1] | set(self.folding.values_read(entry)))
        return live[::-1] if order else []

    def _named_value(self, use: Local | Slot) -> ast.expr:
        return name(self.names[self.folding.value(use)])

    def _assignment_lines(self, entry: Entry, after: set[Hashable]) -> list[str]:
        node = self.folding.node(entry, self.folding.folded, self._named_value)
        if entry.step.target == ToName("="):
            assert isinstance(node, ast.Compare)
            return statement_lines(f"{flat_text(node.left)} = ", node.comparators[0], self.indent)
        prefix = _target_text(entry.step, self._targets(entry, after)) + " = " if after & set(entry.outs) else ""
        self._check_width(prefix + flat_text(node), entry)
        return statement_lines(prefix, node, self.indent)

    def _mode_lines(self, block: Sequence[tuple[Entry, set[Hashable]]]) -> list[str]:
        """Returns the lines of choices by one flag, with the steps that only one of the two modes takes."""
        arms: dict[bool, list[str]] = {True: [], False: []}
        self.indent += 1
        for k, (entry, after) in enumerate(block):
            if entry.arm is not None:
                self._name_after_choice(entry, block[k + 1 :])
                arms[entry.arm[1]] += self._assignment_lines(entry, after)
                continue
            target = self._name_choice(entry, after)
            for arg, training in zip(entry.step.args, (True, False), strict=True):
                node = self.folding.expressions.operand(arg, self._named_value)
                if not (isinstance(node, ast.Name) and node.id == target):
                    arms[training] += statement_lines(f"{target} = ", node, self.indent)
        self.indent -= 1
        flag = self.folding.expressions.child(_flag(block[0][0]))
        if not arms[True]:
            return [f"{INDENT * self.indent}if not {flat_text(flag)}:", *arms[False]]
        lines = [f"{INDENT * self.indent}if {flat_text(flag)}:", *arms[True]]
        return [*lines, f"{INDENT * self.indent}else:", *arms[False]] if arms[False] else lines

    def _name_after_choice(self, entry: Entry, rest: Sequence[tuple[Entry, set[Hashable]]]) -> None:
        """Gives the last value of an arm the name of the choice that takes the value."""
        choice = next((pair for pair in rest if pair[0].is_choice), None)
        is_last = not any(one.arm == entry.arm for one, _ in rest[: rest.index(choice)]) if choice else False
        if choice and is_last and len(entry.outs) == 1 and entry.outs[0] in choice[0].step.args:
            if entry.outs[0] not in choice[1]:
                self.names[entry.outs[0]] = self._name_choice(*choice)

    def _name_choice(self, entry: Entry, after: set[Hashable]) -> str:
        """Returns the name of a choice: the name of one of its values, if the value is not read later."""
        out = entry.outs[0]
        if out not in self.names:
            given = [self.folding.value(arg) for arg in entry.step.args[::-1] if isinstance(arg, Local | Slot)]
            dying = [self.names[value] for value in given if value in self.names and value not in after]
            held = {self.names[value] for value in after if value in self.names} | self.reserved
            free = [wish for wish in (*dying, "y", "z", "w") if wish not in held and not wish.startswith("_")]
            self.names[out] = free[0] if free else unused_name("x", held)
        return self.names[out]

    def _targets(self, entry: Entry, after: set[Hashable]) -> list[str]:
        targets: list[str] = []
        for out in entry.outs:
            chosen = self.names[out] if out in self.names else self._choose_name(entry, out, after, targets)
            targets.append(chosen if out in after else "_")
        for out, target in zip(entry.outs, targets, strict=True):
            self.names[out] = target
        return targets

    def _choose_name(self, entry: Entry, out: Local, after: set[Hashable], targets: list[str]) -> str:
        """Returns the name of a value that is not read later, else of the called layer, else the next free letter."""
        if entry.is_segment_end and entry.segment is not None:
            carried = self.folding.carried_value(entry.segment)
            assert carried not in after, "the value that goes into steps that may be left out is read after these steps"
            return self.names[carried]
        held = {self.names[value] for value in after if value in self.names} | set(targets)
        is_size = _is_size(entry.step)
        reads = (
            [] if is_size or self._is_attention(entry) or self._roles(entry, out) else self.folding.values_read(entry)
        )
        for value in reads:
            if value not in after and self.names[value] not in held and not self.names[value].startswith("_"):
                return self.names[value]
        for wish in ("n", "m") if is_size else [*self._roles(entry, out), *_wishes(entry)]:
            if wish not in held | self.reserved:
                return wish
        return unused_name("x", held | self.reserved)

    def _is_attention(self, entry: Entry) -> bool:
        """Returns whether the step is attention, whose result is none of its arguments."""
        return isinstance(entry.step.target, ToName) and entry.step.target.name in ATTENTION

    def _roles(self, entry: Entry, out: Local) -> list[str]:
        """Returns the names of a part of a value that attention takes later, or that a recurrent layer returns."""
        if self._is_attention(entry):
            return ["x"]
        if _is_recurrent(entry.step):
            return [(("y", "state"), ("y", "h", "c"))[len(entry.outs) - 2][entry.outs.index(out)]]
        value, seen = out, 0
        while len(entry.outs) > 1 and seen < 4:
            users = [one for one in self.folding.by_local.values() if value in leaves(one.step)]
            if len(users) != 1 or len(users[0].outs) != 1:
                return []
            if self._is_attention(users[0]):
                uses = [k for k, arg in enumerate(users[0].step.args) if arg == value]
                return ["qkv"[uses[0]]] if uses and uses[0] < 3 else []
            value, seen = users[0].outs[0], seen + 1
        return []

    def _loop_lines(self, entry: Entry, loop: Loop, after: set[Hashable]) -> list[str]:
        reads = self.folding.values_read(entry)
        carried, lines = self.names[loop.given], []
        if loop.given in after or reads.count(loop.given) > 1:
            held = {self.names[value] for value in [*after, *reads] if value in self.names}
            wishes = [wish for wish in ("x", "y", "z", "w") if wish not in held | self.reserved]
            carried = wishes[0] if wishes else unused_name("x", held | self.reserved)
            lines = statement_lines(f"{carried} = ", name(self.names[loop.given]), self.indent)
        taken = {*self.names.values(), *self.reserved, carried}
        expressions = self.folding.expressions
        if loop.stem is None:
            item = unused_name(_singular(loop.path), taken)
            each, made = flat_text(expressions.child(loop.path)), name(item)
        else:
            item = unused_name("i", taken)
            each = flat_text(number_range(loop.start, loop.count))
            made = expressions.numbered_child(loop.path, loop.stem, item)
            expressions.looped.add(loop.first)
        self.names[CARRIED] = carried
        expressions.items[loop.first] = made
        node = self.folding.node(entry, self.folding.folded, self._named_value)
        del expressions.items[loop.first]
        lines.append(f"{INDENT * self.indent}for {item} in {each}:")
        lines += statement_lines(f"{carried} = ", node, self.indent + 1)
        self.names[entry.outs[0]] = carried
        return lines

    def _optional_lines(self, entry: Entry, after: set[Hashable]) -> list[str]:
        """Returns the lines of the call of a child that may be absent."""
        given = name(self.names[self.folding.value(entry.step.args[0])])  # type: ignore[arg-type]
        made = self.folding.expressions.child(called_child(entry.step))
        (target,) = self._targets(entry, after)
        node = self.folding.node(entry, self.folding.folded, lambda use: given)
        if target == given.id:
            test = ast.Compare(made, [ast.IsNot()], [ast.Constant(None)])
            return [
                f"{INDENT * self.indent}if {flat_text(test)}:",
                *statement_lines(f"{target} = ", node, self.indent + 1),
            ]
        test = ast.Compare(made, [ast.Is()], [ast.Constant(None)])
        return statement_lines(f"{target} = ", ast.IfExp(test, given, node), self.indent)

    def _residual_lines(self, entry: Entry) -> list[str]:
        """Returns the `return` of a method whose last step, an addition, may be left out."""
        definition = self.folding.expressions.definition
        before = next(arg for arg in entry.step.args if isinstance(arg, Local))
        node = self.folding.node(entry, self.folding.folded, self._named_value)
        flag = child(name("self"), definition.residual)
        return statement_lines("return ", ast.IfExp(flag, node, self._named_value(before)), self.indent)

    def _check_width(self, line: str, entry: Entry) -> None:
        if len(INDENT * self.indent + line) > WIDTH:
            self.overlong |= {
                use for use in leaves(entry.step) if isinstance(use, Local) and use in self.folding.folded
            }

    def _return_lines(self) -> list[str]:
        last = self.folding.returned_entry
        node = (
            self.folding.node(last, self.folding.folded, self._named_value)
            if last
            else self._tree(self.folding.returns)
        )
        if last:
            self._check_width("return " + flat_text(node), last)
        return statement_lines("return ", node, self.indent)

    def _tree(self, returns: Any) -> ast.expr:
        match returns:
            case dict():
                return ast.Dict(
                    [ast.Constant(key) for key in returns], [self._tree(value) for value in returns.values()]
                )
            case tuple():
                return ast.Tuple([self._tree(item) for item in returns], ast.Load())
            case list():
                return ast.List([self._tree(item) for item in returns], ast.Load())
            case Record():
                made = name(self.folding.expressions.records[record_key(returns)])
                return call(made, (), {field: self._tree(item) for field, item in returns.fields.items()})
            case Fixed(value):
                return literal(value)
        return self.folding.expressions.operand(returns, self._named_value)


def _depends_on_mode(entry: Entry) -> bool:
    return entry.is_choice or entry.arm is not None


def _block_key(entry: Entry) -> Hashable:
    """Returns the flag and the segment that statements within one `if` have in common."""
    return _flag(entry), entry.segment


def _flag(entry: Entry) -> tuple[str, ...]:
    """Returns the flag of the mode on which a choice, or a step in one of its arms, depends."""
    return called_child(entry.step) if entry.arm is None else entry.arm[0]


def _wishes(entry: Entry) -> list[str]:
    """Returns possible names of a value: `branch` for the result of `branch_1`, which often goes on to `branch_2`."""
    path = called_child(entry.step)
    own = make_identifier(re.sub(r"_\d+[a-z]?$", "", path[-1]), "") if path and len(entry.outs) == 1 else ""
    return [*([own] if own else []), "y", "z", "w"]


def _is_recurrent(step: Step) -> bool:
    """Returns whether a step has an output and a state: the only kind of layers and functions with several results."""
    is_function = isinstance(step.target, ToName) and step.target.name in PAIRS
    return step.outs > 1 and (isinstance(step.target, ToLayer) or is_function)


def _target_text(step: Step, targets: Sequence[str]) -> str:
    """Returns the targets of an assignment; a state that is two values is in parentheses."""
    if _is_recurrent(step) and len(targets) == 3:
        output, hidden, cell = targets
        return f"{output}, ({hidden}, {cell})"
    return ", ".join(targets)


def _is_size(step: Step) -> bool:
    """Returns whether a step computes only with sizes."""
    return is_operator(step) and all(isinstance(arg, Length | Hole) for arg in step.args)


def _singular(path: tuple[str, ...]) -> str:
    last = path[-1] if path else ""
    return make_identifier(last[:-1], "layer") if last.endswith("s") and not last.endswith("ss") else "layer"
