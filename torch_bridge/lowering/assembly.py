"""Networks and maps of weights, put together from what a builder has collected."""

import dataclasses
from typing import TypeVar

from torch import Tensor, nn

from jaxensemble.network.network import Call, Layer, Network, Ref, ReferenceTree, Var, Variable, references
from jaxensemble.network.weight_map import Entry, WeightMap
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.layouts.layout import plain_layout
from torch_bridge.lowering.tensors import ModuleState
from torch_bridge.lowering.values import DTYPE_NAMES, Value


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A network, the map of its weights, and the constants that all members share (path to tensor)."""

    network: Network
    weights: WeightMap
    constants: dict[str, Tensor]


def assemble_network(builder: Builder, outputs: ReferenceTree) -> Lowered:
    """Puts together the network of a builder."""
    captured, state = builder.captured, builder.state
    entries = tuple(_entry(builder, names) for names in dict.fromkeys(state.names.values()))
    network = Network(
        name=_class_name("", captured.model),
        inputs=captured.inputs,
        arguments=captured.arguments,
        outputs=outputs,
        layers=_sort_by_definition(builder.layers, state),
        variables=_sort_by_definition(builder.variables, state),
        calls=tuple(_move_out_of_layers(call, builder.layers) for call in _live_calls(builder, outputs)),
        modules=_modules(builder),
        evaluation_only=builder.evaluation_only,
        input_shapes={
            value.expr.name: tuple(
                size if isinstance(size, int) else builder.axis_name(size) for size in value.layout.stored_shape
            )
            for value in builder.sources
            if isinstance(value.expr, Ref)
        },
        input_dtypes={
            value.expr.name: DTYPE_NAMES[value.dtype] for value in builder.sources if isinstance(value.expr, Ref)
        },
        training=tuple(path for path in builder.layers if _is_training(path, state)),
        sizes=captured.sizes,
    )
    return Lowered(network, WeightMap(entries), builder.constants)


def _entry(builder: Builder, names: tuple[str, ...]) -> Entry:
    """The entry for one tensor. A tensor that no rule asked for is kept: `to_torch` returns everything."""
    state, key = builder.state, names[0]
    tensor = state.tensors[key]
    if key not in builder.storage:
        builder.plain(Value(Var(key), plain_layout(tuple(tensor.shape)), tensor.dtype, key=key, open=True))
    storage = builder.storage[key]
    return Entry(
        keys=names,
        path=storage.path,
        shape=tuple(tensor.shape),
        dtype=DTYPE_NAMES[tensor.dtype],
        rearrangement=storage.rearrangement,
        persistent=key not in state.non_persistent,
        frozen=state.kind(key) == "param" and not tensor.requires_grad,
    )


def _live_calls(builder: Builder, outputs: ReferenceTree) -> tuple[Call, ...]:
    """The calls that an output depends on, and those that update a running statistic in training mode."""
    needed = {ref.name for ref in references(outputs) if isinstance(ref, Ref)}
    kept = []
    for call in reversed(builder.calls):
        layer = builder.layers.get(call.target.removeprefix("layer:"))
        if call.out in needed or call.target == "=" or (layer is not None and _has_statistics(layer)):
            kept.append(call)
            needed |= {ref.name for ref in references((call.args, call.kwargs)) if isinstance(ref, Ref)}
    return tuple(reversed(kept))


def _has_statistics(layer: Layer) -> bool:
    is_norm = layer.type in ("layers.BatchNorm", "layers.InstanceNorm")
    return is_norm and layer.options.get("track_running_stats", True) is True


def _move_out_of_layers(call: Call, layers: dict[str, Layer]) -> Call:
    """Moves a call from the module of a layer into the module around it: a layer's module holds nothing else."""
    scope = call.scope
    while scope and scope[-1].partition("@")[0] in layers:
        scope = scope[:-1]
    return dataclasses.replace(call, scope=scope)


Placed = TypeVar("Placed", Layer, Variable)


def _sort_by_definition(placed: dict[str, Placed], state: ModuleState) -> tuple[Placed, ...]:
    """Sorts layers or variables as PyTorch's module defines them. Those that a rule has added come last."""
    order = {path: k for k, path in enumerate((*state.modules, *state.tensors))}
    return tuple(sorted(placed.values(), key=lambda item: order.get(item.path, len(order))))


def _modules(builder: Builder) -> dict[str, tuple[str, str]]:
    """Class name and kind of every module on the way to a layer, a variable or a call."""
    state = builder.state
    inner = {path.rpartition(".")[0] for path in (*builder.layers, *builder.variables)}
    inner |= {entry.partition("@")[0] for call in builder.calls for entry in call.scope}
    paths = {""} | {".".join(path.split(".")[:k]) for path in inner for k in range(1, path.count(".") + 2)}
    holding = inner | {path for path in state.modules if not state.is_empty(path)}
    return {
        path: (_class_name(path, module), "function" if path and path not in holding else _kind(module))
        for path, module in state.modules.items()
        if path in paths and path not in builder.layers
    }


def _class_name(path: str, module: nn.Module) -> str:
    """PyTorch's class name. A container of torch.nn is named after the attribute that holds it."""
    name = type(module).__name__
    if path and type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        name = path.rpartition(".")[2].title().replace("_", "")
    return name


def _kind(module: nn.Module) -> str:
    """The kind of a module: `sequence`, `mapping` or `module`."""
    children = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    numbered = bool(children) and all(name.isdigit() for name in children)
    plain = type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward, nn.ParameterList.forward)
    if plain and numbered:
        return "sequence"
    return "mapping" if type(module) in (nn.ModuleDict, nn.ParameterDict, nn.Sequential) else "module"


def _is_training(path: str, state: ModuleState) -> bool:
    """Returns whether the module that a layer replaces, or is inside, is in training mode."""
    while path not in state.modules:
        path = path.rpartition(".")[0]
    return state.modules[path].training
