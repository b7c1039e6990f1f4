"""What a module does in training and in evaluation: its two graphs beside each other.

Where they agree in everything but the training flags of dropout and normalisation, and in dropout that stands in the
training graph alone (`if self.training: x = F.dropout(x)`), each flag gets a mode. Where they do not, the first
difference is told.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from flax.nnx import GraphDef
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from jaxensemble.errors import InputError, TrainingModeWarning, UnsupportedError, shorten_list
from jaxensemble.modules.structure import Structure
from torch_bridge.compat import map_aggregate
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

COUNTER = "torch_bridge: counts batches"


class Added(NamedTuple):
    """Dropout that only the training graph has, and the evaluation graph's node after which it belongs."""

    dropout: fx.Node
    after: fx.Node


class Modes(NamedTuple):
    """Node name to mode for every operation with a flag, and the dropout that the evaluation graph lacks.

    `twins` maps the nodes of the training graph to those of the evaluation graph, added dropout to what it drops from.
    """

    of: dict[str, Mode]
    added: tuple[Added, ...]
    twins: dict[fx.Node, fx.Node]


_WATCH = threading.RLock()


@contextlib.contextmanager
def watch_mode_reads() -> Iterator[list[nn.Module]]:
    """The modules that are asked for their mode within, in order; those that the exporter makes are left out.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with watch_mode_reads() as read:
    ...     _ = model(torch.ones(1, 2))
    >>> read
    [Dropout(p=0.5, inplace=False)]
    """
    read = []

    def get(module: nn.Module) -> bool:
        if type(module) is not nn.Module and not isinstance(module, fx.GraphModule):
            read.append(module)
        held: dict[str, Any] = vars(module)
        if "training" in held:
            return held["training"]
        return bool(module.__getattr__("training"))  # as of TorchScript

    def put(module: nn.Module, training: bool) -> None:
        vars(module)["training"] = training

    with _WATCH:
        before = vars(nn.Module).get("training")
        nn.Module.training = property(get, put)  # type: ignore[assignment]
        try:
            yield read
        finally:
            if before is None:
                del nn.Module.training
            else:
                nn.Module.training = before


def has_hidden_mode(module: nn.Module) -> bool:
    """Whether a module may depend on its mode without a read that can be seen."""
    kind = type(module)
    own = "train" in vars(module) or (kind.train, kind.__setattr__) != (nn.Module.train, nn.Module.__setattr__)
    names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
    return own or not {"__dict__", "vars"}.isdisjoint(names)


@contextlib.contextmanager
def switch_mode(models: Sequence[nn.Module], training: bool | None) -> Iterator[None]:
    """All modules of the models in one mode for a while, as they are for None; each gets its own back.

    >>> model = nn.Sequential(nn.Dropout())
    >>> with switch_mode([model], training=False):
    ...     print(model[0].training)
    False
    >>> model[0].training
    True
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        if training is not None:
            for model in models:
                model.train(training)  # a module may have one of its own, which keeps a part of it in evaluation mode
        yield
    finally:
        for module, training_flag in before:
            module.training = training_flag


PortedMode = Literal["eval", "train", "as_is"]


def ported_mode(models: Sequence[nn.Module], mode: PortedMode | None) -> contextlib.AbstractContextManager[None]:
    """The models in the mode that they are to be ported in. **Raises:** `InputError` for another one."""
    if mode not in ("eval", "train", "as_is", None):
        raise InputError(f"`mode` must be 'eval', 'train' or 'as_is'; got {mode!r}")
    return switch_mode(models, {"eval": False, "train": True}.get(mode or "as_is"))


def warn_of_training(graphdef: GraphDef, mode: PortedMode | None) -> None:
    """Warns of layers in training mode where nothing says that this is meant."""
    structure = Structure.of(graphdef)
    layers = structure.training_layers()
    if mode is None and layers:
        warnings.warn(
            f"{structure.root.type.__name__} was ported in training mode ({shorten_list(layers)}): "
            "mode='eval' ports it in evaluation mode, mode='as_is' says that this is meant",
            TrainingModeWarning,
            stacklevel=3,
        )


def align_programs(evaluation: ExportedProgram, training: ExportedProgram) -> Modes | str:
    """The modes of all operations, or the first difference between the graphs."""
    ours, theirs = ([node for node in p.graph.nodes if _matters(node)] for p in (evaluation, training))
    twins: dict[fx.Node, fx.Node] = {}
    modes: dict[str, Mode] = {}
    added: list[Added] = []
    done = 0
    for twin in theirs:
        node = ours[done] if done < len(ours) else None
        if node is None or not _agree(node, twin, twins):
            if not _drops(twin, twins):
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
    """When an operation is in training mode; None for one that is so in evaluation mode alone, or at another rate."""
    if not evaluation:
        return Mode("by_mode", float(training)) if training else Mode("never")
    return Mode("always", float(training)) if evaluation == training else None


def _agree(node: fx.Node, twin: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether two nodes do the same, the training flag left out."""
    if node.op == "placeholder" and twin.op == "placeholder":
        return True
    return node.target == twin.target and _arguments(node, {}) == _arguments(twin, twins)


