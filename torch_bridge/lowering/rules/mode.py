"""Values chosen by mode.

In training mode, a forward may also write buffers.
"""

import itertools
from collections.abc import Sequence

from jaxensemble.network.network import Call, Var, references
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import settled_value
from torch_bridge.lowering.layouts.layout import Layout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register("torch_bridge.by_mode.default")
def by_mode(b: Builder, training: Value, evaluation: Value) -> Value:
    """The first value in training mode, the second one in evaluation mode."""
    second = b.tidy(settled_value(b, evaluation))
    first = b.arrange(_relabel_as(b.plain(training), second), second.layout.axes)
    if first.expr == second.expr:
        return second  # for example a copy that training takes
    path = b.single_layer("training", "layers.Training")
    return b.laid(b.emit(f"layer:{path}", first.expr, second.expr), second.layout)


def _relabel_as(plain: Value, other: Value) -> Value:
    """A value that is stored as PyTorch sees it, with the dimensions of another value of its shape."""
    return Value(plain.expr, Layout(other.layout.dims, other.layout.dims), plain.dtype)


def write_buffer(b: Builder, key: str, weight: Value, value: Value) -> None:
    """Writes a buffer in training mode, after the last call that reads its old value.

    The builder's node is the choice between both values: its place says whose mode decides.
    """
    weight = b.resolve(weight)
    if weight.open:
        weight = b.resolve(b.plain(weight) if key not in b.storage else weight)
    storage = b.storage[key]
    dims = storage.layout.dims
    expr = b.array(Value(b.plain(value).expr, Layout(dims, dims), value.dtype), storage.layout.axes)
    if value.dtype != b.state.tensors[key].dtype:
        raise b.unsupported(f"it writes {value.dtype} into `{key}`, which is {b.state.tensors[key].dtype}")
    if isinstance(expr, Var):
        return  # a buffer that is copied onto itself
    made = next(k for k, call in enumerate(b.calls) if call.out == expr.name)
    reading = [k for k, call in enumerate(b.calls) if _reads(call, storage.path)]
    last = max([made, *reading])
    scope = common_scope([b.calls[made].scope, b.calls[last].scope])
    flag = b.single_layer("training", "layers.Training")
    b.calls.insert(last + 1, Call(f"{expr.name}_kept", "=", (Var(storage.path), expr, Var(flag)), {}, scope))


def _reads(call: Call, path: str) -> bool:
    """Returns whether a call reads the variable of a path."""
    within = call.target.removeprefix("layer:")
    return path.startswith(f"{within}.") or any(
        isinstance(use, Var) and use.path == path for use in references((call.args, call.kwargs))
    )


def common_scope(scopes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The module calls that several steps have in common.

    >>> common_scope([("a", "a.b"), ("a", "a.c")])
    ('a',)
    """
    shared = itertools.takewhile(lambda entries: len(set(entries)) == 1, zip(*scopes, strict=False))
    return tuple(entries[0] for entries in shared)
