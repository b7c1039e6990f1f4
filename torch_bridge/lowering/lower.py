"""`TorchGraph` to `Network` and `WeightMap`: every node through its rule."""

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import torch
from torch import Tensor, fx, nn

from jaxensemble.errors import NarrowIntegerWarning, UnsupportedError
from jaxensemble.network.network import (
    Call,
    Fixed,
    Layer,
    Network,
    Record,
    Ref,
    ReferenceTree,
    Var,
    Variable,
    references,
)
from jaxensemble.network.weight_map import Entry, WeightMap
from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.graph.nodes import has_tensors, is_size
from torch_bridge.lowering.builder import Builder, DrawMode
from torch_bridge.lowering.integer_ranges import wide_products
from torch_bridge.lowering.layouts.layout import Layout, plain_layout
from torch_bridge.lowering.rules.draws import is_draw
from torch_bridge.lowering.rules.mode import write_buffer
from torch_bridge.lowering.table import REFUSALS, RULES
from torch_bridge.lowering.tensors import ModuleState
from torch_bridge.lowering.values import DTYPE_NAMES, Value, fix_sizes, module_scope, size, sizes

RANDOM = torch.Tag.nondeterministic_seeded


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A network, where its weights come from, and the constants all members share (path to tensor)."""

    network: Network
    weights: WeightMap
    constants: dict[str, Tensor]


def lower(
    captured: TorchGraph, input_layout: str = "torch", *, observed: bool = False, draw_mode: DrawMode | None = None
) -> Lowered:
    """Lowers a captured graph to a network and its weights.

    **Arguments:**

    - `observed`: whether the network returns the output of every module call by name, instead of the model's outputs.
    - `draw_mode`: with it, the network returns a pair: the outputs, and all random numbers that the forward draws in
      this mode, in order.

    **Raises:** `UnsupportedError` naming every node that has no rule, and every node whose rule refuses it.
    """
    builder = Builder(captured, draw_mode)
    env: dict[fx.Node, Any] = {}
    refused = _Refused(builder, env)
    nodes = {node.name: node for node in captured.graph.nodes}
    for node in captured.graph.nodes:
        builder.node = node
        if node.op == "placeholder":
            env[node] = _placeholder(builder, node, input_layout)
        elif node.op == "call_function" and refused.may_be_called(node):
            try:
                env[node] = _call(builder, node, env)
            except UnsupportedError as error:
                refused.add(node, error)
            except Exception:  # as of a rule that meets what was made up for another one's result
                if not refused.errors:
                    raise
                refused.lost.add(node)
    refused.tell()
    _warn_of_narrow_integers(captured)
    wanted = _module_outputs(captured.graph, env) if observed else captured.outputs
    outputs: ReferenceTree = _outputs(builder, wanted, env)
    if draw_mode is not None:
        drawn_numbers: list[ReferenceTree] = [_returned(builder, value) for value in builder.draws]
        outputs = (outputs, drawn_numbers)
    for name, key in captured.weights.items():
        if key in captured.updates:
            builder.node = captured.updates[key]
            training = env[builder.node.args[0]]  # type: ignore[index]
            write_buffer(builder, key, env[nodes[name]], builder.value(training))
    return _assemble(builder, outputs)


class _Refused:
    """The operations that cannot be lowered, all of which one error names.

    Lowering goes on after one of them, with made-up results of the shapes that are known; what takes a result without a
    known shape is lost, and is not looked at.
    """

    def __init__(self, builder: Builder, env: dict[fx.Node, Any]):
        self.builder, self.env = builder, env
        self.errors: list[UnsupportedError] = []
        self.unknown = 0
        self.lost: set[fx.Node] = set()

    def may_be_called(self, node: fx.Node) -> bool:
        """Whether there is a rule, and all that it takes. Without a rule, the node is noted down."""
        if not (_is_structural(node) or str(node.target) in RULES or _is_constant(node)):
            self.unknown += 1
            self.add(node, self.builder.unsupported(REFUSALS.get(str(node.target), "")))
            return False
        if self.lost.isdisjoint(node.all_input_nodes):
            return True
        self.lost.add(node)
        return False

    def add(self, node: fx.Node, error: UnsupportedError) -> None:
        """Notes down why a node cannot be lowered."""
        self.errors.append(error)
        results = pytree.tree_leaves(node.meta.get("val"))
        if any(not isinstance(one, Tensor) or any(map(free_unbacked_symbols, one.shape)) for one in results):
            self.lost.add(node)
            return
        made_up = lambda one: self.builder.new(Ref(node.name), sizes(one.shape), one.dtype)  # noqa: E731
        self.env[node] = pytree.tree_map(made_up, node.meta["val"])

    def tell(self) -> None:
        """**Raises:** `UnsupportedError` if there was any."""
        if len(self.errors) == 1 and not self.unknown:
            raise self.errors[0]
        if self.errors:
            name, which = type(self.builder.captured.model).__name__, "cannot be carried exactly"
            if self.unknown:
                which = "have no rule" if self.unknown == len(self.errors) else f"have no rule, or {which}"
            listing = "\n".join(f"  {line}" for line in dict.fromkeys(error.details for error in self.errors))
            raise UnsupportedError(
                f"{name} uses operations that {which}:\n{listing}\nWrite the forward with other operations"
                + (", or register a rule with torch_bridge.register." if self.unknown else ".")
            )


def _warn_of_narrow_integers(captured: TorchGraph) -> None:
    if jax.config.read("jax_enable_x64"):
        return
    found = wide_products(captured.graph, dict(captured.constants))
    if found:
        warnings.warn(
            f"{type(captured.model).__name__} computes with 64-bit integers that may leave the range of 32 bits, which "
            f"JAX has while x64 is off: {'; '.join(found)}. Beyond it results would wrap around. Port and call it "
            "within `with jax.enable_x64(True):`, or ignore this where its values stay below 2**31.",
            NarrowIntegerWarning,
            stacklevel=2,
        )


def _is_structural(node: fx.Node) -> bool:
    """Whether a node only takes results apart or computes sizes."""
    return node.target is operator.getitem or not has_tensors(node)


def _is_constant(node: fx.Node) -> bool:
    """Whether a node depends on no input and no weight, so that it is computed once, by PyTorch."""
    return not node.all_input_nodes and not _is_open(node) and not _is_random(node)


def _is_open(node: fx.Node) -> bool:
    """Whether the size of a result depends on the batch size. Sizes that only values decide are another matter."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    open_sizes = [size(entry) for leaf in leaves if isinstance(leaf, Tensor) for entry in leaf.shape]
    return any(not isinstance(entry, int) and not free_unbacked_symbols(entry) for entry in open_sizes)


