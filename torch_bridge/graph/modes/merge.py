"""One graph for both modes, made of the evaluation graph and the training graph.

Both graphs are functional, and operations with a training flag have stand-ins. Nodes that do the same at the same
place become one node. Nodes of one graph only are copied beside them. Where a node takes different values in the two
modes, `by_mode` chooses between them, as `if self.training` does in a forward.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from torch_bridge.compat import map_aggregate
from torch_bridge.graph.modes.comparison import (
    ATTENTION,
    all_arguments,
    attention_rate,
    has_reversed_flag,
    has_same_result,
    is_same_tensor,
    is_stand_in,
    node_key,
    nodes_in,
)
from torch_bridge.graph.modes.counters import is_counter
from torch_bridge.graph.nodes import is_size
from torch_bridge.graph.stand_ins import (
    Mode,
    all_args,
    stand_in,
    stand_in_args,
)


class MergedGraph(NamedTuple):
    """A graph for both modes.

    - `outputs`: the nodes that the forward returns.
    - `updates`: the values that a call in training leaves in buffers, by key.
    - `constants`: tensors by the names of placeholders.
    """

    graph: fx.Graph
    outputs: list[Any]
    updates: dict[str, fx.Node]
    constants: dict[str, Tensor]


def has_branches(graph: fx.Graph) -> bool:
    """Returns whether a graph computes differently in training mode and in evaluation mode."""
    return any(node.target is stand_in("by_mode") for node in graph.nodes)


def merge_programs(
    model: nn.Module, evaluation: ExportedProgram, training: ExportedProgram, reads: Sequence[nn.Module]
) -> MergedGraph | str:
    """Returns both programs as one graph, or why that is not possible. `reads` are the modules whose mode was read."""
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
        nodes, others = _array_operations(self.evaluation.graph), _array_operations(self.training.graph)
        blocks = difflib.SequenceMatcher(
            None, list(map(node_key, nodes)), list(map(node_key, others)), autojunk=False
        ).get_matching_blocks()
        pairs = [(nodes[a + k], others[b + k]) for a, b, size in blocks for k in range(size)]
        pairs = [(node, twin) for node, twin in pairs if not has_reversed_flag(node, twin)]
        self.twins |= {twin: node for node, twin in pairs}
        outputs, updates = self._outputs(self.evaluation), self._outputs(self.training)
        wanted = [
            pair
            for a, b in [
                *((all_arguments(node), all_arguments(twin)) for node, twin in pairs),
                (outputs[0], updates[0]),
            ]
            for pair in zip(nodes_in(a), nodes_in(b), strict=True)
            if self._differ(*pair)
        ]
        buffers = self._buffers()
        wanted += [(buffers[key], value) for key, value in updates[1].items()]
        for node, twin in wanted:
            if not has_same_result(node, twin):
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
        results = _map_nodes(outputs[0], lambda k, leaf: self._value(leaf, nodes_in(updates[0])[k]))
        kept = {key: self.chosen[buffers[key], value] for key, value in updates[1].items()}
        self._drop_counters({*nodes_in(list(results)), *kept.values()})
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
        new.name = name or node.name  # not the name that the graph chooses
        new.meta = dict(node.meta)
        return new

    def _constant(self, twin: fx.Node, tensor: Tensor) -> None:
        """Maps a constant of the training graph to an equal constant of the evaluation graph, or adds it."""
        for node, held in self.ours.items():
            if node.op == "placeholder" and held.name in self.constants:
                if is_same_tensor(self.constants[held.name], tensor):
                    self.twins[twin], self.theirs[twin] = node, held
                    return
        self.theirs[twin] = self._placeholder(twin, f"{twin.name}_training")
        self.constants[self.theirs[twin].name] = tensor

    def _outputs(self, program: ExportedProgram) -> tuple[list[Any], dict[str, fx.Node]]:
        """Returns the forward's outputs, and the values that it leaves in buffers, except counters of layers."""
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
        """Returns whether a layer keeps a counter itself. A normalisation whose operations are written out does not."""
        mean = f"{key.rpartition('.')[0]}.running_mean".lstrip(".")
        return is_counter(self.model, key) and mean not in self.training.graph_signature.buffers_to_mutate.values()

    def _drop_counters(self, wanted: set[fx.Node]) -> None:
        """Removes nodes that compute only counters of normalisation, which its layers keep themselves."""
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
        if is_stand_in(node) and new.args[-1] == "always" and mode == "training":
            new.args = (*new.args[:-1], "by_mode")
        if node.target is ATTENTION and mode == "training":
            self._attention(new, 0.0, attention_rate(new))
        copies[node] = new

    def _shared(self, node: fx.Node, twin: fx.Node) -> None:
        self._sizes(node, self.ours)
        others = nodes_in(all_arguments(twin))
        inputs = iter(_map_nodes((node.args, dict(node.kwargs)), lambda k, leaf: self._value(leaf, others[k])))
        new = self.graph.call_function(node.target, next(inputs), next(inputs))  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        if is_stand_in(node) and node.args[-1] != twin.args[-1]:
            new.args = (*new.args[:-1], "by_mode")
        if node.target is ATTENTION:
            self._attention(new, attention_rate(new), attention_rate(twin))
        self.ours[node] = self.theirs[twin] = new

    def _attention(self, new: fx.Node, rate: float, training: float) -> None:
        """Replaces an attention by its stand-in if its rate of dropout differs in training."""
        if rate != training:
            new.args = stand_in_args("attention", all_args(new), Mode("by_mode", training))
            new.target, new.kwargs = stand_in("attention"), {}

    def _sizes(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
        """Copies the sizes that a node takes: both graphs compute sizes where they need them."""
        for given in node.all_input_nodes:
            if given not in copies:
                self._sizes(given, copies)
                copies[given] = self.graph.node_copy(given, copies.__getitem__)

    # What depends on the mode

    def _value(self, node: fx.Node, twin: fx.Node) -> fx.Node:
        return self.chosen[node, twin] if self._differ(node, twin) else self.ours[node]

    def _choose(self, wanted: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Adds the choices between values that have both been computed."""
        for node, twin in wanted:
            if (node, twin) not in self.chosen and node in self.ours and twin in self.theirs:
                new = self.graph.call_function(stand_in("by_mode"), (self.theirs[twin], self.ours[node]))
                new.meta = {"val": node.meta["val"], "nn_module_stack": self._asker(node, twin)}
                self.chosen[node, twin] = new

    def _asker(self, node: fx.Node, twin: fx.Node) -> dict[str, Any]:
        """Returns the calls of modules around a choice, down to the module whose mode was read."""
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


def _array_operations(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and not is_size(node) and node.meta.get("val") is not None
    ]


def _map_nodes(tree: Any, value: Callable[[int, fx.Node], fx.Node]) -> Any:
    """Returns the tree with every node replaced by `value` of its number and itself."""
    count = iter(range(len(nodes_in(tree))))
    return map_aggregate(tree, lambda leaf: value(next(count), leaf) if isinstance(leaf, fx.Node) else leaf)
