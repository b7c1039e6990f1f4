"""The constructors of the source: how layers, variables and other modules are made, and with which arguments."""

import ast
from collections.abc import Iterable, Mapping, Sequence

from jaxensemble.errors import InputError
from jaxensemble.network import Dtype
from jaxensemble.source.expressions import call, dotted, literal, name
from jaxensemble.source.frames import freeze
from jaxensemble.source.names import is_identifier
from jaxensemble.source.pretty import INDENT, WIDTH, flat, header, statement
from jaxensemble.source.units import Argument, Definition, Make, Place, signature


class Constructors:
    """Writes constructors. `names` are those of the classes and functions by number, and of the two helpers."""

    def __init__(self, definitions: Sequence[Definition], names: Mapping[int, str], chain: str, identity: str):
        self.definitions = definitions
        self.names = names
        self.chain = chain
        self.identity = identity

    def lines(self, definition: Definition, is_root: bool) -> list[str]:
        """The lines of a class's `__init__`; that of the root takes `rngs` in any case."""
        arguments: list[ast.AST] = [name("self")]
        arguments += [_declared(argument) for argument in definition.arguments]
        if is_root or self._needs_rngs(definition.make):
            arguments += [name("*"), name("rngs: nnx.Rngs")]
        body = self._attributes(definition)
        return [*header(f"{INDENT}def __init__", arguments, 1), *(body or [f"{INDENT * 2}pass"])]

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
                return dotted(self.names[make.definition])
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
        leading = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        positional = [ordered.pop(key) for key in leading[1:]] if set(leading[1:]) <= set(ordered) else []
        kwargs = {key: value for key, value in ordered.items() if value is not None}
        if "rngs" in parameters:
            kwargs["rngs"] = name("rngs")
        return call(dotted(make.name), [value for value in positional if value is not None], kwargs)

    def _variable(self, definition: Definition, make: Make, place: Place) -> ast.expr:
        shape = self._value(definition, (*place, "shape"))
        assert shape is not None
        dtype = make.fixed[0]
        zeros = call(dotted("jnp.zeros"), [shape, *([] if dtype == "float32" else [literal(Dtype(dtype))])])
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
        return call(name(self.names[make.definition]), args, kwargs)

    def _needs_rngs(self, make: Make) -> bool:
        for part in make.walk():
            if part.kind == "layer" and "rngs" in signature(part.name).parameters:
                return True
            if part.kind == "class" and self._needs_rngs(self.definitions[part.definition].make):
                return True
        return False


def check_options(type_: str, options: Iterable[str], parameters: Iterable[str]) -> None:
    """Refuses options that a layer does not have.

    **Raises:** `InputError` naming them.
    """
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise InputError(f"{type_} has no option {listed}; expected some of {', '.join(parameters)}")


def _repeated(run: list[ast.expr]) -> ast.ListComp:
    count = call(name("range"), [ast.Constant(len(run))])
    return ast.ListComp(run[0], [ast.comprehension(name("_"), count, [], 0)])


def _declared(argument: Argument) -> ast.AST:
    return name(argument.name) if argument.required else ast.keyword(argument.name, literal(argument.default))


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
