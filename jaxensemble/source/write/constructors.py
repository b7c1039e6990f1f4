"""The constructors of the source, with the layers, variables and modules that they make, and the arguments."""

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jaxensemble.errors import InputError
from jaxensemble.network.network import Dtype
from jaxensemble.network.vocabulary import is_identifier
from jaxensemble.source.plan.definitions import (
    IDENTITY,
    RESIDUAL,
    Argument,
    Condition,
    ConstantValue,
    Definition,
    Formula,
    Function,
    HalfKernel,
    Place,
    Recipe,
    ScaledArgument,
    ShapeItems,
    signature,
)
from jaxensemble.source.read.frames import comparison_key
from jaxensemble.source.write.expressions import (
    call,
    dotted_name,
    literal,
    name,
    number_range,
    numbered_name,
    scaled_expression,
    subscript,
)
from jaxensemble.source.write.layout import INDENT, WIDTH, def_lines, flat_text, statement_lines
from jaxensemble.source.write.runs import VARIABLE, Run, numbered_runs


class Constructors:
    """Writes constructors. `names` are the names of definitions by number, `chain` and `identity` those of helpers."""

    def __init__(self, definitions: Sequence[Definition], names: Mapping[int, str], chain: str, identity: str):
        self.definitions = definitions
        self.names = names
        self.chain = chain
        self.identity = identity
        self.loops: Collection[Place] | None = None

    def runs(self, definition: Definition) -> dict[Place, int]:
        """Returns how many children, from the child at a path on, can be made in one loop."""
        found = {}
        for place, recipe in _dicts(definition):
            nodes = {
                key: self._make(definition, item, (*place, key))
                for key, item in self._required_children(definition, recipe)
            }
            found |= {(*place, run.first): run.count for run in numbered_runs(nodes).values()}
        return found

    def _required_children(self, definition: Definition, recipe: Recipe) -> list[tuple[str, Recipe]]:
        items = zip(recipe.keys, recipe.items, strict=True)
        return [(key, item) for key, item in items if key not in definition.optional or recipe is not definition.recipe]

    def lines(self, definition: Definition, is_root: bool, loops: Collection[Place] | None = None) -> list[str]:
        """Returns the lines of a class's `__init__`; the root's `__init__` always takes `rngs`.

        `loops` are the paths of the first children of the runs that the method calls in loops; None without a method.
        """
        self.loops = loops
        arguments: list[ast.AST] = [name("self")]
        arguments += [self._declaration(argument) for argument in definition.arguments]
        if is_root or self._needs_rngs(definition.recipe):
            arguments += [name("*"), name("rngs: nnx.Rngs")]
        body = self._attributes(definition)
        return [*def_lines(f"{INDENT}def __init__", arguments, 1), *(body or [f"{INDENT * 2}pass"])]

    def _attributes(self, definition: Definition) -> list[str]:
        if definition.is_list:
            items = self._items(definition, definition.recipe, ())
            return statement_lines("", call(ast.Attribute(call(name("super")), "__init__", ast.Load()), [items]), 2)
        lines: list[str] = []
        items = zip(definition.recipe.keys, definition.recipe.items, strict=True)
        nodes = {key: self._make(definition, recipe, (key,)) for key, recipe in items}
        loops = self._loops((), {key: nodes[key] for key, _ in self._required_children(definition, definition.recipe)})
        for key, node in nodes.items():
            flag, run = definition.optional.get(key), loops.get(key)
            if flag is not None:
                lines += _optional_set_lines(formula_expression(flag), key, node)
            elif run is None:
                lines += _set_lines(key, node, 2)
            elif key == run.first:
                lines += _run_lines(run)
        if RESIDUAL in definition.optional:
            lines += statement_lines(
                f"self.{definition.residual} = ", formula_expression(definition.optional[RESIDUAL]), 2
            )
        for key, flag in definition.flags.items():
            lines += statement_lines(f"self.{key} = ", formula_expression(flag), 2)
        in_body = [own for place, own in definition.formulas.items() if place[0] == ""]
        held = {own.name for own in in_body if isinstance(own, Argument)}
        held |= {own.argument.name for own in in_body if isinstance(own, ScaledArgument)}
        for argument in definition.arguments:
            if argument.name in held:
                lines += statement_lines(f"self.{argument.name} = ", name(argument.name), 2)
        return lines

    def _loops(self, place: Place, nodes: Mapping[str, ast.expr]) -> dict[str, Run]:
        """Returns the runs of children made in a loop: runs called in a loop, and runs with unusual names."""
        return {
            key: run
            for key, run in numbered_runs(nodes).items()
            if self.loops is None or (*place, run.first) in self.loops or not is_identifier(run.first)
        }

    def _make(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        """Returns the value of an attribute."""
        match recipe.kind:
            case "layer":
                return self._layer(definition, recipe, place)
            case "variable":
                return self._variable(definition, recipe, place)
            case "class":
                return self._instance(definition, recipe, place)
            case "chain":
                return call(name(self.chain), [self._items(definition, recipe, place)])
            case "list":
                return call(dotted_name("nnx.List"), [self._items(definition, recipe, place)])
            case "dict":
                return self._dict(definition, recipe, place)
            case "function":
                function = self._value(definition, (*place, "function"))
                assert function is not None
                return function
            case "none":
                return ast.Constant(None)

    def _items(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        """Returns the items of a list; if all are equal, or three or more in a row, as a comprehension."""
        nodes = [
            self._make(definition, item, (*place, key)) for key, item in zip(recipe.keys, recipe.items, strict=True)
        ]
        runs: list[list[ast.expr]] = []
        for node in nodes:
            if runs and flat_text(runs[-1][0]) == flat_text(node) and isinstance(node, ast.Call):
                runs[-1].append(node)
            else:
                runs.append([node])
        if len(runs) == 1 and len(runs[0]) > 1:
            return _repetition(runs[0])
        parts: list[ast.expr] = []
        for run in runs:
            parts += [ast.Starred(_repetition(run), ast.Load())] if len(run) > 2 else run
        return ast.List(parts, ast.Load())

    def _dict(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        nodes = [
            self._make(definition, item, (*place, key)) for key, item in zip(recipe.keys, recipe.items, strict=True)
        ]
        loops = self._loops(place, dict(zip(recipe.keys, nodes, strict=True)))
        if len(loops) == len(nodes) and len(set(map(id, loops.values()))) == 1:
            run = loops[recipe.keys[0]]
            each = ast.comprehension(name(VARIABLE), number_range(run.start, run.count), [], 0)
            return call(dotted_name("nnx.Dict"), [ast.DictComp(numbered_name(run.stem, VARIABLE), run.node, [each])])
        if all(is_identifier(key) for key in recipe.keys):
            return call(dotted_name("nnx.Dict"), [], dict(zip(recipe.keys, nodes, strict=True)))
        return call(dotted_name("nnx.Dict"), [ast.Dict([ast.Constant(key) for key in recipe.keys], nodes)])

    def _value(self, definition: Definition, place: Place) -> ast.expr | None:
        """Returns the expression for a place: an argument, a constant, or None."""
        if place in definition.formulas:
            return formula_expression(definition.formulas[place])
        return self._constant(definition.constants[place]) if place in definition.constants else None

    def _constant(self, value: ConstantValue) -> ast.expr:
        if isinstance(value, Function):
            return name(self.identity) if value == IDENTITY else dotted_name(self.names[value.definition])
        return literal(value)

    def _declaration(self, argument: Argument) -> ast.AST:
        own = argument.name
        return name(own) if argument.required else ast.keyword(own, self._constant(argument.default))

    def _layer(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        given = [*definition.constants, *definition.formulas]
        options = {p[-1]: self._value(definition, p) for p in given if p[:-1] == place}
        parameters = signature(recipe.name).parameters
        ordered = {key: options[key] for key in [*parameters, *options] if key in options}
        check_options(recipe.name, ordered, parameters)
        leading = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        positional = [ordered.pop(key) for key in leading[1:]] if set(leading[1:]) <= set(ordered) else []
        kwargs = {key: value for key, value in ordered.items() if value is not None}
        if "rngs" in parameters:
            kwargs["rngs"] = name("rngs")
        return call(dotted_name(recipe.name), [value for value in positional if value is not None], kwargs)

    def _variable(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        shape = self._value(definition, (*place, "shape"))
        assert shape is not None
        dtype = recipe.fixed[0]
        zeros = call(dotted_name("jnp.zeros"), [shape, *([] if dtype == "float32" else [literal(Dtype(dtype))])])
        kinds = {"param": "nnx.Param", "buffer": "layers.Buffer", "constant": "layers.Constant"}
        return call(dotted_name(kinds[recipe.name]), [zeros])

    def _instance(self, definition: Definition, recipe: Recipe, place: Place) -> ast.expr:
        made = self.definitions[recipe.definition]
        args, kwargs = [], {}
        for argument in made.arguments:
            spot = (*place, argument.name)
            value = self._value(definition, spot)
            if argument.required:
                assert value is not None
                args.append(value)
            elif value is not None and (
                spot in definition.formulas
                or comparison_key(definition.constants[spot]) != comparison_key(argument.default)
            ):
                kwargs[argument.name] = value
        if self._needs_rngs(made.recipe):
            kwargs["rngs"] = name("rngs")
        return call(name(self.names[recipe.definition]), args, kwargs)

    def _needs_rngs(self, recipe: Recipe) -> bool:
        for part in recipe.walk():
            if part.kind == "layer" and "rngs" in signature(part.name).parameters:
                return True
            if part.kind == "class" and self._needs_rngs(self.definitions[part.definition].recipe):
                return True
        return False


def _dicts(definition: Definition) -> Iterator[tuple[Place, Recipe]]:
    """Yields everything in a class that holds children by name: the class itself, and each `nnx.Dict`."""

    def within(place: Place, recipe: Recipe) -> Iterator[tuple[Place, Recipe]]:
        if recipe.kind == "dict":
            yield place, recipe
        if recipe.kind in ("dict", "list", "chain"):
            for key, item in zip(recipe.keys, recipe.items, strict=True):
                yield from within((*place, key), item)

    yield from within((), definition.recipe)


def formula_expression(value: Formula | Condition) -> ast.expr:
    """Returns the expression for a constant or a flag, in terms of a constructor's arguments."""
    match value:
        case ScaledArgument(argument):
            return scaled_expression(value, name(argument.name))
        case HalfKernel(kernel_size):
            return ast.BinOp(subscript(name(kernel_size.name), ast.Constant(0)), ast.FloorDiv(), ast.Constant(2))
        case ShapeItems(items):
            return ast.Tuple(
                [ast.Constant(n) if isinstance(n, int) else formula_expression(n) for n in items], ast.Load()
            )
        case Condition(pairs, equal):
            tests = [ast.Compare(_side(a), [_comparison(equal, b)], [_side(b)]) for a, b in pairs]
            return tests[0] if len(tests) == 1 else ast.BoolOp(ast.And() if equal else ast.Or(), list(tests))
    return name(value.name)


def _comparison(equal: bool, other: object) -> ast.cmpop:
    if other is None:
        return ast.Is() if equal else ast.IsNot()
    return ast.Eq() if equal else ast.NotEq()


def _side(value: object) -> ast.expr:
    return formula_expression(value) if isinstance(value, Argument | ScaledArgument) else literal(value)


def check_options(type_: str, options: Iterable[str], parameters: Iterable[str]) -> None:
    """Checks that a layer has all options.

    **Raises:** `InputError` naming the options that the layer lacks.
    """
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise InputError(f"{type_} has no option {listed}; expected some of {', '.join(parameters)}")


def _run_lines(run: Run) -> list[str]:
    """Returns the lines that set the attributes of a run, one after the other."""
    node = call(name("setattr"), [name("self"), numbered_name(run.stem, VARIABLE), run.node])
    opening = f"{INDENT * 2}for {VARIABLE} in {flat_text(number_range(run.start, run.count))}:"
    return [opening, *statement_lines("", node, 3)]


def _repetition(run: list[ast.expr]) -> ast.ListComp:
    count = call(name("range"), [ast.Constant(len(run))])
    return ast.ListComp(run[0], [ast.comprehension(name("_"), count, [], 0)])


def _set_lines(key: str, node: ast.expr, indent: int) -> list[str]:
    """Returns the lines that set an attribute; its name may be no identifier."""
    if is_identifier(key):
        return statement_lines(f"self.{key} = ", node, indent)
    return statement_lines("", call(name("setattr"), [name("self"), ast.Constant(key), node]), indent)


def _optional_set_lines(flag: ast.expr, key: str, node: ast.expr) -> list[str]:
    """Returns the lines that set an attribute to a child, or to None if the flag says that there is no child."""
    lines = _set_lines(key, ast.IfExp(flag, node, ast.Constant(None)), 2)
    if len(lines) == 1 and len(lines[0]) <= WIDTH:
        return lines
    there, absent = _set_lines(key, node, 3), _set_lines(key, ast.Constant(None), 3)
    return [f"{INDENT * 2}if {flat_text(flag)}:", *there, f"{INDENT * 2}else:", *absent]
