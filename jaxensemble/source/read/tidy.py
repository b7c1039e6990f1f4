"""Calls arranged as a person would arrange them, before anything is planned. Results stay the same, bit for bit.

Only steps that move data change: the transpose of an input, concatenations, and reading all parts of a value.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from jaxensemble.network.network import Arg, Call, Network, Ref, ReferenceTree, Slice, Var
from jaxensemble.source.read.frames import comparison_key, operands

CONCATENATE = "jnp.concatenate"

ARRANGING = frozenset({"jnp.transpose", ".reshape", "jnp.expand_dims", "jnp.squeeze"})
"""Functions that put the numbers of an array into another order or shape, and do nothing else."""

REDUCING = frozenset({"jnp.mean", "jnp.sum", "jnp.max", "jnp.min", "jnp.prod", "jnp.any", "jnp.all"})
"""Functions that take an array and axes, and can keep these axes with a length of one."""

PAIRS = frozenset({"layers.RNN", "layers.GRU", "layers.LSTM", "ops.rnn", "ops.gru", "ops.lstm"})
"""Layers and functions that return an output and a state: `y, state = self.rnn(x)`."""

STATES = frozenset({"layers.LSTM", "ops.lstm"})
"""Members of `PAIRS` whose state is a hidden state and a cell: `y, (h, c) = self.rnn(x)`."""


@dataclasses.dataclass(frozen=True)
class Unpacking(Call):
    """Call whose result is read part by part: `a, b = jnp.split(x, 2)`. `out` is the name of none of the parts."""

    outs: tuple[str, ...] = ()


def tidy_calls(calls: Sequence[Call], network: Network, outputs: ReferenceTree) -> list[Call]:
    """Returns the calls with inputs transposed first, similar concatenations moved, and parts unpacked."""
    moved = _move_input_transposes(_keep_reduced_axes(list(calls), outputs), network)
    moved = _move_arrangements_out(moved)
    moved = _move_concatenations_out(moved, network.modules)
    return _unpack_parts(_reuse_concatenations(moved), outputs, {layer.path: layer.type for layer in network.layers})


def _keep_reduced_axes(calls: list[Call], outputs: ReferenceTree) -> list[Call]:
    """Has a mean or sum whose axes are put back at once keep them: `jnp.mean(x, (1, 2), keepdims=True)`."""
    makers = {call.out: call for call in calls}
    counts = Counter(
        ref.name for call in calls for ref in operands((call.args, dict(call.kwargs))) if isinstance(ref, Ref)
    )
    counts.update(ref.name for ref in operands(outputs) if isinstance(ref, Ref))
    kept: dict[str, Call | None] = {}
    for call in calls:
        given, *axes = call.args if call.target == "jnp.expand_dims" else (None,)
        maker = makers.get(given.name) if isinstance(given, Ref) else None
        if maker is None or maker.target not in REDUCING or maker.kwargs or counts[maker.out] > 1:
            continue
        if list(maker.args[1:]) == axes and all(map(_is_ascending, axes)):
            kept[maker.out] = dataclasses.replace(maker, out=call.out, kwargs={"keepdims": True})
            kept[call.out] = None
    replaced = [kept.get(call.out, call) for call in calls]
    return [call for call in replaced if call is not None]


def _is_ascending(axes: Arg) -> bool:
    """Returns whether axes are counted from the first and in order: they are then the same before and after."""
    numbers = axes if isinstance(axes, tuple) else (axes,)
    counted = [n for n in numbers if isinstance(n, int) and n >= 0]
    return len(counted) == len(numbers) and counted == sorted(set(counted))


def _move_input_transposes(calls: list[Call], network: Network) -> list[Call]:
    """Moves the transposes of inputs to channels-last to the root, before all other steps.

    A module does not differ from others of its class because it comes first.
    """
    inputs = {ref.name for ref in operands(network.inputs) if isinstance(ref, Ref)}

    def is_first(call: Call) -> bool:
        if call.target != "jnp.transpose" or len(call.args) != 2:
            return False
        given, order = call.args
        is_channels_last = isinstance(order, tuple) and order == (0, *range(2, len(order)), 1)
        return is_channels_last and isinstance(given, Ref) and given.name in inputs

    first = [dataclasses.replace(call, scope=()) for call in calls if is_first(call)]
    return first + [call for call in calls if not is_first(call)]


def _move_arrangements_out(calls: list[Call]) -> list[Call]:
    """Moves rearrangements at the beginning of a module out of it, if steps outside read the result too."""
    readers: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        for ref in operands((call.args, dict(call.kwargs))):
            if isinstance(ref, Ref):
                readers[ref.name].append(call)
    begun: dict[tuple[str, ...], list[int]] = defaultdict(list)
    over: set[tuple[str, ...]] = set()
    for k, call in enumerate(calls):
        for depth in range(1, len(call.scope)):
            over.add(call.scope[:depth])  # an inner module begins: no later step is at the beginning
        if call.scope and call.scope not in over and call.target in ARRANGING and not _reads_variables(call):
            begun[call.scope].append(k)
        else:
            over.add(call.scope)
    moved = list(calls)
    for scope, numbers in begun.items():
        outside = [any(r.scope[: len(scope)] != scope for r in readers[calls[k].out]) for k in numbers]
        count = len(outside) - outside[::-1].index(True) if True in outside else 0
        for k in numbers[:count]:
            moved[k] = dataclasses.replace(calls[k], scope=scope[:-1])
    return moved


def _reads_variables(call: Call) -> bool:
    return any(isinstance(use, Var) for use in operands((call.args, dict(call.kwargs))))


def _move_concatenations_out(calls: list[Call], modules: Mapping[str, tuple[str, str]]) -> list[Call]:
    """Moves concatenations at the beginning of modules of one class out, if they join different numbers of values."""
    first: dict[tuple[str, ...], int] = {}
    for k, call in enumerate(calls):
        for depth in range(1, len(call.scope) + 1):
            first.setdefault(call.scope[:depth], k)
    numbers: dict[str, dict[tuple[str, ...], int]] = defaultdict(dict)
    for scope, k in first.items():
        label, kind = modules.get(scope[-1].partition("@")[0], ("", ""))
        if kind == "module":
            numbers[label][scope] = len(_concatenated_values(calls[k])) if calls[k].scope == scope else 0
    moved = list(calls)
    for own in numbers.values():
        if len(set(own.values())) > 1:
            for scope, count in own.items():
                if count > 1:
                    moved[first[scope]] = dataclasses.replace(moved[first[scope]], scope=scope[:-1])
    return moved


def _concatenated_values(call: Call) -> list[Ref]:
    """Returns the values that a call concatenates; none for any other call."""
    items = call.args[0] if call.target == CONCATENATE and call.args else None
    refs = [item for item in items if isinstance(item, Ref)] if isinstance(items, list) else []
    return refs if isinstance(items, list) and len(refs) == len(items) else []


def _reuse_concatenations(calls: list[Call]) -> list[Call]:
    """Has a concatenation reuse the result of an earlier concatenation of its first values."""
    known: dict[object, dict[tuple[str, ...], str]] = defaultdict(dict)
    grown = []
    for call in calls:
        names = tuple(ref.name for ref in _concatenated_values(call))
        if not names:
            grown.append(call)
            continue
        key = (call.scope, comparison_key(call.args[1:]), comparison_key(tuple(call.kwargs.items())))
        start = max((n for n in range(2, len(names)) if names[:n] in known[key]), default=0)
        if start:
            items = [Ref(known[key][names[:start]]), *map(Ref, names[start:])]
            grown.append(dataclasses.replace(call, args=(items, *call.args[1:])))
        else:
            grown.append(call)
        known[key].setdefault(names, call.out)
    return grown


# Parts


def _unpack_parts(calls: list[Call], outputs: ReferenceTree, layers: Mapping[str, str]) -> list[Call]:
    """Gives names to the parts of results that are read only part by part, each part by one call.

    `layers` are the types of the layers by path.
    """
    makers = {call.out: call for call in calls}
    readers: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        for ref in operands((call.args, dict(call.kwargs))):
            if isinstance(ref, Ref):
                readers[ref.name].append(call)
    kept = {ref.name for ref in operands(outputs) if isinstance(ref, Ref)}
    replaced: dict[str, Call | None] = {}
    for call in calls:
        pair = _pair(call, layers.get(call.target.removeprefix("layer:"), call.target), readers, kept)
        if pair:
            replaced |= {call.out: pair[0], **dict.fromkeys(pair[1])}
        parts = _parts(call, readers[call.out], makers) if not pair and call.out not in kept else None
        if parts:
            replaced |= {reader.out: None for reader in readers[call.out]}
            replaced[call.out] = parts
    return [new for call in calls for new in _replacement(call, replaced)]


def _replacement(call: Call, replaced: Mapping[str, Call | None]) -> list[Call]:
    if call.out not in replaced:
        return [call]
    new = replaced[call.out]
    if new is None:
        return []
    return [new] if new.target == call.target else [call, new]


def _pair(
    call: Call, type_: str, readers: Mapping[str, Sequence[Call]], kept: Collection[str]
) -> tuple[Unpacking, list[str]] | None:
    """Returns a recurrent layer's call with its output and state by name, or its output, hidden state and cell.

    Also returns the names of the parts that are no longer read, or are now results of the call itself.
    """
    found = _halves(call, readers) if type_ in PAIRS and call.out not in kept else None
    if found is None:
        return None
    output, state = (half.out if half else f"{call.out} {k}" for k, half in enumerate(found))
    outs, gone = (output, state), [half.out for half in found if half]
    inner = _halves(found[1], readers) if found[1] and type_ in STATES and state not in kept else None
    if inner:
        outs = (output, *(half.out if half else f"{state} {k}" for k, half in enumerate(inner)))
        gone += [half.out for half in inner if half]
    return Unpacking(f"{call.out} parts", call.target, call.args, call.kwargs, call.scope, outs), gone


def _halves(call: Call, readers: Mapping[str, Sequence[Call]]) -> tuple[Call | None, Call | None] | None:
    """Returns the calls that read the first and the second of two values; None for any other use, or for no use."""
    halves: dict[int, Call] = {}
    for reader in readers[call.out]:
        index = reader.args[1] if reader.target == "[]" and reader.args[0] == Ref(call.out) else None
        if type(index) is not int or index not in (0, 1) or index in halves or reader.scope != call.scope:
            return None
        halves[index] = reader
    return (halves.get(0), halves.get(1)) if halves else None


def _parts(call: Call, readers: Sequence[Call], makers: Mapping[str, Call]) -> Unpacking | None:
    """Returns a split with names for its parts, or the unstacking of an axis that is read index by index."""
    if len(readers) < 2 or any(r.target != "[]" or r.args[0] != Ref(call.out) for r in readers):
        return None
    if any(reader.scope != call.scope for reader in readers):
        return None
    found = [_position(reader.args[1]) for reader in readers]
    axes, indices = {axis for axis, _ in found}, [index for _, index in found]
    if len(axes) != 1 or None in axes or len(set(indices)) != len(indices):
        return None
    axis = axes.pop()
    assert axis is not None
    if call.target == "jnp.split":
        count = call.args[1] if len(call.args) > 1 else None
        return _unpacking(call, call.target, call.args, call.kwargs, readers, indices, count) if axis == 0 else None
    count = _length(call, axis, makers)
    kwargs = {"axis": axis} if axis else {}
    return _unpacking(call, "jnp.unstack", (Ref(call.out),), kwargs, readers, indices, count)


def _unpacking(
    call: Call,
    target: str,
    args: tuple[Arg, ...],
    kwargs: Mapping[str, Arg],
    readers: Sequence[Call],
    indices: list[int],
    count: object,
) -> Unpacking | None:
    if not isinstance(count, int) or len(indices) != count or not all(0 <= index < count for index in indices):
        return None
    names = dict(zip(indices, (reader.out for reader in readers), strict=True))
    outs = tuple(names[k] for k in range(count))
    return Unpacking(f"{call.out} parts", target, args, dict(kwargs), call.scope, outs)


def _position(index: object) -> tuple[int | None, int]:
    """Returns the axis and the number that an index takes: `x[:, :, 2]` is number 2 of axis 2."""
    if isinstance(index, int) and not isinstance(index, bool):
        return 0, index
    if isinstance(index, tuple) and index:
        *before, last = index
        if all(item == Slice() for item in before) and isinstance(last, int) and not isinstance(last, bool):
            return len(before), last
    return None, 0


def _length(call: Call, axis: int, makers: Mapping[str, Call]) -> object:
    """Returns the length of an axis of a result, if a reshape states it."""
    if call.target == ".reshape":
        return call.args[1 + axis] if len(call.args) > 1 + axis and isinstance(call.args[1], int) else None
    given = call.args[0] if call.args else None
    if call.target == "jnp.transpose" and len(call.args) == 2 and isinstance(given, Ref) and given.name in makers:
        order = call.args[1]
        before = order[axis] if isinstance(order, tuple) and axis < len(order) else None
        return _length(makers[given.name], before, makers) if isinstance(before, int) else None
    return None
