"""`TorchGraph` to `Network` and `WeightMap`: every node through its rule."""

import dataclasses
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import torch
from torch import Tensor, fx

from jaxensemble.errors import NarrowIntegerWarning, UnsupportedError
from jaxensemble.network.network import Fixed, Record, Ref, ReferenceTree
from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.graph.nodes import has_tensors, is_size
from torch_bridge.lowering.assembly import Lowered, assemble_network
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.calls import DrawMode
from torch_bridge.lowering.constants import MADE_ALIKE, compute_constant, is_foldable, is_open, make_alike
from torch_bridge.lowering.integer_ranges import wide_products
from torch_bridge.lowering.layouts.layout import Layout, plain_layout
from torch_bridge.lowering.refusals import Refusals
from torch_bridge.lowering.rules.draws import is_draw
from torch_bridge.lowering.rules.mode import write_buffer
from torch_bridge.lowering.table import RULES
from torch_bridge.lowering.values import Value, module_scope, size, sizes


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
    refusals = Refusals(builder, env)
    nodes = {node.name: node for node in captured.graph.nodes}
    for node in captured.graph.nodes:
        builder.node = node
        if node.op == "placeholder":
            env[node] = _lower_placeholder(builder, node, input_layout)
        elif node.op == "call_function" and refusals.can_lower(node):
            try:
                env[node] = _lower_call(builder, node, env)
            except UnsupportedError as error:
                refusals.add(node, error)
            except Exception:  # such as a rule that fails on a made-up result
                if not refusals.errors:
                    raise
                refusals.lost.add(node)
    refusals.raise_if_any()
    _warn_of_narrow_integers(captured)
    wanted = _module_outputs(captured.graph, env) if observed else captured.outputs
    outputs: ReferenceTree = _outputs(builder, wanted, env)
    if draw_mode is not None:
        drawn_numbers: list[ReferenceTree] = [_output_reference(builder, value) for value in builder.draws]
        outputs = (outputs, drawn_numbers)
    for name, key in captured.weights.items():
        if key in captured.updates:
            builder.node = captured.updates[key]
            training = env[builder.node.args[0]]  # type: ignore[index]
            write_buffer(builder, key, env[nodes[name]], builder.value(training))
    return assemble_network(builder, outputs)


def _warn_of_narrow_integers(captured: TorchGraph) -> None:
    """Warns of integers that may leave the range of 32 bits, while x64 is off."""
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


def _lower_placeholder(builder: Builder, node: fx.Node, input_layout: str) -> Any:
    """The value of an input, a weight or a constant of the graph."""
    captured = builder.captured
    if node.name in captured.weights:
        tensor = node.meta["val"]
        key = builder.state.names[captured.weights[node.name]][0]
        return Value(Ref(node.name), plain_layout(sizes(tensor.shape)), tensor.dtype, key=key, open=True)
    if node.name in captured.constants:
        return captured.constants[node.name]
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return None  # a fixed argument: the graph holds its value wherever it is used
    value = builder.new(Ref(node.name), sizes(val.shape), val.dtype)
    builder.open_names |= {value.shape[axis]: name for axis, name in captured.open_axes.get(node.name, {}).items()}
    if input_layout == "NHWC" and value.ndim >= 3:
        dims = value.layout.dims
        value = dataclasses.replace(value, layout=Layout(dims, (dims[0], *dims[2:], dims[1])))
    builder.sources.append(value)
    return value


def _lower_call(builder: Builder, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """Lowers one call: computes it now if it is constant, else calls its rule."""
    if not has_tensors(node) and node.target is not operator.getitem:
        return size(node.meta["val"]) if "val" in node.meta else None
    args, kwargs = pytree.tree_map(lambda leaf: _argument(builder, leaf, env), (node.args, dict(node.kwargs)))
    if node.target is operator.getitem:
        return args[0][args[1]] if node.users else None  # a rule leaves out results that nobody takes
    if is_foldable(node, args, kwargs):
        return compute_constant(node, args, kwargs)
    if str(node.target) in MADE_ALIKE and not is_open(node):
        return make_alike(node, args, kwargs)
    rule = RULES.get(str(node.target))
    if rule is None:
        raise builder.unsupported("there is no rule for this operation; register one with torch_bridge.register")
    builder.size_sources = [
        value for value in map(env.get, _size_sources(node)) if isinstance(value, Value) and not value.open
    ]
    result = rule(builder, *args, **kwargs)
    if is_draw(node.target):
        builder.note_draw(result)
    return result


def _size_sources(node: fx.Node) -> Iterator[fx.Node]:
    """The arrays from which the sizes of a draw were read, by its node or by the node that makes its argument."""
    if is_draw(node.target):
        for given in (node, *node.all_input_nodes):
            for one in given.all_input_nodes:
                if given is not node or is_size(one):
                    yield from one.all_input_nodes if is_size(one) else [one]


def _argument(builder: Builder, leaf: Any, env: dict[fx.Node, Any]) -> Any:
    """The value of an argument of a node."""
    value = env[leaf] if isinstance(leaf, fx.Node) else leaf
    if isinstance(value, torch.SymFloat | torch.SymBool):
        if free_unbacked_symbols(value):
            raise builder.unsupported("it uses a tensor's value as a number (.item()); use the tensor itself")
        raise builder.open_size_error(f"{value} depends", value)
    return builder.resolve(value) if isinstance(value, Value) and value.open else value


def _outputs(builder: Builder, tree: Any, env: dict[fx.Node, Any]) -> ReferenceTree:
    """The tree of outputs, with a reference for each array."""
    match tree:
        case None | Fixed():
            return tree
        case bool() | int() | float():
            return Fixed(tree)  # a size that turned out to be fixed
        case Record():
            return dataclasses.replace(tree, fields=_outputs(builder, dict(tree.fields), env))
        case fx.Node():
            value = env[tree]
            builder.node = tree
            if not isinstance(value, Value | Tensor):
                raise UnsupportedError(
                    f"outputs must be tensors, and sizes that are fixed; got {value!r}, a size that stays open. Leave "
                    "this size out: the caller knows it from the inputs."
                )
            return _output_reference(builder, value)
        case dict():
            if not all(isinstance(key, str) for key in tree):
                raise UnsupportedError(f"dicts of outputs must have strings for keys; got {list(tree)}")
            return {key: _outputs(builder, item, env) for key, item in tree.items()}
        case list():
            return [_outputs(builder, item, env) for item in tree]
        case tuple():
            return tuple(_outputs(builder, item, env) for item in tree)
    raise UnsupportedError(f"outputs must be tensors, tuples, lists or dicts of them, or None; got {tree!r}")


def _output_reference(builder: Builder, value: Value | Tensor) -> Ref:
    """The reference to an output, stored as PyTorch sees it."""
    plain = builder.plain(builder.resolve(value) if isinstance(value, Value) and value.open else value)
    return plain.expr if isinstance(plain.expr, Ref) else builder.emit("jnp.asarray", plain.expr)


def _module_outputs(graph: fx.Graph, env: dict[fx.Node, Any]) -> dict[str, fx.Node]:
    """The last array that is computed within each module call."""
    last = {}
    for node in graph.nodes:
        if isinstance(env.get(node), Value):
            last |= dict.fromkeys(module_scope(node), node)
    return last
