"""The text of an outline: imports, functions, classes."""

import ast
import textwrap
from collections.abc import Hashable, Sequence
from typing import Any

from jaxensemble.network.network import Network, Record, Ref, ReferenceTree
from jaxensemble.network.vocabulary import IMPORTS, OWN_MODULES
from jaxensemble.source.names import TAKEN, make_identifier, snake_case, unused_name
from jaxensemble.source.plan.definitions import IDENTITY, Definition, Recipe
from jaxensemble.source.plan.outline import Outline
from jaxensemble.source.read.steps import Local, Slot, Step, ToFunction, ToName
from jaxensemble.source.write.constructors import Constructors
from jaxensemble.source.write.expressions import Expressions, RecordKey, call, dotted_name, name, record_key, subscript
from jaxensemble.source.write.folding import Folding
from jaxensemble.source.write.layout import INDENT, WIDTH, def_lines, statement_lines
from jaxensemble.source.write.statements import method_lines

ROOT_INDENT = 2


def print_source(network: Network) -> str:
    """Returns the source of a Python module whose last class is the network, as a Flax programmer would write it.

    Lines are at most 120 characters long and laid out as `ruff format` lays them out.

    **Raises:** `InputError` for a name or constant of the network that cannot be written in source.
    """
    return Printer(Outline(network)).text()


