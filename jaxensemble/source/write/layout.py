"""Text of `ast` nodes, in the layout of `ruff format` at 120 columns.

Only the nodes that the generator makes are known. Lines that are too long are broken at brackets, outermost first. The
content of brackets goes on one line if it fits, else on one line for each item, with a trailing comma.
"""

import ast
import math
import re
from collections.abc import Sequence

WIDTH = 120
INDENT = "    "

_BINARY: dict[type[ast.operator], tuple[str, int]] = {
    ast.BitOr: ("|", 3),
    ast.BitXor: ("^", 4),
    ast.BitAnd: ("&", 5),
    ast.LShift: ("<<", 6),
    ast.RShift: (">>", 6),
    ast.Add: ("+", 7),
    ast.Sub: ("-", 7),
    ast.Mult: ("*", 8),
    ast.MatMult: ("@", 8),
    ast.Div: ("/", 8),
    ast.FloorDiv: ("//", 8),
    ast.Mod: ("%", 8),
    ast.Pow: ("**", 10),
}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
}
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "-", ast.Invert: "~"}
_TERNARY, _OR, _AND, _COMPARISON, _SIGN, _ATOM = 0, 0.5, 0.75, 2, 9, 11


def quoted(text: str) -> str:
    """Returns a string literal with double quotes, as ruff prefers, unless the text has fewer single quotes.

    >>> print(quoted("same"), quoted('say "so"'))
    "same" 'say "so"'
    """
    body = text.encode("unicode_escape").decode("ascii")
    quote = "'" if body.count('"') > body.count("'") else '"'
    return quote + body.replace(quote, f"\\{quote}") + quote


def flat_text(node: ast.AST) -> str:
    """Returns the text of an expression on one line.

    >>> flat_text(ast.parse("(a + b) * f(c, d=1)[:, None]", mode="eval").body)
    '(a + b) * f(c, d=1)[:, None]'
    """
    return _flat_text_and_level(node)[0]


def _flat_text_and_level(node: ast.AST) -> tuple[str, float]:
    """Returns the text, and the precedence of its outermost operator."""
    match node:
        case ast.Name(id):
            return id, _ATOM
        case ast.Constant(value):
            return _constant(value), _ATOM
        case ast.Attribute(value, attr):
            text = _operand_text(value, _ATOM)
            return (f"({text})" if text.isdigit() else text) + f".{attr}", _ATOM
        case ast.Call():
            return f"{_operand_text(node.func, _ATOM)}({', '.join(map(flat_text, call_arguments(node)))})", _ATOM
        case ast.keyword(arg, value):
            return f"{arg}={flat_text(value)}", _ATOM
        case ast.Starred(value):
            return f"*{_operand_text(value, 3)}", _ATOM
        case ast.Subscript(value, index):
            inner = (
                ", ".join(map(flat_text, index.elts))
                if isinstance(index, ast.Tuple) and index.elts
                else flat_text(index)
            )
            lone = isinstance(index, ast.Tuple) and len(index.elts) == 1
            return f"{_operand_text(value, _ATOM)}[{inner}{',' if lone else ''}]", _ATOM
        case ast.Slice():
            return _slice(node), _ATOM
        case ast.Tuple(elts):
            return f"({', '.join(map(flat_text, elts))}{',' if len(elts) == 1 else ''})", _ATOM
        case ast.List(elts):
            return f"[{', '.join(map(flat_text, elts))}]", _ATOM
        case ast.Dict(keys, values):
            return "{" + ", ".join(
                f"{flat_text(k)}: {flat_text(v)}" for k, v in zip(keys, values, strict=True) if k
            ) + "}", _ATOM
        case ast.JoinedStr([ast.Constant(str(stem)), ast.FormattedValue(ast.Name(id))]):
            text = quoted(stem.replace("{", "{{").replace("}", "}}"))
            return f"f{text[:-1]}{{{id}}}{text[-1]}", _ATOM
        case ast.DictComp(key, value, [generator]):
            return f"{{{flat_text(key)}: {flat_text(value)} {_for_text(generator)}}}", _ATOM
        case ast.ListComp(elt, [generator]):
            return f"[{flat_text(elt)} {_for_text(generator)}]", _ATOM
        case ast.IfExp(test, body, orelse):
            return f"{_operand_text(body, _OR)} if {_operand_text(test, _OR)} else {_operand_text(orelse, 0)}", _TERNARY
        case ast.Compare(left, [op], [right]):
            return f"{_operand_text(left, 3)} {_COMPARE[type(op)]} {_operand_text(right, 3)}", _COMPARISON
        case ast.BoolOp(op, values):
            word, level = ("or", _OR) if isinstance(op, ast.Or) else ("and", _AND)
            return f" {word} ".join(_operand_text(value, level + 0.1) for value in values), level
        case ast.UnaryOp(op, operand):
            return f"{_UNARY[type(op)]}{_operand_text(operand, _SIGN)}", _SIGN
        case ast.BinOp(left, op, right):
            return _binary(left, op, right)
    raise TypeError(f"no text for {ast.dump(node)}")


