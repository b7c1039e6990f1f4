"""One graph of two: what a module does in evaluation, and what it does in training.

Both graphs are functional, and operations with a training flag have stand-ins. Nodes that do the same at the same
place are one node. What only one of the two has stands beside it, and where a node takes one value in training and
another one in evaluation, `by_mode` chooses between them: a person would have written `if self.training`.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from torch_bridge.compat import map_aggregate
from torch_bridge.graph.modes import is_counter, is_same_tensor
from torch_bridge.graph.nodes import is_size
from torch_bridge.graph.stand_ins import FLAGGED, Mode, all_args, stand_in, stand_in_args

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class MergedGraph(NamedTuple):
    """A graph for both modes.

    `outputs` are what the forward returns; `updates` maps the keys of buffers to what a call in training leaves in
    them, `constants` placeholders to tensors.
    """

    graph: fx.Graph
    outputs: list[Any]
    updates: dict[str, fx.Node]
    constants: dict[str, Tensor]


def has_branches(graph: fx.Graph) -> bool:
    """Whether a graph does something else in training mode than in evaluation mode."""
    return any(node.target is stand_in("by_mode") for node in graph.nodes)


def merge_programs(
    model: nn.Module, evaluation: ExportedProgram, training: ExportedProgram, reads: Sequence[nn.Module]
) -> MergedGraph | str:
    """Both programs as one, or why that is not possible. `reads` are the modules that were asked for their mode."""
    written = {**training.graph_signature.user_inputs_to_mutate, **training.graph_signature.parameters_to_mutate}
    if written:
        return f"its forward writes into {', '.join(sorted(set(written.values())))} in training mode"
    return _Merge(model, evaluation, training, reads).result()


class _Merge:
    def __init__(
        self, model: nn.Module, evaluation: ExportedProgram, training: ExportedProgram, reads: Sequence[nn.Module]
    ):
        self.model, self.evaluation, self.training = model, evaluation, training
        self.askers = set(map(id, reads))
        self.graph = fx.Graph()
        self.ours: dict[fx.Node, fx.Node] = {}
        self.theirs: dict[fx.Node, fx.Node] = {}
        self.twins: dict[fx.Node, fx.Node] = {}
        self.chosen: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.constants: dict[str, Tensor] = {}

    def result(self) -> MergedGraph | str:
        self._placeholders()
        nodes, others = _computing(self.evaluation.graph), _computing(self.training.graph)
        blocks = difflib.SequenceMatcher(
            None, list(map(_key, nodes)), list(map(_key, others)), autojunk=False
        ).get_matching_blocks()
        pairs = [(nodes[a + k], others[b + k]) for a, b, size in blocks for k in range(size)]
        pairs = [(node, twin) for node, twin in pairs if not _is_the_reverse(node, twin)]
        self.twins |= {twin: node for node, twin in pairs}
        outputs, updates = self._outputs(self.evaluation), self._outputs(self.training)
        wanted = [
            pair
            for a, b in [*((_arguments(node), _arguments(twin)) for node, twin in pairs), (outputs[0], updates[0])]
            for pair in zip(_nodes(a), _nodes(b), strict=True)
            if self._differ(*pair)
        ]
        buffers = self._buffers()
        wanted += [(buffers[key], value) for key, value in updates[1].items()]
        for node, twin in wanted:
            if not _alike(node, twin):
                return "its forward computes arrays of other shapes in training mode than in evaluation mode"
        done, seen = 0, 0
        for node, twin in [*pairs, (None, None)]:
            end = len(nodes) if node is None else nodes.index(node, done)
            stop = len(others) if twin is None else others.index(twin, seen)
            for one in others[seen:stop]:
                self._copy(one, self.theirs, "training")
            for one in nodes[done:end]:
                self._copy(one, self.ours, "evaluation")
            self._choose(wanted)
            if node is not None and twin is not None:
                self._shared(node, twin)
            done, seen = end + 1, stop + 1
        self._choose(wanted)
        results = _put(outputs[0], lambda k, leaf: self._value(leaf, _nodes(updates[0])[k]))
        kept = {key: self.chosen[buffers[key], value] for key, value in updates[1].items()}
        self._drop_counters({*_nodes(list(results)), *kept.values()})
        self.graph.output((list(results), list(kept.values())))  # so that nothing that is returned is without users
        return MergedGraph(self.graph, list(results), kept, self.constants)

    # Placeholders and outputs

    def _placeholders(self) -> None:
        specs = {spec.arg.name: spec for spec in self.evaluation.graph_signature.input_specs}
        known: dict[tuple[str, Any], fx.Node] = {}
        for node in self.evaluation.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                self.ours[node] = self._placeholder(node)
                known[spec.kind.name, spec.target if spec.kind.name != "USER_INPUT" else node.name] = node
                if spec.kind.name == "CONSTANT_TENSOR":
                    self.constants[self.ours[node].name] = _tensor(self.evaluation, spec.target)
        specs = {spec.arg.name: spec for spec in self.training.graph_signature.input_specs}
        for twin in self.training.graph.nodes:
            if twin.op == "placeholder":
                spec = specs[twin.name]
                if spec.kind.name == "CONSTANT_TENSOR":
                    self._constant(twin, _tensor(self.training, spec.target))
                    continue
                node = known[spec.kind.name, spec.target if spec.kind.name != "USER_INPUT" else twin.name]
                self.twins[twin], self.theirs[twin] = node, self.ours[node]

    def _placeholder(self, node: fx.Node, name: str = "") -> fx.Node:
        new = self.graph.placeholder(name or node.name)
        new.name = name or node.name  # whatever the graph would call it
        new.meta = dict(node.meta)
        return new

    def _constant(self, twin: fx.Node, tensor: Tensor) -> None:
        """A constant of the training graph: the same as one of the other graph, or one more."""
        for node, held in self.ours.items():
            if node.op == "placeholder" and held.name in self.constants:
                if is_same_tensor(self.constants[held.name], tensor):
                    self.twins[twin], self.theirs[twin] = node, held
                    return
        self.theirs[twin] = self._placeholder(twin, f"{twin.name}_training")
        self.constants[self.theirs[twin].name] = tensor

    def _outputs(self, program: ExportedProgram) -> tuple[list[Any], dict[str, fx.Node]]:
        """What the forward returns, and what it leaves in buffers; counters that normalisation keeps left out."""
        (results,) = next(iter(reversed(program.graph.nodes))).args
        outputs, updates = [], {}
        for result, spec in zip(results, program.graph_signature.output_specs, strict=True):
            if spec.kind.name == "USER_OUTPUT":
                outputs.append(result)
            elif spec.kind.name == "BUFFER_MUTATION" and not self._is_layers_counter(str(spec.target)):
                updates[str(spec.target)] = result
        return outputs, updates

    def _buffers(self) -> dict[str, fx.Node]:
        names = {key: name for name, key in self.evaluation.graph_signature.inputs_to_buffers.items()}
        nodes = {node.name: node for node in self.evaluation.graph.nodes if node.op == "placeholder"}
        return {key: nodes[name] for key, name in names.items()}

    def _is_layers_counter(self, key: str) -> bool:
        """Whether a counter is one that a layer keeps: not that of a normalisation whose operations are written out."""
        mean = f"{key.rpartition('.')[0]}.running_mean".lstrip(".")
        return is_counter(self.model, key) and mean not in self.training.graph_signature.buffers_to_mutate.values()

    def _drop_counters(self, wanted: set[fx.Node]) -> None:
        """Leaves out what only the counters of normalisation took, which its layers keep themselves."""
        keys = dict(self.evaluation.graph_signature.inputs_to_buffers)
        counted: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                own = node.name in keys and self._is_layers_counter(keys[node.name])
            else:
                own = bool(node.all_input_nodes) and counted.issuperset(node.all_input_nodes)
            counted |= {node} if own else set()
        for node in reversed(self.graph.nodes):
            if node in counted and node.op != "placeholder" and not node.users and node not in wanted:
                self.graph.erase_node(node)

    # Nodes

    def _differ(self, node: fx.Node, twin: fx.Node) -> bool:
        return not is_size(node) and self.twins.get(twin) is not node

    def _copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node], mode: str) -> None:
        self._sizes(node, copies)
        new = self.graph.node_copy(node, copies.__getitem__)
        new.meta["mode"] = mode
        if _is_stand_in(node) and new.args[-1] == "always" and mode == "training":
            new.args = (*new.args[:-1], "by_mode")
        if node.target is _ATTENTION and mode == "training":
            self._attention(new, 0.0, _rate(new))
        copies[node] = new

    def _shared(self, node: fx.Node, twin: fx.Node) -> None:
        self._sizes(node, self.ours)
        others = _nodes(_arguments(twin))
        inputs = iter(_put((node.args, dict(node.kwargs)), lambda k, leaf: self._value(leaf, others[k])))
        new = self.graph.call_function(node.target, next(inputs), next(inputs))  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        if _is_stand_in(node) and node.args[-1] != twin.args[-1]:
            new.args = (*new.args[:-1], "by_mode")
        if node.target is _ATTENTION:
            self._attention(new, _rate(new), _rate(twin))
        self.ours[node] = self.theirs[twin] = new

    def _attention(self, new: fx.Node, rate: float, training: float) -> None:
        """Gives attention its rate of dropout in training, where that is another one."""
        if rate != training:
            new.args = stand_in_args("attention", all_args(new), Mode("by_mode", training))
            new.target, new.kwargs = stand_in("attention"), {}

    def _sizes(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
        """Copies the sizes that a node takes, which are computed wherever they are needed."""
        for given in node.all_input_nodes:
            if given not in copies:
                self._sizes(given, copies)
                copies[given] = self.graph.node_copy(given, copies.__getitem__)

    # What depends on the mode

    def _value(self, node: fx.Node, twin: fx.Node) -> fx.Node:
        return self.chosen[node, twin] if self._differ(node, twin) else self.ours[node]

    def _choose(self, wanted: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Adds the choices between values that are both there by now."""
        for node, twin in wanted:
            if (node, twin) not in self.chosen and node in self.ours and twin in self.theirs:
                new = self.graph.call_function(stand_in("by_mode"), (self.theirs[twin], self.ours[node]))
                new.meta = {"val": node.meta["val"], "nn_module_stack": self._asker(node, twin)}
                self.chosen[node, twin] = new

    def _asker(self, node: fx.Node, twin: fx.Node) -> dict[str, Any]:
        """The calls of modules around a choice, down to the module that was asked for its mode."""
        single = twin if twin not in self.twins else node
        stack = dict(single.meta.get("nn_module_stack") or {})
        for k in range(len(stack), 0, -1):
            path = list(stack.values())[k - 1][0]
            if id(self.model.get_submodule(path)) in self.askers:
                return dict(list(stack.items())[:k])
        return stack