class Printer:
    """Writes an outline as text."""

    def __init__(self, outline: Outline):
        self.outline = outline
        self.definitions = outline.definitions
        self.used = self._used_definitions()
        self.names: dict[int, str] = {}
        self.globals: set[str] = set(TAKEN)
        self._name_all()
        self.records = {key: self._claim(make_identifier(key[1], "Output")) for key in _record_keys(outline.outputs)}
        self.constructors = Constructors(self.definitions, self.names, self.chain, self.identity)

    # Names

    def _used_definitions(self) -> set[int]:
        """Returns the numbers of the definitions that the root needs."""
        used, waiting = set(), [len(self.definitions) - 1]
        while waiting:
            number = waiting.pop()
            if number not in used:
                used.add(number)
                waiting += needed_definitions(self.definitions[number])
        return used

    def _name_all(self) -> None:
        *others, root = sorted(self.used)
        self.names[root] = self._claim(make_identifier(self.definitions[root].label, "Network"))
        self.chain = self._claim("Sequential" if "Sequential" not in self.globals else "Chain")
        self.identity = self._claim("identity")
        for number in sorted(others, key=lambda number: -self.definitions[number].uses):
            definition = self.definitions[number]
            alias = alias_of(definition)
            if definition.kind == "class":
                self.names[number] = self._claim(make_identifier(definition.label, "Module"))
            else:
                self.names[number] = alias or self._claim(make_identifier(snake_case(definition.label), "function"))

    @property
    def class_name(self) -> str:
        """Name of the root class."""
        return self.names[len(self.definitions) - 1]

    def _claim(self, wanted: str) -> str:
        chosen = unused_name(wanted, self.globals)
        self.globals.add(chosen)
        return chosen

    # The text

    def text(self) -> str:
        """Returns the text of the whole module."""
        *others, root = sorted(self.used)
        blocks = [self._definition(number) for number in [*others, root] if not alias_of(self.definitions[number])]
        helpers = []
        if any(IDENTITY in self.definitions[number].functions for number in self.used):
            helpers.append([f"def {self.identity}(x):", f"{INDENT}return x"])
        if any(
            recipe.kind == "chain" for number in self.used for recipe in _inner_recipes(self.definitions[number].recipe)
        ):
            helpers.append(self._chain_class())
        title = "\n".join(self._title(self.names[root]))
        body = "\n\n\n".join("\n".join(block) for block in [*helpers, *blocks])
        made = [
            line for key, own in self.records.items() for line in statement_lines(f"{own} = ", _record_class(key), 0)
        ]
        records = "\n".join(["", *made, ""]) if made else ""
        return f"{title}\n\n{import_lines(records + body)}\n{records}\n\n{body}\n"

    def _title(self, root: str) -> list[str]:
        fixed = self.outline.network.fixed
        if not fixed:
            return [f'"""{root} as a Flax module."""']
        text = (
            f"Fixed when it was ported: {', '.join(f'{place}={_short_text(value)}' for place, value in fixed.items())}."
        )
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        wrapped = textwrap.wrap(escaped, WIDTH, break_long_words=False, break_on_hyphens=False)
        return [f'"""{root} as a Flax module.', "", *wrapped, '"""']

    def _chain_class(self) -> list[str]:
        doc = f'{INDENT}"""Layers that are called one after the other."""'
        return [f"class {self.chain}(nnx.List):", doc, "", *_chain_method(1)]

    def _definition(self, number: int) -> list[str]:
        definition = self.definitions[number]
        if definition.kind == "function":
            return self._function(number)
        is_root = number == len(self.definitions) - 1
        lines = [f"class {self.names[number]}({'nnx.List' if definition.is_list else 'nnx.Module'}):"]
        expressions = Expressions(definition, self.definitions, self.names, self.constructors.runs(definition))
        if is_root:
            method = ["", *self._root_method(definition, expressions), *self._train_method()]
        else:
            method = ["", *self._method(definition, expressions)] if definition.steps is not None else []
        loops = expressions.looped if method else None
        return [*lines, *self.constructors.lines(definition, is_root, loops), *method]

    def _function(self, number: int) -> list[str]:
        definition = self.definitions[number]
        arguments = [unused_name(parameter, self.globals) for parameter in definition.parameters]
        expressions = Expressions(definition, self.definitions, self.names)
        folding = Folding(expressions, definition.steps or (), _single_return(definition.returns), definition.slots)
        names: dict[Hashable, str] = dict(enumerate(arguments))
        body = method_lines(folding, names, self.globals, 1)
        return [*def_lines(f"def {self.names[number]}", [name(argument) for argument in arguments], 0), *body]

    # Methods

    def _method(self, definition: Definition, expressions: Expressions) -> list[str]:
        if definition.recipe.kind == "chain":
            return _chain_method(1)
        arguments = [unused_name(parameter, self.globals) for parameter in definition.parameters]
        folding = Folding(expressions, definition.steps or (), _single_return(definition.returns), definition.slots)
        names: dict[Hashable, str] = dict(enumerate(arguments))
        opening = def_lines(f"{INDENT}def __call__", [name("self"), *map(name, arguments)], 1)
        return [*opening, *method_lines(folding, names, self.globals, 2)]

    def _root_method(self, definition: Definition, expressions: Expressions) -> list[str]:
        network = self.outline.network
        inputs = list(network.open_inputs.values())
        wishes = [network.arguments[k] if network.arguments else "" for k in network.open_inputs]
        arguments, names = self._input_names(inputs, wishes)
        expressions.records = self.records
        opening = def_lines(f"{INDENT}def __call__", [name("self"), *map(name, arguments)], 1)
        body = self.outline.root_body
        folding = Folding(expressions, body.steps, self.outline.root_returns, body.slots)
        lines = self._unpacking_lines(inputs, arguments, names, set(body.slots))
        return [*opening, *lines, *method_lines(folding, names, self.globals, 2)]

    def _input_names(
        self, inputs: Sequence[ReferenceTree], wishes: Sequence[str]
    ) -> tuple[list[str], dict[Hashable, str]]:
        """Returns the names of the root's arguments, and of every value within them."""
        taken = set(self.globals)
        arguments, names = [], {}

        def claim(wanted: str) -> str:
            chosen = unused_name(wanted, taken)
            taken.add(chosen)
            return chosen

        for tree, wish in zip(inputs, wishes, strict=True):
            arguments.append(claim(make_identifier(wish or (tree.name if isinstance(tree, Ref) else "inputs"), "x")))
            if isinstance(tree, Ref):
                names[tree.name] = arguments[-1]
        for tree in inputs:
            if not isinstance(tree, Ref):
                names |= {ref: claim(make_identifier(ref, "x")) for ref, _ in tree_leaves(tree, name(""))}
        return arguments, names

    def _unpacking_lines(
        self, inputs: Sequence[ReferenceTree], arguments: list[str], names: dict[Hashable, str], read: set[str]
    ) -> list[str]:
        lines: list[str] = []
        for tree, argument in zip(inputs, arguments, strict=True):
            if not isinstance(tree, Ref):
                for ref, node in tree_leaves(tree, name(argument)):
                    lines += statement_lines(f"{names[ref]} = ", node, 2) if ref in read else []
        return lines

    def _train_method(self) -> list[str]:
        reason = self.outline.network.evaluation_only
        if reason is None:
            return []
        lines = ["", f"{INDENT}def train(self, **attributes):"]
        return [*lines, *statement_lines("raise ", call(name("ValueError"), [ast.Constant(reason)]), 2)]


