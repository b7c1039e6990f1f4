"""The steps of one module call, without names: equal bodies are equal values, whatever their paths and numbers.

In a body, values from outside are numbered slots, and numbers and options are numbered holes. Two calls with equal
steps can share one method: their slots say which arguments the method needs, their holes what its constructor needs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

from jaxensemble.network.network import Arg, Call, Dtype, Func, Record, Ref, Slice, Var
from jaxensemble.source.read.frames import AxisLength, Frame
from jaxensemble.source.read.modules import Path, split_path
from jaxensemble.source.read.tidy import Unpacking


@dataclasses.dataclass(frozen=True)
class Local:
    """Value that the body itself computes, counted in order."""

    index: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """Use of a value from outside, counted in order; once the uses are matched, an argument of the method."""

    index: int


@dataclasses.dataclass(frozen=True)
class Hole:
    """Number, string or dtype, counted in order."""

    index: int


@dataclasses.dataclass(frozen=True)
class VariableRead:
    """Array of a variable, by its path from the module."""

    path: Path


@dataclasses.dataclass(frozen=True)
class Length:
    """Length of an axis."""

    of: "Operand"
    axis: int


@dataclasses.dataclass(frozen=True)
class Many:
    """Tuple or list."""

    is_tuple: bool
    items: tuple["Operand", ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Slice."""

    start: "Operand"
    stop: "Operand"
    step: "Operand"


Operand: TypeAlias = Local | Slot | Hole | VariableRead | Length | Many | Cut | Func | EllipsisType | None


@dataclasses.dataclass(frozen=True)
class ToLayer:
    """Call of the layer at a path from the module."""

    path: Path


@dataclasses.dataclass(frozen=True)
class ToModule:
    """Call of the module at a path, whose method is in the definition with this number."""

    path: Path
    definition: int


@dataclasses.dataclass(frozen=True)
class ToFunction:
    """Call of a function that the source defines for the module at a path."""

    path: Path
    definition: int


@dataclasses.dataclass(frozen=True)
class ToName:
    """Operator, method or function by its name."""

    name: str


Target: TypeAlias = ToLayer | ToModule | ToFunction | ToName


@dataclasses.dataclass(frozen=True)
class Step:
    """One call and the number of its results; results are counted through the body."""

    target: Target
    args: tuple[Operand, ...]
    kwargs: tuple[tuple[str, Operand], ...] = ()
    outs: int = 1


@dataclasses.dataclass
class Body:
    """Steps, and the values of slots and constants of holes that one module call fills in.

    `names` are the values that the steps define, `hints` possible names of the holes.
    """

    steps: tuple[Step, ...] = ()
    slots: list[str] = dataclasses.field(default_factory=list)
    constants: list[Arg] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class FrameCall:
    """Call of a frame in the frame around: what is called, with which values, and with which results."""

    target: Callable[[Path], Target]
    inputs: list[str]
    outputs: list[str]


