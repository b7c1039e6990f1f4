"""Expressions of the source, as `ast` nodes: literals, calls, operators, and the path to a child of a module."""

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp

from jaxensemble.errors import InputError
from jaxensemble.network.network import Dtype, Func, Record
from jaxensemble.network.vocabulary import (
    check_function,
    check_keyword,
    check_method,
    check_passed_functions,
    is_identifier,
)
from jaxensemble.source.plan.definitions import Argument, Definition, Recipe, ScaledArgument
from jaxensemble.source.read.steps import (
    Cut,
    Hole,
    Length,
    Local,
    Many,
    Operand,
    Slot,
    Step,
    ToFunction,
    ToLayer,
    ToModule,
    ToName,
    VariableRead,
)

BINARY: dict[str, type[ast.operator]] = {
    "+": ast.Add,
    "-": ast.Sub,
    "*": ast.Mult,
    "/": ast.Div,
    "//": ast.FloorDiv,
    "%": ast.Mod,
    "**": ast.Pow,
    "@": ast.MatMult,
    "&": ast.BitAnd,
    "|": ast.BitOr,
    "^": ast.BitXor,
}
COMPARISONS: dict[str, type[ast.cmpop]] = {
    "<": ast.Lt,
    "<=": ast.LtE,
    ">": ast.Gt,
    ">=": ast.GtE,
    "==": ast.Eq,
    "!=": ast.NotEq,
}
UNARY: dict[str, type[ast.unaryop]] = {"neg": ast.USub, "~": ast.Invert}


def name(identifier: str) -> ast.Name:
    return ast.Name(identifier, ast.Load())


def dotted_name(path: str) -> ast.expr:
    """Returns a dotted name such as `jnp.linalg.norm` as an expression."""
    root, *rest = path.split(".")
    node: ast.expr = name(root)
    for part in rest:
        node = ast.Attribute(node, part, ast.Load())
    return node


def call(function: ast.expr, args: Sequence[ast.expr] = (), kwargs: Mapping[str, ast.expr] | None = None) -> ast.Call:
    return ast.Call(function, list(args), [ast.keyword(key, value) for key, value in (kwargs or {}).items()])


def subscript(value: ast.expr, item: ast.expr) -> ast.Subscript:
    return ast.Subscript(value, item, ast.Load())


def child(parent: ast.expr, child_name: str, *, in_list: bool = False) -> ast.expr:
    """Returns a child of a module: `self.conv`, `self.layers[3]`, or, if need be, `getattr(self, "my-block")`.

    >>> ast.unparse(child(name("self"), "my-block"))
    "getattr(self, 'my-block')"
    """
    if in_list:
        return subscript(parent, ast.Constant(int(child_name)))
    if is_identifier(child_name):
        return ast.Attribute(parent, child_name, ast.Load())
    return call(name("getattr"), [parent, ast.Constant(child_name)])


def scaled_expression(value: ScaledArgument, argument: ast.expr) -> ast.expr:
    """Returns a multiple or a part of an argument.

    >>> ast.unparse(scaled_expression(ScaledArgument(Argument("features", True), over=4), name("features")))
    'features // 4'
    """
    if value.over > 1:
        return ast.BinOp(argument, ast.FloorDiv(), ast.Constant(value.over))
    return ast.BinOp(ast.Constant(value.times), ast.Mult(), argument)


def numbered_name(stem: str, number: str) -> ast.JoinedStr:
    """Returns a name that ends in the number that a variable holds.

    >>> ast.unparse(numbered_name("layer", "i"))
    "f'layer{i}'"
    """
    return ast.JoinedStr([ast.Constant(stem), ast.FormattedValue(name(number), -1)])


def number_range(start: int, count: int) -> ast.Call:
    """Returns the range of the numbers of children.

    >>> ast.unparse(number_range(0, 3)), ast.unparse(number_range(1, 3))
    ('range(3)', 'range(1, 4)')
    """
    bounds = [start, start + count] if start else [count]
    return call(name("range"), [ast.Constant(bound) for bound in bounds])