def _drops(node: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a node of the training graph is dropout, out of place, of something that evaluation has too."""
    kinds = [FLAGGED[name][0] for name in DROPOUTS]
    return node.target in kinds and bool(training_flag(node)) and all(given in twins for given in node.all_input_nodes)


def add_dropout(modes: Modes) -> None:
    """Puts the dropout that the training graph alone has into the evaluation graph, to be used by mode."""
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
                _use(modes.twins[user], user, dropout, new)


def _use(node: fx.Node, twin: fx.Node, dropout: fx.Node, new: fx.Node) -> None:
    """Gives a node the new dropout wherever its twin has the training graph's. Both have arguments of one structure."""
    leaves: list[Any] = []
    map_aggregate((twin.args, twin.kwargs), lambda leaf: leaves.append(leaf))
    queue = iter(leaves)
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda leaf: new if next(queue) is dropout else leaf)  # type: ignore[misc]
    node.args, node.kwargs = args, kwargs  # type: ignore[assignment]


def _same_source(node: fx.Node, evaluation: ExportedProgram, twin: fx.Node, training: ExportedProgram) -> bool:
    """Whether two placeholders stand for the same input, weight or constant."""
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


def is_same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def _difference(node: fx.Node, twin: fx.Node) -> str:
    where = source_line(twin) or source_line(node)
    return (
        f"its forward does something else in training mode ({twin.target}) than in evaluation mode ({node.target})"
        + (f", at {where}" if where else "")
    )


def _matters(node: fx.Node) -> bool:
    """Whether a node makes arrays; sizes are compared where they are used."""
    return not (is_size(node) or _counted(node) is not None)


def _counted(node: fx.Node) -> fx.Node | None:
    """The counter in `num_batches_tracked += 1`, which a BatchNorm layer does itself, at each of its calls."""
    counter = node.args[0] if node.args else None
    if node.target != torch.ops.aten.add_.Tensor or not isinstance(counter, fx.Node):
        return None
    return counter if COUNTER in counter.meta else _counted(counter)


def check_owners(model: nn.Module, evaluation: ExportedProgram, as_it_is: ExportedProgram, modes: Modes) -> None:
    """Whether what has a mode takes that of the module it stands in, of a model in training mode in part.

    So it is ported: a layer has the mode of the module that holds its weights, or else of the one around it.

    **Raises:** `UnsupportedError` for an operation that takes the mode of another module.
    """
    ours, theirs = ([node for node in each.graph.nodes if node.target in NAMES] for each in (evaluation, as_it_is))
    signature = evaluation.graph_signature
    keys = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    same = len(ours) == len(theirs)
    wrong = [] if same else ["it has other operations with a mode than in evaluation mode"]
    for node, twin in zip(ours, theirs, strict=True) if same else ():
        if modes.of[node.name].when != "by_mode":
            continue
        held = [keys[given.name] for given in node.all_input_nodes if given.name in keys]
        scope = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][0]
        owner = held[0].rpartition(".")[0] if held else scope
        if bool(training_flag(twin)) != model.get_submodule(owner).training:
            wrong.append(
                f"{node.target} does not take that of `{owner or 'itself'}` ({source_line(node) or node.name})"
            )
    if wrong:
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode in part, and its forward takes the mode of other modules than "
            f"those that hold the layers: {'; '.join(wrong)}. Call .eval() or .train() on it, or pass mode='eval'."
        )


def find_unchanged_counters(model: nn.Module, training: ExportedProgram) -> frozenset[str]:
    """The counters of BatchNorms whose forwards normalise without counting, as of a subclass with one of its own."""
    keys, held = training.graph_signature.inputs_to_buffers, dict(model.named_buffers(remove_duplicate=False))
    nodes = [node for node in map(_counted, training.graph.nodes) if node is not None]
    counted = {id(held[keys[node.name]]) for node in nodes}  # which may have several names
    batch_norm = nn.modules.batchnorm._BatchNorm
    return frozenset(
        key
        for key in keys.values()
        if id(held[key]) not in counted
        and is_counter(model, key)
        and isinstance(model.get_submodule(key.rpartition(".")[0]), batch_norm)
    )


def mark_counters(model: nn.Module, program: ExportedProgram) -> None:
    """Marks the placeholders of counters that normalisation keeps."""
    keys = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in keys and is_counter(model, keys[node.name]):
            node.meta[COUNTER] = True


def is_counter(model: nn.Module, key: str) -> bool:
    """Whether a buffer counts the batches of a layer of PyTorch's own, which the ported layer counts itself."""
    path, _, name = key.rpartition(".")
    return name == "num_batches_tracked" and isinstance(model.get_submodule(path), nn.modules.batchnorm._NormBase)


def _arguments(node: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> Any:
    """A node's arguments for comparison, the training flag left out."""
    name = NAMES.get(node.target)
    args = list(node.args) if name is None else all_args(node)
    if name is not None:
        args[FLAGGED[name][1]] = None
    return map_aggregate((args, dict(node.kwargs) if name is None else {}), lambda leaf: _comparable(leaf, twins))


def _comparable(leaf: Any, twins: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(leaf, fx.Node):
        return str(leaf.meta["val"]) if is_size(leaf) else twins.get(leaf, leaf)
    return repr(leaf) if isinstance(leaf, float) else leaf  # so that NaN equals itself