class Reader:
    """Reads a frame into a `Body`, step by step."""

    def __init__(self, root: Path):
        self.root = root
        self.body = Body()
        self._locals: dict[str, int] = {}

    def read(self, frame: Frame, called: Callable[[Frame], FrameCall]) -> Body:
        """Reads the body of a frame; `called` returns the calls that replace inner frames."""
        for item in frame.items:
            if isinstance(item, Frame):
                inner = called(item)
                args = tuple(self.operand(Ref(name)) for name in inner.inputs)
                self._add(Step(inner.target(item.path[len(self.root) :]), args, outs=len(inner.outputs)), inner.outputs)
            else:
                outs = item.outs if isinstance(item, Unpacking) else (item.out,)
                self._add(dataclasses.replace(self._step(item), outs=len(outs)), outs)
        return self.body

    def _add(self, step: Step, outs: Sequence[str]) -> None:
        self.body.steps += (step,)
        for name in outs:
            self._locals[name] = len(self.body.names)
            self.body.names.append(name)

    def _step(self, call: Call) -> Step:
        kind, _, path = call.target.partition(":")
        if kind == "layer" and path:
            target: Target = ToLayer(self._relative(path))
        else:
            target = ToName(call.target)
        hint = call.target.rpartition(".")[2] if call.target[-1].isalnum() else "size"
        is_factor = call.target in ("*", "/")
        args = tuple(self.operand(arg, "scale" if is_factor and isinstance(arg, float) else hint) for arg in call.args)
        kwargs = tuple((key, self.operand(value, key)) for key, value in call.kwargs.items())
        return Step(target, args, kwargs)

    def _relative(self, path: str) -> Path:
        return split_path(path)[len(self.root) :]

    def operand(self, arg: object, hint: str = "size") -> Operand:
        """Returns an argument with slots, locals and holes for its references and constants."""
        match arg:
            case None | EllipsisType() | Func():
                return arg
            case Ref(name):
                if name in self._locals:
                    return Local(self._locals[name])
                self.body.slots.append(name)
                return Slot(len(self.body.slots) - 1)
            case Var(path):
                return VariableRead(self._relative(path))
            case AxisLength(of, axis):
                return Length(self.operand(of), axis)
            case Slice(start, stop, step):
                return Cut(self.operand(start, "start"), self.operand(stop, "stop"), self.operand(step, "step"))
            case tuple() | list() if not is_constant(arg):
                return Many(isinstance(arg, tuple), tuple(self.operand(item, hint) for item in arg))
        self.body.constants.append(arg)  # type: ignore[arg-type]
        self.body.hints.append(hint)
        return Hole(len(self.body.constants) - 1)


def is_constant(arg: object) -> bool:
    """Returns whether an argument holds only numbers, strings, dtypes and None."""
    match arg:
        case tuple() | list():
            return all(map(is_constant, arg))
        case None | bool() | int() | float() | complex() | str() | Dtype():
            return True
    return False


def leaves(operand: object) -> list[Local | Slot]:
    """Returns every use of a value within an operand or step, in order."""
    return [part for part in _parts(operand) if isinstance(part, Local | Slot)]


def variables_read(operand: object) -> list[Path]:
    """Returns every variable that an operand or step reads, in order."""
    return [part.path for part in _parts(operand) if isinstance(part, VariableRead)]


def _parts(operand: object) -> list[Local | Slot | VariableRead]:
    match operand:
        case Local() | Slot() | VariableRead():
            return [operand]
        case Length(of):
            return _parts(of)
        case Many(_, items):
            return _parts(items)
        case Cut(start, stop, step):
            return _parts((start, stop, step))
        case Step(_, args, kwargs):
            return _parts((args, tuple(value for _, value in kwargs)))
        case tuple():
            return [leaf for item in operand for leaf in _parts(item)]
    return []


def match_slots(bodies: list[Body]) -> tuple[list[int], list[list[str]]]:
    """Returns the argument that each slot is, and the arguments of each body.

    Slots are one argument if they are one value in every body.

    >>> match_slots([Body(slots=["q", "m", "m"]), Body(slots=["x", "x", "x"])])
    ([0, 1, 1], [['q', 'm'], ['x', 'x']])
    """
    columns: dict[tuple[str, ...], int] = {}
    slots = [columns.setdefault(column, len(columns)) for column in zip(*(body.slots for body in bodies), strict=True)]
    return slots, [list(arguments) for arguments in zip(*columns, strict=True)] if columns else [[] for _ in bodies]


def returned_uses(returns: Any) -> list[Local | Slot]:
    """Returns every use of a value within the results of a method, in order."""
    if isinstance(returns, Record):
        return returned_uses(returns.fields)
    if isinstance(returns, dict):
        return [use for value in returns.values() for use in returned_uses(value)]
    if isinstance(returns, tuple | list):
        return [use for value in returns for use in returned_uses(value)]
    return leaves(returns)