def literal(value: object) -> ast.expr:
    """Returns a constant as an expression: any number, also infinities and NaNs, and tuples and lists of constants.

    >>> ast.unparse(literal((1, -2.5, float("-inf"), Dtype("int32"))))
    '(1, -2.5, -jnp.inf, jnp.int32)'

    **Raises:** `InputError` for any other value.
    """
    match value:
        case None | bool() | str():
            return ast.Constant(value)
        case int() | float():
            return _real_number(value)
        case complex():
            return call(name("complex"), [_real_number(value.real), _real_number(value.imag)])
        case Dtype(dtype):
            return _dtype(dtype)
        case Func(function):
            check_function(function)
            return dotted_name(function)
        case tuple():
            return ast.Tuple([literal(item) for item in value], ast.Load())
        case list():
            return ast.List([literal(item) for item in value], ast.Load())
    raise InputError(f"a constant of a network has to be a number, string, dtype, tuple or list; got {value!r}")


def _real_number(value: int | float) -> ast.expr:
    if isinstance(value, int):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)
    if math.isnan(value):
        return dotted_name("jnp.nan")
    if math.copysign(1, value) < 0:
        return ast.UnaryOp(ast.USub(), _real_number(-value))
    return dotted_name("jnp.inf") if math.isinf(value) else ast.Constant(value)


def _dtype(dtype: str) -> ast.expr:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", dtype) or not isinstance(getattr(jnp, dtype, None), type(jnp.float32)):
        raise InputError(f"expected the name of a JAX dtype, such as float32, int64 or bool_; got {dtype!r}")
    return dotted_name(f"jnp.{dtype}")


RecordKey = tuple[str, ...]
"""The kind, the name and the fields of a record, which identify its class."""


def record_key(record: Record) -> RecordKey:
    return (record.kind, record.name, *record.fields)