def needed_definitions(definition: Definition) -> list[int]:
    """Returns the numbers of the definitions that a definition names."""
    functions = [step.target.definition for step in definition.steps or () if isinstance(step.target, ToFunction)]
    functions += [function.definition for function in definition.functions if function != IDENTITY]
    return functions + [recipe.definition for recipe in definition.recipe.walk() if recipe.kind == "class"]


def alias_of(definition: Definition) -> str | None:
    """Returns the function that a definition only calls, or None: `nnx.relu` needs no other name."""
    if definition.kind != "function" or definition.returns != (Local(0),):
        return None
    match definition.steps:
        case (Step(ToName(target), (Slot(0),), ()),) if "." in target[1:]:
            return target
    return None


def tree_leaves(tree: ReferenceTree, node: ast.expr) -> list[tuple[str, ast.expr]]:
    """Returns the references in a tree, each with the expression that reads it from the tree's own name."""
    match tree:
        case Ref(ref):
            return [(ref, node)]
        case dict():
            return [
                leaf for key, value in tree.items() for leaf in tree_leaves(value, subscript(node, ast.Constant(key)))
            ]
        case tuple() | list():
            return [leaf for k, item in enumerate(tree) for leaf in tree_leaves(item, subscript(node, ast.Constant(k)))]
    return []


def import_lines(body: str) -> str:
    """Returns the imports that a text needs."""
    nodes = [node.value for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Attribute)]
    roots = {node.id for node in nodes if isinstance(node, ast.Name)}
    lines = [line for root, line in IMPORTS.items() if root in roots and root not in OWN_MODULES]
    own = [root for root in OWN_MODULES if root in roots]
    return "\n".join([*lines, *([f"from jaxensemble import {', '.join(own)}"] if own else [])])


def _record_keys(tree: ReferenceTree) -> list[RecordKey]:
    """Returns the keys of the records among a network's outputs, outer records first."""
    match tree:
        case Record():
            return list(dict.fromkeys([record_key(tree), *_record_keys(list(tree.fields.values()))]))
        case dict():
            return _record_keys(list(tree.values()))
        case tuple() | list():
            return list(dict.fromkeys(key for item in tree for key in _record_keys(item)))
    return []


def _record_class(key: RecordKey) -> ast.Call:
    kind, *texts = key
    return call(dotted_name(f"records.{kind}"), [ast.Constant(text) for text in texts])


def _short_text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _inner_recipes(recipe: Recipe) -> list[Recipe]:
    return [part for item in recipe.items for part in item.walk()]


def _single_return(returns: tuple[Any, ...]) -> Any:
    return returns[0] if len(returns) == 1 else returns


def _chain_method(indent: int) -> list[str]:
    return [f"{INDENT * indent}def __call__(self, x):", *_chain_lines("x")]


def _chain_lines(argument: str) -> list[str]:
    item = "layer" if argument != "layer" else "item"
    body = [f"for {item} in self:", f"{INDENT}{argument} = {item}({argument})", f"return {argument}"]
    return [INDENT * ROOT_INDENT + line for line in body]