def _for_text(generator: ast.comprehension) -> str:
    return f"for {flat_text(generator.target)} in {flat_text(generator.iter)}"


def _operand_text(node: ast.AST, tightness: float) -> str:
    text, own = _flat_text_and_level(node)
    return text if own >= tightness else f"({text})"


def _binary(left: ast.expr, op: ast.operator, right: ast.expr) -> tuple[str, int]:
    symbol, level = _BINARY[type(op)]
    if not isinstance(op, ast.Pow):
        return f"{_operand_text(left, level)} {symbol} {_operand_text(right, level + 1)}", level
    space = "" if _is_simple_power_operand(left) and _is_simple_power_operand(right) else " "
    return f"{_operand_text(left, level + 1)}{space}**{space}{_operand_text(right, _SIGN)}", level


def _is_simple_power_operand(node: ast.AST) -> bool:
    """Returns whether ruff sets `**` without spaces next to this operand."""
    match node:
        case ast.UnaryOp(_, operand):
            return _is_simple_power_operand(operand)
        case ast.Attribute(value):
            return _is_simple_power_operand(value) and not isinstance(value, ast.Constant)
        case ast.Constant(value):
            return isinstance(value, int | float | complex) and not isinstance(value, bool)
    return isinstance(node, ast.Name)


def _slice(node: ast.Slice) -> str:
    bounds = [node.lower, node.upper] + ([node.step] if node.step else [])
    if all(bound is None or _is_simple_bound(bound) for bound in bounds):
        return ":".join(flat_text(bound) if bound else "" for bound in bounds)
    text = " : ".join(flat_text(bound) if bound else "" for bound in bounds)
    return text.replace(" :  : ", " :: ").strip()


def _is_simple_bound(node: ast.AST) -> bool:
    return (
        _is_simple_bound(node.operand) if isinstance(node, ast.UnaryOp) else isinstance(node, ast.Name | ast.Constant)
    )


def _constant(value: object) -> str:
    if isinstance(value, str):
        return quoted(value)
    if value is Ellipsis:
        return "..."
    if isinstance(value, float | complex) and not (math.isfinite(value.real) and math.isfinite(value.imag)):
        raise TypeError(f"{value} has no literal")
    return repr(value)


def call_arguments(call: ast.Call) -> list[ast.AST]:
    """Returns everything between the brackets of a call, in order."""
    return [*call.args, *call.keywords]


def statement_lines(prefix: str, node: ast.expr, indent: int) -> list[str]:
    """Returns the lines of a statement: `prefix` (`x = `, `return `), then an expression.

    >>> print("\\n".join(statement_lines("x = ", ast.parse("f(a, b=[1, 2])", mode="eval").body, 1)))
        x = f(a, b=[1, 2])
    """
    if isinstance(node, ast.Tuple) and len(node.elts) > 1:
        line = INDENT * indent + prefix + ", ".join(map(flat_text, node.elts))
        if len(line) <= WIDTH:
            return [line]
    return _broken_lines(prefix, node, "", indent)


