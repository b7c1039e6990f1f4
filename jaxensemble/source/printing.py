"""A plan as text: imports, functions, classes."""

import ast
from collections.abc import Hashable, Sequence
from typing import Any

from jaxensemble.network import Ref, Tree
from jaxensemble.source.bodies import Local, Slot, Step, ToFunction, ToName
from jaxensemble.source.expressions import Expressions, call, dotted, index, literal, name
from jaxensemble.source.folding import Folding
from jaxensemble.source.names import IMPORTS, TAKEN, is_identifier, plain, snake, unused
from jaxensemble.source.plan import Plan
from jaxensemble.source.pretty import INDENT, WIDTH, bracketed, flat, statement
from jaxensemble.source.statements import statements
from jaxensemble.source.tree import freeze
from jaxensemble.source.units import Argument, Definition, Make, Place, signature

POSITIONAL = {
    "nnx.Linear": ("in_features", "out_features"),
    "nnx.Conv": ("in_features", "out_features", "kernel_size"),
    "nnx.ConvTranspose": ("in_features", "out_features", "kernel_size"),
    "nnx.Embed": ("num_embeddings", "features"),
    "nnx.Dropout": ("rate",),
    "nnx.BatchNorm": ("num_features",),
    "nnx.LayerNorm": ("num_features",),
    "nnx.RMSNorm": ("num_features",),
    "nnx.GroupNorm": ("num_features",),
    "nnx.InstanceNorm": ("num_features",),
    "layers.BatchNorm": ("num_features",),
    "layers.ConvTranspose": ("in_features", "out_features", "kernel_size"),
}
"""The options that are written without their names, where all of them are given."""

ROOT_INDENT = 2