def _is_random(node: fx.Node) -> bool:
    return is_draw(node.target) or RANDOM in getattr(node.target, "tags", ())


def _placeholder(builder: Builder, node: fx.Node, input_layout: str) -> Any:
    captured = builder.captured
    if node.name in captured.weights:
        tensor = node.meta["val"]
        key = builder.state.names[captured.weights[node.name]][0]
        return Value(Ref(node.name), plain_layout(sizes(tensor.shape)), tensor.dtype, key=key, open=True)
    if node.name in captured.constants:
        return captured.constants[node.name]
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return None  # what is fixed: the graph has its value wherever it is used
    value = builder.new(Ref(node.name), sizes(val.shape), val.dtype)
    builder.open_names |= {value.shape[axis]: name for axis, name in captured.open_axes.get(node.name, {}).items()}
    if input_layout == "NHWC" and value.ndim >= 3:
        dims = value.layout.dims
        value = dataclasses.replace(value, layout=Layout(dims, (dims[0], *dims[2:], dims[1])))
    builder.sources.append(value)
    return value


def _call(builder: Builder, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if not has_tensors(node) and node.target is not operator.getitem:
        return size(node.meta["val"]) if "val" in node.meta else None
    args, kwargs = pytree.tree_map(lambda leaf: _argument(builder, leaf, env), (node.args, dict(node.kwargs)))
    if node.target is operator.getitem:
        return args[0][args[1]] if node.users else None  # as of results that a rule leaves out, since nobody takes them
    if _is_foldable(node, args, kwargs):
        with torch.no_grad():
            result = cast(Callable[..., Any], node.target)(*args, **kwargs)
        for constant, val in zip(pytree.tree_leaves(result), pytree.tree_leaves(node.meta["val"]), strict=True):
            if isinstance(constant, Tensor):
                fix_sizes(val.shape, constant.shape)
        return result
    if str(node.target) in _MADE_ALIKE and not _is_open(node):
        return _made_alike(node, args, kwargs)
    rule = RULES.get(str(node.target))
    if rule is None:
        raise builder.unsupported("there is no rule for this operation; register one with torch_bridge.register")
    builder.size_sources = [
        value for value in map(env.get, _sized(node)) if isinstance(value, Value) and not value.open
    ]
    result = rule(builder, *args, **kwargs)
    if is_draw(node.target):
        builder.note_draw(result)
    return result


def _sized(node: fx.Node) -> Iterator[fx.Node]:
    """The arrays that the sizes were read off which a node was given, itself or through an array made for it."""
    if is_draw(node.target):
        for given in (node, *node.all_input_nodes):
            for one in given.all_input_nodes:
                if given is not node or is_size(one):
                    yield from one.all_input_nodes if is_size(one) else [one]


def _argument(builder: Builder, leaf: Any, env: dict[fx.Node, Any]) -> Any:
    value = env[leaf] if isinstance(leaf, fx.Node) else leaf
    if isinstance(value, torch.SymFloat | torch.SymBool):
        if free_unbacked_symbols(value):
            raise builder.unsupported("it uses a tensor's value as a number (.item()); use the tensor itself")
        raise builder.open_size_error(f"{value} depends", value)
    return builder.resolve(value) if isinstance(value, Value) and value.open else value


def _is_foldable(node: fx.Node, args: Any, kwargs: Any) -> bool:
    leaves = pytree.tree_leaves((args, kwargs))
    symbolic = any(hasattr(leaf, "free_symbols") for leaf in leaves)
    opaque = getattr(node.target, "namespace", "") == "torch_bridge"  # a stand-in has no values
    return not (
        symbolic or opaque or any(isinstance(leaf, Value) for leaf in leaves) or _is_open(node) or _is_random(node)
    )


_MADE_ALIKE = {
    *(f"aten.new_{name}.default" for name in ("zeros", "ones", "full", "empty")),
    *(f"aten.{name}_like.default" for name in ("zeros", "ones", "full", "empty")),
}
"""Operations that take nothing from an array but its dtype, device and shape."""


def _made_alike(node: fx.Node, args: Any, kwargs: Any) -> Tensor:
    """What such an operation makes, so that masks that begin with it are folded. Nobody may read empty memory."""
    template = node.args[0]
    assert isinstance(template, fx.Node)
    held = template.meta["val"]
    shape = sizes(held.shape) if str(node.target).endswith("_like.default") else ()
    with torch.no_grad():
        result = node.target(torch.zeros(shape, dtype=held.dtype), *args[1:], **{**kwargs, "device": "cpu"})  # type: ignore[operator]
    return torch.zeros_like(result) if "empty" in str(node.target) else result


def _outputs(builder: Builder, tree: Any, env: dict[fx.Node, Any]) -> ReferenceTree:
    match tree:
        case None | Fixed():
            return tree
        case bool() | int() | float():
            return Fixed(tree)  # a size that turned out to be no other
        case Record():
            return dataclasses.replace(tree, fields=_outputs(builder, dict(tree.fields), env))
        case fx.Node():
            value = env[tree]
            builder.node = tree
            if not isinstance(value, Value | Tensor):
                raise UnsupportedError(
                    f"outputs must be tensors, and sizes that are fixed; got {value!r}, a size that stays open. Leave "
                    "it out: whoever calls the network knows it from its inputs."
                )
            return _returned(builder, value)
        case dict():
            if not all(isinstance(key, str) for key in tree):
                raise UnsupportedError(f"dicts of outputs must have strings for keys; got {list(tree)}")
            return {key: _outputs(builder, item, env) for key, item in tree.items()}
        case list():
            return [_outputs(builder, item, env) for item in tree]
        case tuple():
            return tuple(_outputs(builder, item, env) for item in tree)
    raise UnsupportedError(f"outputs must be tensors, tuples, lists or dicts of them, or None; got {tree!r}")


def _returned(builder: Builder, value: Value | Tensor) -> Ref:
    plain = builder.plain(builder.resolve(value) if isinstance(value, Value) and value.open else value)
    return plain.expr if isinstance(plain.expr, Ref) else builder.emit("jnp.asarray", plain.expr)


def _module_outputs(graph: fx.Graph, env: dict[fx.Node, Any]) -> dict[str, fx.Node]:
    """The last array computed within each module call."""
    last = {}
    for node in graph.nodes:
        if isinstance(env.get(node), Value):
            last |= dict.fromkeys(module_scope(node), node)
    return last


def _assemble(builder: Builder, outputs: ReferenceTree) -> Lowered:
    captured, state = builder.captured, builder.state
    entries = tuple(_entry(builder, names) for names in dict.fromkeys(state.names.values()))
    network = Network(
        name=_class_name("", captured.model),
        inputs=captured.inputs,
        arguments=captured.arguments,
        outputs=outputs,
        layers=_in_order(builder.layers, state),
        variables=_in_order(builder.variables, state),
        calls=tuple(_beside_layers(call, builder.layers) for call in _live(builder, outputs)),
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
    """How one tensor is stored. What no rule has asked for is kept as it is: `to_torch` gives back everything."""
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


def _live(builder: Builder, outputs: ReferenceTree) -> tuple[Call, ...]:
    """The calls that some output depends on, or a running statistic, which training mode updates all the same."""
    needed = {ref.name for ref in references(outputs) if isinstance(ref, Ref)}
    kept = []
    for call in reversed(builder.calls):
        layer = builder.layers.get(call.target.removeprefix("layer:"))
        if call.out in needed or call.target == "=" or (layer is not None and _keeps_statistics(layer)):
            kept.append(call)
            needed |= {ref.name for ref in references((call.args, call.kwargs)) if isinstance(ref, Ref)}
    return tuple(reversed(kept))


def _keeps_statistics(layer: Layer) -> bool:
    is_norm = layer.type in ("layers.BatchNorm", "layers.InstanceNorm")
    return is_norm and layer.options.get("track_running_stats", True) is True


def _beside_layers(call: Call, layers: dict[str, Layer]) -> Call:
    """What a layer's own module does besides calling the layer stands in the module around it."""
    scope = call.scope
    while scope and scope[-1].partition("@")[0] in layers:
        scope = scope[:-1]
    return dataclasses.replace(call, scope=scope)


Placed = TypeVar("Placed", Layer, Variable)


def _in_order(placed: dict[str, Placed], state: ModuleState) -> tuple[Placed, ...]:
    """In the order in which PyTorch's module defines them; what a rule has added comes last within its module."""
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
    """PyTorch's class name; a container of torch.nn is named after the attribute that holds it."""
    name = type(module).__name__
    if path and type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        name = path.rpartition(".")[2].title().replace("_", "")
    return name


def _kind(module: nn.Module) -> str:
    children = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    numbered = bool(children) and all(name.isdigit() for name in children)
    plain = type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward, nn.ParameterList.forward)
    if plain and numbered:
        return "sequence"
    return "mapping" if type(module) in (nn.ModuleDict, nn.ParameterDict, nn.Sequential) else "module"


def _is_training(path: str, state: ModuleState) -> bool:
    """The mode of the module that a layer stands for, or stands in."""
    while path not in state.modules:
        path = path.rpartition(".")[0]
    return state.modules[path].training