def _broken_lines(prefix: str, node: ast.AST, suffix: str, indent: int) -> list[str]:
    line = INDENT * indent + prefix + flat_text(node) + suffix
    if len(line) <= WIDTH:
        return [line]
    match node:
        case ast.Constant(str(text)):
            return _string_lines(prefix, text, suffix, indent)
        case ast.keyword(arg, value):
            return _broken_lines(f"{prefix}{arg}=", value, suffix, indent)
        case ast.Starred(value):
            return _broken_lines(f"{prefix}*", value, suffix, indent)
        case ast.Call() if call_arguments(node):
            opening = f"{prefix}{_operand_text(node.func, _ATOM)}("
            return bracketed_lines(opening, call_arguments(node), ")" + suffix, indent, fits_joined=True)
        case ast.Tuple(elts) if elts:
            return bracketed_lines(f"{prefix}(", elts, ")" + suffix, indent)
        case ast.List(elts) if elts:
            return bracketed_lines(f"{prefix}[", elts, "]" + suffix, indent)
        case ast.Dict(keys) if keys:
            return _broken_dict_lines(prefix, node, suffix, indent)
        case ast.DictComp(key, value, [generator]):
            inner = _broken_lines(f"{flat_text(key)}: ", value, "", indent + 1)
            inner += [INDENT * (indent + 1) + _for_text(generator)]
            return [INDENT * indent + prefix + "{", *inner, INDENT * indent + "}" + suffix]
        case ast.ListComp(elt, [generator]):
            inner = _broken_lines("", elt, "", indent + 1)
            inner += [INDENT * (indent + 1) + _for_text(generator)]
            return [INDENT * indent + prefix + "[", *inner, INDENT * indent + "]" + suffix]
    return [line]


def _string_lines(prefix: str, text: str, suffix: str, indent: int) -> list[str]:
    """Returns the lines of a string that is too long for its line, as several literals."""
    room, pieces = WIDTH - len(INDENT * indent + prefix + suffix) - 2, [""]
    for word in re.findall(r"\S*\s*", text):
        if pieces[-1] and len(quoted(pieces[-1] + word)) > room:
            pieces.append("")
        pieces[-1] += word
    lines = [INDENT * indent + prefix + quoted(pieces[0]), *(INDENT * indent + quoted(piece) for piece in pieces[1:])]
    return [*lines[:-1], lines[-1] + suffix]


def _broken_dict_lines(prefix: str, node: ast.Dict, suffix: str, indent: int) -> list[str]:
    lines = [INDENT * indent + prefix + "{"]
    for key, value in zip(node.keys, node.values, strict=True):
        assert key is not None
        lines += _broken_lines(f"{flat_text(key)}: ", value, ",", indent + 1)
    return [*lines, INDENT * indent + "}" + suffix]


def bracketed_lines(
    opening: str, items: list[ast.AST] | list[ast.expr], closing: str, indent: int, *, fits_joined: bool = False
) -> list[str]:
    """Returns the lines of bracketed items; with `fits_joined` all items may share a line, without a trailing comma."""
    first, last = INDENT * indent + opening, INDENT * indent + closing
    joined = INDENT * (indent + 1) + ", ".join(map(flat_text, items))
    if fits_joined and len(joined) <= WIDTH:
        return [first, joined, last]
    if fits_joined and len(items) == 1 and isinstance(items[0], ast.ListComp | ast.DictComp | ast.List | ast.Dict):
        return [first, *_broken_lines("", items[0], "", indent + 1), last]
    return [first, *(line for item in items for line in _broken_lines("", item, ",", indent + 1)), last]


def def_lines(start: str, arguments: Sequence[ast.AST], indent: int) -> list[str]:
    """Returns the lines of a `def` up to its colon; `start` is indented already."""
    line = f"{start}({', '.join(map(flat_text, arguments))}):"
    if len(line) <= WIDTH:
        return [line]
    return bracketed_lines(f"{start.strip()}(", list(arguments), "):", indent, fits_joined=True)