def _tensor(program: ExportedProgram, name: str | None) -> Tensor:
    tensor = program.constants[str(name)]
    assert isinstance(tensor, Tensor), f"`{name}` is no tensor"
    return tensor


def _rate(node: fx.Node) -> float:
    return float(all_args(node)[FLAGGED["attention"][1]])


def _is_the_reverse(node: fx.Node, twin: fx.Node) -> bool:
    """Whether an operation with a flag is in training mode in evaluation alone."""
    return _is_stand_in(node) and (node.args[-1], twin.args[-1]) == ("always", "never")


def _is_stand_in(node: fx.Node) -> bool:
    """Whether a node is a stand-in for an operation with a mode, which is its last argument."""
    return any(node.target is stand_in(name) for name in FLAGGED)


def _computing(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and not is_size(node) and node.meta.get("val") is not None
    ]


def _arguments(node: fx.Node) -> Any:
    return (node.args, dict(node.kwargs))


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_aggregate(tree, lambda leaf: found.append(leaf) if isinstance(leaf, fx.Node) else None)
    return found


def _put(tree: Any, value: Callable[[int, fx.Node], fx.Node]) -> Any:
    """The tree with other nodes, of each of which `value` is told the number."""
    count = iter(range(len(_nodes(tree))))
    return map_aggregate(tree, lambda leaf: value(next(count), leaf) if isinstance(leaf, fx.Node) else leaf)


def _key(node: fx.Node) -> str:
    """What two nodes have in common that do the same at the same place, the training flag left out."""
    args = list(node.args)
    if _is_stand_in(node):
        args[-1] = None
    kwargs = dict(node.kwargs)
    if node.target is _ATTENTION:
        args, kwargs = all_args(node), {}
        args[FLAGGED["attention"][1]] = None
    described = map_aggregate((args, kwargs), _described)
    scope = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]
    return repr((str(node.target), scope, described, map_aggregate(node.meta["val"], _described)))


def _described(leaf: Any) -> str:
    if isinstance(leaf, fx.Node):
        return f"size {leaf.meta['val']}" if is_size(leaf) else repr(map_aggregate(leaf.meta.get("val"), _described))
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {[str(size) for size in leaf.shape]}"
    return repr(leaf)


def _alike(node: fx.Node, twin: fx.Node) -> bool:
    a, b = node.meta.get("val"), twin.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _described(a) == _described(b)