class Expressions:
    """Writes the steps of one definition, with its children and the constants of its holes.

    `runs` says how many children with numbered names, from the child at a path on, are made in one loop.
    """

    def __init__(
        self,
        definition: Definition,
        definitions: Sequence[Definition],
        functions: Mapping[int, str],
        runs: Mapping[tuple[str, ...], int] | None = None,
    ):
        self.runs = runs or {}
        self.definition = definition
        self.definitions = definitions
        self.functions = functions
        self.items: dict[tuple[str, ...], ast.expr] = {}
        self.looped: set[tuple[str, ...]] = set()
        self.records: Mapping[RecordKey, str] = {}

    def recipe_at(self, path: Sequence[str]) -> Recipe | None:
        """Returns the recipe of the attribute at a path; None for the leaf of a layer."""
        recipe: Recipe | None = self.definition.recipe
        for part in path:
            if recipe is None or part not in recipe.keys:
                return None
            recipe = recipe.items[recipe.keys.index(part)]
            if recipe.kind == "class":
                recipe = self.definitions[recipe.definition].recipe
        return recipe

    def child(self, path: Sequence[str]) -> ast.expr:
        """Returns the path from `self` to a child or variable; `items` has the expression for the child of a loop."""
        if tuple(path) in self.items:
            return self.items[tuple(path)]
        node: ast.expr = name("self")
        for depth, part in enumerate(path):
            recipe = self.recipe_at(path[:depth])
            node = child(node, part, in_list=recipe is not None and recipe.kind in ("list", "chain"))
        return node

    def numbered_child(self, path: Sequence[str], stem: str, number: str) -> ast.expr:
        """Returns the child whose name is a stem and the number that a variable holds."""
        recipe = self.recipe_at(path)
        parent, key = self.child(path), numbered_name(stem, number)
        if path and recipe is not None and recipe.kind == "dict":
            return subscript(parent, key)
        return call(name("getattr"), [parent, key])

    def hole(self, number: int) -> ast.expr:
        """Returns a constant of the body: a literal, or the attribute that holds the constant."""
        place = ("", str(number))
        own = self.definition.formulas.get(place)
        if isinstance(own, Argument):
            return child(name("self"), own.name)
        if isinstance(own, ScaledArgument):
            return scaled_expression(own, child(name("self"), own.argument.name))
        return literal(self.definition.constants[place])

    def step(self, step: Step, value: Callable[[Local | Slot], ast.expr]) -> ast.expr:
        """Returns a step as an expression; `value` returns the expression for a value."""
        if isinstance(step.target, ToName):
            return self._named_call(step.target.name, step, value)
        if isinstance(step.target, ToFunction):
            function: ast.expr = dotted_name(self.functions[step.target.definition])
        else:
            function = self.child(step.target.path)
        return self._call(function, step.args, step, value)

    def _call(
        self, function: ast.expr, args: Sequence[Operand], step: Step, value: Callable[[Local | Slot], ast.expr]
    ) -> ast.expr:
        for key, _ in step.kwargs:
            check_keyword(key)
        kwargs = {key: self.operand(operand, value) for key, operand in step.kwargs}
        return call(function, [self.operand(arg, value) for arg in args], kwargs)

    def _named_call(self, target: str, step: Step, value: Callable[[Local | Slot], ast.expr]) -> ast.expr:
        check_passed_functions(target, _function_names((step.args, tuple(operand for _, operand in step.kwargs))))
        if target in BINARY:
            left, right = (self.operand(arg, value, in_arithmetic=True) for arg in step.args)
            return ast.BinOp(left, BINARY[target](), right)
        if target in COMPARISONS or target == "=":
            left, right = (self.operand(arg, value) for arg in step.args[:2])
            return ast.Compare(left, [COMPARISONS.get(target, ast.Eq)()], [right])
        if target in UNARY:
            return ast.UnaryOp(UNARY[target](), self.operand(step.args[0], value))
        if target == "[]":
            return subscript(self.operand(step.args[0], value), self.operand(step.args[1], value))
        if target.startswith("."):
            check_method(target)
            method = ast.Attribute(self.operand(step.args[0], value), target[1:], ast.Load())
            return self._call(method, step.args[1:], step, value)
        check_function(target)
        return self._call(dotted_name(target), step.args, step, value)

    def operand(
        self, operand: Operand, value: Callable[[Local | Slot], ast.expr], *, in_arithmetic: bool = False
    ) -> ast.expr:
        """Returns an operand as an expression. A variable is read by `[...]`, except in arithmetic."""
        match operand:
            case Local() | Slot():
                return value(operand)
            case Hole(number):
                return self.hole(number)
            case VariableRead(path):
                variable = self.child(path)
                return variable if in_arithmetic else subscript(variable, ast.Constant(...))
            case Length(VariableRead(path), axis):
                return subscript(ast.Attribute(self.child(path), "shape", ast.Load()), literal(axis))
            case Length(of, axis):
                return subscript(ast.Attribute(self.operand(of, value), "shape", ast.Load()), literal(axis))
            case Many(is_tuple, items):
                nodes = [self.operand(item, value) for item in items]
                return ast.Tuple(nodes, ast.Load()) if is_tuple else ast.List(nodes, ast.Load())
            case Cut(start, stop, step):
                return ast.Slice(*(None if part is None else self.operand(part, value) for part in (start, stop, step)))
            case Func():
                return literal(operand)
        return ast.Constant(operand)


def _function_names(operand: object) -> Iterator[str]:
    """Yields the name of every function within operands."""
    match operand:
        case Func(function):
            yield function
        case Many(_, items) | (tuple() as items):
            for item in items:
                yield from _function_names(item)


def called_child(step: Step) -> tuple[str, ...]:
    """Returns the path of the child that a step calls; empty if the step calls no child."""
    return step.target.path if isinstance(step.target, ToLayer | ToModule) else ()


def is_operator(step: Step) -> bool:
    """Returns whether a step is written with an operator or brackets."""
    return isinstance(step.target, ToName) and step.target.name in {*BINARY, *COMPARISONS, *UNARY, "[]"}