class Printer:
    """Writes a plan. `imports` collects what the text needs."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.definitions = plan.definitions
        self.used = self._used()
        self.class_names: dict[int, str] = {}
        self.functions: dict[int, str] = {}
        self.globals: set[str] = set(TAKEN)
        self._name_all()

    # Names

    def _used(self) -> set[int]:
        """The numbers of the definitions that the root needs."""
        used, waiting = set(), [len(self.definitions) - 1]
        while waiting:
            number = waiting.pop()
            if number not in used:
                used.add(number)
                waiting += needed(self.definitions[number])
        return used

    def _name_all(self) -> None:
        *others, root = sorted(self.used)
        self.class_names[root] = self._claim(plain(self.definitions[root].label, "Network"))
        self.chain = self._claim("Sequential" if "Sequential" not in self.globals else "Chain")
        self.identity = self._claim("identity")
        for number in others:
            definition = self.definitions[number]
            alias = alias_of(definition)
            if definition.kind == "class":
                self.class_names[number] = self._claim(plain(definition.label, "Module"))
            else:
                self.functions[number] = alias or self._claim(plain(snake(definition.label), "function"))

    def _claim(self, wanted: str) -> str:
        chosen = unused(wanted, self.globals)
        self.globals.add(chosen)
        return chosen

    # The text

    def text(self) -> str:
        """The whole module."""
        *others, root = sorted(self.used)
        blocks = [self._definition(number) for number in [*others, root] if not alias_of(self.definitions[number])]
        makes = [make for number in self.used for make in self.definitions[number].make.walk()]
        helpers = []
        if any(make.kind == "identity" for make in makes):
            helpers.append([f"def {self.identity}(x):", f"{INDENT}return x"])
        if any(make.kind == "chain" for number in self.used for make in _inner(self.definitions[number].make)):
            helpers.append(self._chain_class())
        title = f'"""{self.class_names[root]} as a Flax module."""'
        body = "\n\n\n".join("\n".join(block) for block in [*helpers, *blocks])
        return f"{title}\n\n{import_lines(body)}\n\n\n{body}\n"

    def _chain_class(self) -> list[str]:
        doc = f'{INDENT}"""Layers that are called one after the other."""'
        return [f"class {self.chain}(nnx.List):", doc, "", *_chain_method(1)]

    def _definition(self, number: int) -> list[str]:
        definition = self.definitions[number]
        if definition.kind == "function":
            return self._function(number)
        is_root = number == len(self.definitions) - 1
        lines = [f"class {self.class_names[number]}({'nnx.List' if definition.is_list else 'nnx.Module'}):"]
        lines += self._constructor(definition, is_root)
        if is_root:
            lines += ["", *self._root_method(definition)]
            lines += self._train_method()
        elif definition.steps is not None:
            lines += ["", *self._method(definition)]
        return lines

    def _function(self, number: int) -> list[str]:
        definition = self.definitions[number]
        arguments = [unused(parameter, self.globals) for parameter in definition.parameters]
        expressions = Expressions(definition, self.definitions, self.functions)
        folding = Folding(expressions, definition.steps or (), _single(definition.returns), definition.slots)
        names: dict[Hashable, str] = dict(enumerate(arguments))
        body = statements(folding, names, self.globals, 1)
        return [*_header(f"def {self.functions[number]}", [name(argument) for argument in arguments], 0), *body]

    # Methods

    def _method(self, definition: Definition) -> list[str]:
        if definition.make.kind == "chain":
            return _chain_method(1)
        arguments = [unused(parameter, self.globals) for parameter in definition.parameters]
        expressions = Expressions(definition, self.definitions, self.functions)
        folding = Folding(expressions, definition.steps or (), _single(definition.returns), definition.slots)
        names: dict[Hashable, str] = dict(enumerate(arguments))
        header = _header(f"{INDENT}def __call__", [name("self"), *map(name, arguments)], 1)
        return [*header, *statements(folding, names, self.globals, 2)]

    def _root_method(self, definition: Definition) -> list[str]:
        inputs = self.plan.network.inputs
        arguments, names = self._input_names(inputs)
        header = _header(f"{INDENT}def __call__", [name("self"), *map(name, arguments)], 1)
        if definition.make.kind == "chain":
            return [*header, *_chain_lines(arguments[0])]
        expressions = Expressions(definition, self.definitions, self.functions)
        body = self.plan.root_body
        folding = Folding(expressions, body.steps, self.plan.root_returns, body.slots)
        lines = self._unpacked(inputs, arguments, names, set(body.slots))
        return [*header, *lines, *statements(folding, names, self.globals, 2)]

    def _input_names(self, inputs: Sequence[Tree]) -> tuple[list[str], dict[Hashable, str]]:
        """The names of the root's arguments, and of every value within them."""
        taken = set(self.globals)
        arguments, names = [], {}

        def claim(wanted: str) -> str:
            chosen = unused(wanted, taken)
            taken.add(chosen)
            return chosen

        for tree in inputs:
            if isinstance(tree, Ref):
                names[tree.name] = claim(plain(tree.name, "x"))
                arguments.append(names[tree.name])
            else:
                arguments.append(claim("inputs"))
        for tree in inputs:
            if not isinstance(tree, Ref):
                names |= {ref: claim(plain(ref, "x")) for ref, _ in tree_leaves(tree, name(""))}
        return arguments, names

    def _unpacked(
        self, inputs: Sequence[Tree], arguments: list[str], names: dict[Hashable, str], read: set[str]
    ) -> list[str]:
        lines: list[str] = []
        for tree, argument in zip(inputs, arguments, strict=True):
            if not isinstance(tree, Ref):
                for ref, node in tree_leaves(tree, name(argument)):
                    lines += statement(f"{names[ref]} = ", node, 2) if ref in read else []
        return lines

    def _train_method(self) -> list[str]:
        reason = self.plan.network.evaluation_only
        if reason is None:
            return []
        lines = ["", f"{INDENT}def train(self, **attributes):"]
        return [*lines, *statement("raise ", call(name("ValueError"), [ast.Constant(reason)]), 2)]

    # Constructors

    def _constructor(self, definition: Definition, is_root: bool) -> list[str]:
        arguments: list[ast.AST] = [name("self")]
        arguments += [_declared(argument) for argument in definition.arguments]
        if is_root or self._needs_rngs(definition.make):
            arguments += [name("*"), name("rngs: nnx.Rngs")]
        body = self._attributes(definition)
        return [*_header(f"{INDENT}def __init__", arguments, 1), *(body or [f"{INDENT * 2}pass"])]

    def _attributes(self, definition: Definition) -> list[str]:
        if definition.is_list:
            items = self._items(definition, definition.make, ())
            return statement("", call(ast.Attribute(call(name("super")), "__init__", ast.Load()), [items]), 2)
        lines: list[str] = []
        for key, make in zip(definition.make.keys, definition.make.items, strict=True):
            node = self._make(definition, make, (key,))
            flag = definition.optional.get(key)
            lines += _set(key, node, 2) if flag is None else _set_if(flag.name, key, node)
        held = {argument.name for place, argument in definition.bound.items() if place[0] == ""}
        for argument in definition.arguments:
            if argument.name in held:
                lines += statement(f"self.{argument.name} = ", name(argument.name), 2)
        return lines

    def _make(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        """What an attribute is set to."""
        match make.kind:
            case "layer":
                return self._layer(definition, make, place)
            case "variable":
                return self._variable(definition, make, place)
            case "class":
                return self._instance(definition, make, place)
            case "chain":
                return call(name(self.chain), [self._items(definition, make, place)])
            case "list":
                return call(dotted("nnx.List"), [self._items(definition, make, place)])
            case "dict":
                return self._dict(definition, make, place)
            case "function":
                return dotted(self.functions[make.definition])
            case "identity":
                return name(self.identity)
            case "none":
                return ast.Constant(None)

    def _items(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        """The items of a list; a run of equal ones, if they are all there is or at least three, as a comprehension."""
        nodes = [self._make(definition, item, (*place, key)) for key, item in zip(make.keys, make.items, strict=True)]
        if make.kind == "list":
            nodes = [
                ast.Constant(None) if item.kind == "function" else n for n, item in zip(nodes, make.items, strict=True)
            ]
        runs: list[list[ast.expr]] = []
        for node in nodes:
            if runs and flat(runs[-1][0]) == flat(node) and isinstance(node, ast.Call):
                runs[-1].append(node)
            else:
                runs.append([node])
        if len(runs) == 1 and len(runs[0]) > 1:
            return _repeated(runs[0])
        parts: list[ast.expr] = []
        for run in runs:
            parts += [ast.Starred(_repeated(run), ast.Load())] if len(run) > 2 else run
        return ast.List(parts, ast.Load())

    def _dict(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        nodes = [self._make(definition, item, (*place, key)) for key, item in zip(make.keys, make.items, strict=True)]
        if all(is_identifier(key) for key in make.keys):
            return call(dotted("nnx.Dict"), [], dict(zip(make.keys, nodes, strict=True)))
        return call(dotted("nnx.Dict"), [ast.Dict([ast.Constant(key) for key in make.keys], nodes)])

    def _value(self, definition: Definition, place: Place) -> ast.expr | None:
        """What stands at a place: an argument, a constant, or nothing."""
        if place in definition.bound:
            return name(definition.bound[place].name)
        return literal(definition.constants[place]) if place in definition.constants else None

    def _layer(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        given = [*definition.constants, *definition.bound]
        options = {p[-1]: self._value(definition, p) for p in given if p[:-1] == place}
        parameters = signature(make.name).parameters
        ordered = {key: options[key] for key in [*parameters, *options] if key in options}
        check_options(make.name, ordered, parameters)
        leading = POSITIONAL.get(make.name, ())
        positional = [ordered.pop(key) for key in leading] if set(leading) <= set(ordered) else []
        kwargs = {key: value for key, value in ordered.items() if value is not None}
        if "rngs" in parameters:
            kwargs["rngs"] = name("rngs")
        return call(dotted(make.name), [value for value in positional if value is not None], kwargs)

    def _variable(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        shape = self._value(definition, (*place, "shape"))
        assert shape is not None
        dtype = make.fixed[0]
        zeros = call(dotted("jnp.zeros"), [shape, *([] if dtype == "float32" else [dotted(f"jnp.{dtype}")])])
        kinds = {"param": "nnx.Param", "buffer": "layers.Buffer", "constant": "layers.Constant"}
        return call(dotted(kinds[make.name]), [zeros])

    def _instance(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        made = self.definitions[make.definition]
        args, kwargs = [], {}
        for argument in made.arguments:
            spot = (*place, argument.name)
            value = self._value(definition, spot)
            assert value is not None
            if argument.required:
                args.append(value)
            elif spot in definition.bound or freeze(definition.constants[spot]) != freeze(argument.default):
                kwargs[argument.name] = value
        if self._needs_rngs(made.make):
            kwargs["rngs"] = name("rngs")
        return call(name(self.class_names[make.definition]), args, kwargs)

    def _needs_rngs(self, make: Make) -> bool:
        for part in make.walk():
            if part.kind == "layer" and "rngs" in signature(part.name).parameters:
                return True
            if part.kind == "class" and self._needs_rngs(self.definitions[part.definition].make):
                return True
        return False


def needed(definition: Definition) -> list[int]:
    """The numbers of the definitions that one names."""
    functions = [step.target.definition for step in definition.steps or () if isinstance(step.target, ToFunction)]
    in_lists = [item for make in definition.make.walk() if make.kind == "list" for item in make.items]
    makes = [
        make
        for make in definition.make.walk()
        if make.definition >= 0 and not (make.kind == "function" and make in in_lists)
    ]
    return functions + [make.definition for make in makes]


def alias_of(definition: Definition) -> str | None:
    """The function that a function does nothing but call: `nnx.relu` needs no other name."""
    if definition.kind != "function" or definition.returns != (Local(0),):
        return None
    match definition.steps:
        case (Step(ToName(target), (Slot(0),), ()),) if "." in target[1:]:
            return target
    return None


def check_options(type_: str, options: dict[str, Any], parameters: Any) -> None:
    """Refuses options that a layer does not have."""
    from jaxensemble.errors import InputError

    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise InputError(
            f"{type_} has no option {', '.join(map(repr, unknown))}; expected some of {', '.join(parameters)}"
        )


def tree_leaves(tree: Tree, node: ast.expr) -> list[tuple[str, ast.expr]]:
    """The references in a tree, and how each is reached from the tree's own name."""
    match tree:
        case Ref(ref):
            return [(ref, node)]
        case dict():
            return [leaf for key, value in tree.items() for leaf in tree_leaves(value, index(node, ast.Constant(key)))]
        case tuple() | list():
            return [leaf for k, item in enumerate(tree) for leaf in tree_leaves(item, index(node, ast.Constant(k)))]
    return []


def import_lines(body: str) -> str:
    """The imports that a text needs."""
    nodes = [node.value for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Attribute)]
    roots = {node.id for node in nodes if isinstance(node, ast.Name)}
    lines = [line for root, line in IMPORTS.items() if root in roots and root not in ("layers", "ops")]
    own = [root for root in ("layers", "ops") if root in roots]
    return "\n".join([*lines, *([f"from jaxensemble import {', '.join(own)}"] if own else [])])


def _set(key: str, node: ast.expr, indent: int) -> list[str]:
    """Sets an attribute, whatever its name."""
    if is_identifier(key):
        return statement(f"self.{key} = ", node, indent)
    return statement("", call(name("setattr"), [name("self"), ast.Constant(key), node]), indent)


def _set_if(flag: str, key: str, node: ast.expr) -> list[str]:
    """Sets an attribute to a child, or to None where the flag says that there is none."""
    lines = _set(key, ast.IfExp(name(flag), node, ast.Constant(None)), 2)
    if len(lines) == 1 and len(lines[0]) <= WIDTH:
        return lines
    there, absent = _set(key, node, 3), _set(key, ast.Constant(None), 3)
    return [f"{INDENT * 2}if {flag}:", *there, f"{INDENT * 2}else:", *absent]


def _inner(make: Make) -> list[Make]:
    return [part for item in make.items for part in item.walk()]


def _single(returns: tuple[Any, ...]) -> Any:
    return returns[0] if len(returns) == 1 else returns


def _repeated(run: list[ast.expr]) -> ast.ListComp:
    count = call(name("range"), [ast.Constant(len(run))])
    return ast.ListComp(run[0], [ast.comprehension(name("_"), count, [], 0)])


def _declared(argument: Argument) -> ast.AST:
    return name(argument.name) if argument.required else ast.keyword(argument.name, literal(argument.default))


def _header(start: str, arguments: Sequence[ast.AST], indent: int) -> list[str]:
    line = f"{start}({', '.join(map(flat, arguments))}):"
    if len(line) <= WIDTH:
        return [line]
    return bracketed(f"{start.strip()}(", list(arguments), "):", indent, fits_joined=True)


def _chain_method(indent: int) -> list[str]:
    return [f"{INDENT * indent}def __call__(self, x):", *_chain_lines("x")]


def _chain_lines(argument: str) -> list[str]:
    item = "layer" if argument != "layer" else "item"
    body = [f"for {item} in self:", f"{INDENT}{argument} = {item}({argument})", f"return {argument}"]
    return [INDENT * ROOT_INDENT + line for line in body]
