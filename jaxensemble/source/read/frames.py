"""The calls of a network as nested frames, one for each call of a module."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxensemble.network.network import Call, Record, Ref, ReferenceTree, Slice, Var
from jaxensemble.source.read.modules import Module, Path, is_inside_layer, scope_path, split_path


@dataclasses.dataclass(frozen=True)
class AxisLength:
    """Length of one axis of an array: an argument that replaces a `.shape` call."""

    of: Ref | Var
    axis: int


def operands(arg: object) -> Iterator[Ref | Var]:
    """Yields every `Ref` and `Var` within an argument or a tree of outputs, also within an `AxisLength`."""
    match arg:
        case Ref() | Var():
            yield arg
        case AxisLength(of):
            yield of
        case Slice(start, stop, step):
            yield from operands((start, stop, step))
        case tuple() | list():
            for item in arg:
                yield from operands(item)
        case Mapping():
            yield from operands(list(arg.values()))
        case Record():
            yield from operands(arg.fields)


def inline_shapes(calls: Sequence[Call], outputs: ReferenceTree) -> tuple[list[Call], ReferenceTree]:
    """Returns calls and outputs with every `.shape` call moved to where its result is used.

    The source then reads `x.reshape(x.shape[0], -1)`, and no module has to pass a length to another module.
    """
    shapes: dict[str, AxisLength] = {}
    kept = []
    for call in calls:
        if call.target == ".shape":
            of, axis = call.args
            assert isinstance(of, Ref | Var) and isinstance(axis, int)
            shapes[call.out] = AxisLength(of, axis)
        else:
            kept.append(
                dataclasses.replace(
                    call, args=_replace_shapes(call.args, shapes), kwargs=_replace_shapes(dict(call.kwargs), shapes)
                )
            )
    return kept, _replace_shapes(outputs, shapes)


def _replace_shapes(arg: Any, shapes: Mapping[str, AxisLength]) -> Any:
    match arg:
        case Ref(name):
            return shapes.get(name, arg)
        case Slice(start, stop, step):
            return Slice(_replace_shapes(start, shapes), _replace_shapes(stop, shapes), _replace_shapes(step, shapes))
        case tuple():
            return tuple(_replace_shapes(item, shapes) for item in arg)
        case list():
            return [_replace_shapes(item, shapes) for item in arg]
        case dict():
            return {key: _replace_shapes(value, shapes) for key, value in arg.items()}
        case Record():
            return dataclasses.replace(arg, fields=_replace_shapes(dict(arg.fields), shapes))
    return arg


def drop_unused(calls: Sequence[Call], outputs: ReferenceTree) -> list[Call]:
    """Returns the calls whose results are used, and all calls of layers, which may keep statistics, and all writes."""
    used = {ref.name for ref in operands(outputs) if isinstance(ref, Ref)}
    kept = []
    for call in reversed(calls):
        if call.out in used or call.target == "=" or call.target.startswith("layer:"):
            used |= {ref.name for ref in operands((call.args, dict(call.kwargs))) if isinstance(ref, Ref)}
            kept.append(call)
    return kept[::-1]


@dataclasses.dataclass
class Frame:
    """One call of the module at `path`: its steps, some of which are frames themselves."""

    path: Path
    scope: tuple[str, ...]
    items: list["Call | Frame"] = dataclasses.field(default_factory=list)

    def calls(self) -> Iterator[Call]:
        """Yields every call of this frame and of its inner frames, in order."""
        for item in self.items:
            if isinstance(item, Frame):
                yield from item.calls()
            else:
                yield item

    def frames(self) -> Iterator["Frame"]:
        """Yields every inner frame, outer frames first."""
        for item in self.items:
            if isinstance(item, Frame):
                yield item
                yield from item.frames()


def frame_tree(calls: Sequence[Call], root: Module) -> Frame:
    """Returns the calls of a network as one frame with inner frames.

    A module gets no frame if its calls are not contiguous, or use layers or variables outside the module. Its steps
    then belong to the frame around.
    """
    dissolved: set[Path] = set()
    while True:
        frame, again = _nest_calls(calls, root, dissolved)
        again |= {inner.path for inner in frame.frames() if not _is_closed(inner)}
        if again <= dissolved:
            return frame
        dissolved |= again


def _nest_calls(calls: Sequence[Call], root: Module, dissolved: set[Path]) -> tuple[Frame, set[Path]]:
    """Returns the tree without frames for `dissolved` modules, and the modules that are left and entered again."""
    top = Frame((), ())
    stack = [top]
    closed: set[tuple[str, ...]] = set()
    broken = set()
    for call in calls:
        entries = [(call.scope[: k + 1], scope_path(entry)) for k, entry in enumerate(call.scope)]
        wanted = [(scope, path) for scope, path in entries if path not in dissolved and _has_frames(path, root)]
        shared = 0
        while shared < min(len(wanted), len(stack) - 1) and stack[shared + 1].scope == wanted[shared][0]:
            shared += 1
        closed |= {frame.scope for frame in stack[shared + 1 :]}
        del stack[shared + 1 :]
        for scope, path in wanted[shared:]:
            if scope in closed:
                broken.add(path)
            stack.append(Frame(path, scope))
            stack[-2].items.append(stack[-1])
        stack[-1].items.append(call)
    return top, broken


def _has_frames(path: Path, root: Module) -> bool:
    return bool(path) and not is_inside_layer(root, path)


def _is_closed(frame: Frame) -> bool:
    """Returns whether a frame uses only layers and variables beneath its own module."""
    reached = [
        split_path(call.target.removeprefix("layer:")) for call in frame.calls() if call.target.startswith("layer:")
    ]
    reached += [
        split_path(var.path)
        for call in frame.calls()
        for var in operands((call.args, dict(call.kwargs)))
        if isinstance(var, Var)
    ]
    reached += [inner.path for inner in frame.frames()]
    return all(path[: len(frame.path)] == frame.path and path != frame.path for path in reached)


def fill_gaps(top: Frame, root: Module) -> None:
    """Gives steps between the calls of two children of a numbered module to a missing child between the two.

    In `nn.Sequential(conv, flatten, linear)` the scope of the reshape may not name `flatten`. With a frame for the
    reshape, the whole is a chain again.
    """
    for frame in [top, *top.frames()]:
        module = root.descendant(frame.path)
        if module.is_numbered and module.has_content:
            _fill_gaps(frame, module)


def _fill_gaps(frame: Frame, module: Module) -> None:
    items: list[Call | Frame] = []
    loose: list[Call | Frame] = []
    last = -1
    for item in frame.items:
        number = _child_number(item, frame.path)
        if number is None:
            loose.append(item)
            continue
        free = next((str(k) for k in range(last + 1, number) if _is_free(module, str(k))), None)
        if loose and free is not None and last >= 0:
            path = (*frame.path, free)
            module.children[free] = Module(path, "", "function", is_filler=True)
            items.append(Frame(path, (*frame.scope, ".".join(path)), loose))
        else:
            items += loose
        items.append(item)
        loose, last = [], number
    frame.items = items + loose


def _is_free(module: Module, name: str) -> bool:
    return name not in module.children or module.children[name].is_filler


def _child_number(item: Call | Frame, path: Path) -> int | None:
    """Returns the number of the child that an item of a numbered module's frame calls, or None."""
    called = item.path if isinstance(item, Frame) else split_path(item.target.partition("layer:")[2])
    return int(called[len(path)]) if len(called) > len(path) and called[len(path)].isdigit() else None


def splice_frames(frame: Frame, gone: set[int]) -> None:
    """Replaces frames, given by their `id`, by their items, anywhere beneath a frame."""
    items = []
    for item in frame.items:
        if isinstance(item, Frame):
            splice_frames(item, gone)
        items += item.items if isinstance(item, Frame) and id(item) in gone else [item]
    frame.items = items


def trim_frames(frame: Frame, wanted: set[int]) -> None:
    """Moves steps that call no child from both ends of the `wanted` frames out of these frames."""
    items: list[Call | Frame] = []
    for item in frame.items:
        if isinstance(item, Frame):
            trim_frames(item, wanted)
        if isinstance(item, Frame) and id(item) in wanted:
            own = [
                k for k, inner in enumerate(item.items) if isinstance(inner, Frame) or inner.target.startswith("layer:")
            ]
            start, end = (own[0], own[-1] + 1) if own else (0, len(item.items))
            before, after = item.items[:start], item.items[end:]
            item.items = item.items[start:end]
            items += [*before, item, *after]
        else:
            items.append(item)
    frame.items = items


def comparison_key(arg: object) -> object:
    """Returns a key by which an argument is compared and hashed: types, signs and NaNs count."""
    return type(arg).__name__, repr(arg)
