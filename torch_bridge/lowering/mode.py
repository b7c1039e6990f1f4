"""What a forward does in one mode alone: values that are chosen by mode, and buffers that training writes."""

from jaxensemble.network import Call, Ref, Var, references
from torch_bridge.layout import Layout
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Value


@register("torch_bridge.by_mode.default")
def by_mode(b: Builder, training: Value, evaluation: Value) -> Value:
    """The first value in training mode, the second one in evaluation mode."""
    (first, second), layout = b.aligned(training, evaluation)
    if first.expr == second.expr:
        return b.laid(first.expr, layout)  # as of a copy that training takes
    path = b.inside("training", "layers.Training")
    return b.laid(b.emit(f"layer:{path}", first.expr, second.expr), layout)


def update(b: Builder, key: str, weight: Value, value: Value) -> None:
    """Writes what training leaves in a buffer, once nothing reads any more what was in it before."""
    weight = b.resolved(weight)
    if weight.open:
        weight = b.resolved(b.plain(weight) if key not in b.storage else weight)
    storage = b.storage[key]
    dims = storage.layout.dims
    expr = b.array(Value(b.plain(value).expr, Layout(dims, dims), value.dtype), storage.layout.axes)
    if value.dtype != b.state.tensors[key].dtype:
        raise b.unsupported(f"it writes {value.dtype} into `{key}`, which is {b.state.tensors[key].dtype}")
    assert isinstance(expr, Ref)
    made = next(k for k, call in enumerate(b.calls) if call.out == expr.name)
    reading = [k for k, call in enumerate(b.calls) if _reads(call, storage.path)]
    last = max([made, *reading])
    scope = _common(b.calls[made].scope, b.calls[last].scope)
    b.calls.insert(last + 1, Call(f"{expr.name}_kept", "=", (Var(storage.path), expr), {}, scope))


def _reads(call: Call, path: str) -> bool:
    within = call.target.removeprefix("layer:")
    return path.startswith(f"{within}.") or any(
        isinstance(use, Var) and use.path == path for use in references((call.args, call.kwargs))
    )


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return a[:count]
