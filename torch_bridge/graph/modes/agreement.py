"""The evaluation graph and the training graph of a module, compared node by node.

If the graphs differ only in training flags of dropout and normalisation, each flag gets a mode. The training graph may
also have dropout of its own (`if self.training: x = F.dropout(x)`). Otherwise the first difference is the result.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.export import ExportedProgram

from torch_bridge.compat import map_aggregate
from torch_bridge.graph.modes.comparison import is_same_tensor
from torch_bridge.graph.modes.counters import counter_of
from torch_bridge.graph.nodes import is_size, source_line
from torch_bridge.graph.stand_ins import (
    DROPOUTS,
    FLAGGED,
    NAMES,
    Mode,
    all_args,
    stand_in,
    stand_in_args,
    training_flag,
)


class Added(NamedTuple):
    """Dropout of the training graph only, and the node of the evaluation graph after which the dropout belongs."""

    dropout: fx.Node
    after: fx.Node


class Modes(NamedTuple):
    """Modes of two graphs that agree.

    - `of`: the mode of every operation with a flag, by the name of its node.
    - `added`: the dropout that the evaluation graph lacks.
    - `twins`: nodes of the evaluation graph by nodes of the training graph; for added dropout, the node of its input.
    """

    of: dict[str, Mode]
    added: tuple[Added, ...]
    twins: dict[fx.Node, fx.Node]


def align_programs(evaluation: ExportedProgram, training: ExportedProgram) -> Modes | str:
    """Returns the modes of all operations, or the first difference between the graphs."""
    ours, theirs = ([node for node in p.graph.nodes if _makes_arrays(node)] for p in (evaluation, training))
    twins: dict[fx.Node, fx.Node] = {}
    modes: dict[str, Mode] = {}
    added: list[Added] = []
    done = 0
    for twin in theirs:
        node = ours[done] if done < len(ours) else None
        if node is None or not _is_twin(node, twin, twins):
            if not _is_added_dropout(twin, twins):
                return _SOMETHING_ELSE if node is None else _difference(node, twin)
            twins[twin] = twins[twin.all_input_nodes[0]]
            added.append(Added(twin, ours[done - 1]))
            continue
        if node.op == "placeholder" and not _same_source(node, evaluation, twin, training):
            return "its forward uses other tensors in training mode than in evaluation mode"
        if node.target in NAMES:
            mode = _mode(training_flag(node), training_flag(twin))
            if mode is None:
                return _difference(node, twin)
            modes[node.name] = mode
        twins[twin] = node
        done += 1
    if done < len(ours) or evaluation.call_spec.out_spec != training.call_spec.out_spec:
        return _SOMETHING_ELSE
    return Modes(modes, tuple(added), twins)


_SOMETHING_ELSE = "its forward does something else in training mode than in evaluation mode"


def _mode(evaluation: Any, training: Any) -> Mode | None:
    """Returns an operation's mode; None if it trains in evaluation mode only, or if its two rates differ."""
    if not evaluation:
        return Mode("by_mode", float(training)) if training else Mode("never")
    return Mode("always", float(training)) if evaluation == training else None


def _is_twin(node: fx.Node, twin: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Returns whether two nodes do the same, whatever their training flags."""
    if node.op == "placeholder" and twin.op == "placeholder":
        return True
    return node.target == twin.target and _arguments(node, {}) == _arguments(twin, twins)


def _is_added_dropout(node: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Returns whether a node of the training graph is out-of-place dropout of a value that evaluation also has."""
    kinds = [FLAGGED[name][0] for name in DROPOUTS]
    return node.target in kinds and bool(training_flag(node)) and all(given in twins for given in node.all_input_nodes)


def add_dropout(modes: Modes) -> None:
    """Adds the dropout that only the training graph has to the evaluation graph, as a stand-in with a mode."""
    made: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    dropouts = {added.dropout for added in modes.added}
    for dropout, after in modes.added:
        given, *rest = all_args(dropout)
        source, name = made.get(given, modes.twins[given]), NAMES[dropout.target]
        with source.graph.inserting_after(last.get(after, after)):
            args = stand_in_args(name, [source, *rest], Mode("by_mode"))
            new = source.graph.call_function(stand_in(name), args)
        new.meta = {**dropout.meta, "val": source.meta["val"]}
        made[dropout] = last[after] = new
        for user in dropout.users:
            if user in modes.twins and user not in dropouts:
                _replace_input(modes.twins[user], user, dropout, new)


def _replace_input(node: fx.Node, twin: fx.Node, dropout: fx.Node, new: fx.Node) -> None:
    """Gives a node the new dropout wherever its twin has the old one. Their arguments have one structure."""
    leaves: list[Any] = []
    map_aggregate((twin.args, twin.kwargs), lambda leaf: leaves.append(leaf))
    queue = iter(leaves)
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda leaf: new if next(queue) is dropout else leaf)  # type: ignore[misc]
    node.args, node.kwargs = args, kwargs  # type: ignore[assignment]


def _same_source(node: fx.Node, evaluation: ExportedProgram, twin: fx.Node, training: ExportedProgram) -> bool:
    """Returns whether two placeholders are the same input, weight or constant."""
    (ours, a), (theirs, b) = (
        (next(spec for spec in program.graph_signature.input_specs if spec.arg.name == held.name), program.constants)
        for held, program in ((node, evaluation), (twin, training))
    )
    if ours.kind != theirs.kind:
        return False
    if ours.kind.name != "CONSTANT_TENSOR":
        return ours.target == theirs.target
    first, second = a[str(ours.target)], b[str(theirs.target)]
    return isinstance(first, Tensor) and isinstance(second, Tensor) and is_same_tensor(first, second)


def _difference(node: fx.Node, twin: fx.Node) -> str:
    where = source_line(twin) or source_line(node)
    return (
        f"its forward does something else in training mode ({twin.target}) than in evaluation mode ({node.target})"
        + (f", at {where}" if where else "")
    )


def _makes_arrays(node: fx.Node) -> bool:
    """Returns whether a node makes arrays. Sizes are compared where they are used, and counters not at all."""
    return not (is_size(node) or counter_of(node) is not None)


def _arguments(node: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> Any:
    """Returns a node's arguments for comparison, without the training flag."""
    name = NAMES.get(node.target)
    args = list(node.args) if name is None else all_args(node)
    if name is not None:
        args[FLAGGED[name][1]] = None
    return map_aggregate((args, dict(node.kwargs) if name is None else {}), lambda leaf: _comparable(leaf, twins))


def _comparable(leaf: Any, twins: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(leaf, fx.Node):
        return str(leaf.meta["val"]) if is_size(leaf) else twins.get(leaf, leaf)
    return repr(leaf) if isinstance(leaf, float) else leaf  # so that NaN equals itself
