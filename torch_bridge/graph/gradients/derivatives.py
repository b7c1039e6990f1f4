"""Forwards that take derivatives: `torch.func.grad`, `jacrev`, `hessian`, `torch.autograd.grad` and similar ones.

`torch.export` follows none of them. Such a forward is traced below PyTorch's autograd, where a derivative consists of
plain operations. The trace is exported instead. It has no modules: its source is one function.
"""

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from jaxensemble.errors import InputError, UnsupportedError, describe_error
from torch_bridge.compat import current_graph, is_mutating, pytree, trace_graph
from torch_bridge.graph.errors import explain_error
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.gradients.below_autograd import decompositions_for, simplify_trace
from torch_bridge.graph.operations import Operations
from torch_bridge.graph.sizes.open_axes import Example
from torch_bridge.graph.sizes.traces import TracesDiffer, generalise_traces
from torch_bridge.graph.user_lines import user_line

_ATEN = torch.ops.aten

_PLACES = (
    *(f"torch/_functorch/{name}.py" for name in ("eager_transforms", "apis", "vmap")),
    "torch/autograd/functional.py",
)
"""Files in which PyTorch takes derivatives."""


class Derivatives(TorchFunctionMode):
    """Records whether a forward takes derivatives, within it."""

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called |= func in (torch.autograd.grad, Tensor.backward)
        return func(*args, **(kwargs or {}))

    def caused(self, error: BaseException | None) -> bool:
        """Returns whether derivatives caused an error of the exporter."""
        while error is not None and not self.called:
            frames = traceback.extract_tb(error.__traceback__)
            self.called = any(part in frame.filename.replace("\\", "/") for frame in frames for part in _PLACES)
            error = error.__cause__ or error.__context__
        return self.called

    def is_part_of(self, graph: fx.Graph) -> bool:
        """Returns whether an exported graph has derivatives: `torch.func` leaves functions of its own in it."""
        functions = [node.target for node in graph.nodes if node.op == "call_function"]
        return self.called or any("_functorch" in (getattr(each, "__module__", "") or "") for each in functions)


@contextlib.contextmanager
def write_out_derivatives(model: nn.Module, example: Example, operations: Operations) -> Iterator[None]:
    """Gives the module, within it, an equal forward of operations only, for its present mode.

    **Raises:** `UnsupportedError` if there is no such forward, or none for all batch sizes.
    """
    name = type(model).__name__
    if example.named:
        raise UnsupportedError(
            f"{name}.forward takes derivatives, and cannot be followed with open sizes except the batch's: leave "
            f"{', '.join(sorted(example.named))} out of `dynamic`"
        )
    try:
        graph = _trace_batches(model, example.inputs, example.batch_axes, decompositions_for(operations))
    except TracesDiffer as error:
        raise UnsupportedError(
            f"{name}.forward takes derivatives, and cannot be followed with an open batch size: {error}. Pass "
            "batch_axis=None to fix all shapes."
        ) from error
    except Exception as error:  # from a forward or its trace
        explained = explain_error(error, model, example.inputs, operations.refusals, training=model.training)
        if isinstance(explained, InputError):
            raise explained from error
        raise UnsupportedError(
            f"{name}.forward takes derivatives{user_line(error)}, which cannot be written out as operations: "
            f"{describe_error(error)}. Port the network that is differentiated, and take its derivative with jax.grad: "
            "see docs/derivatives.md.",
            details=str(error),
        ) from error

    def forward(*args: Any, **kwargs: Any) -> Any:
        with preserve_node_meta():  # so that errors name the lines
            return fx.Interpreter(graph).run(_tensors(model), _tensors_among(Arguments(args, kwargs)))

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors_among(inputs: Arguments) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


SIZES = (5, 8, 29)
"""Batch sizes that a forward is traced for: numbers that differ between the traces depend on the size."""


def _trace_batches(
    model: nn.Module, inputs: Arguments, axes: Sequence[int | None], decompositions: Mapping[Any, Any]
) -> fx.GraphModule:
    """Returns the trace of a forward. If the batch is open, numbers are computed from the size of the first input."""
    first = next((k for k, axis in enumerate(axes) if axis is not None), None)
    if first is None:
        return _trace(model, inputs, decompositions)
    leaves, spec = pytree.tree_flatten(inputs)
    traces = []
    for size in SIZES:
        rows = [_resize(leaf, axis, size) for leaf, axis in zip(leaves, axes, strict=True)]
        traces.append(_trace(model, pytree.tree_unflatten(rows, spec), decompositions))
    last = sum(isinstance(leaf, Tensor) for leaf in leaves[first:])
    generalise_traces(traces, last, next(axis for axis in axes if axis is not None))
    return traces[0]


def _resize(x: Any, axis: int | None, size: int) -> Any:
    """Returns an input with the specified number of rows, its own rows in turn."""
    return x if axis is None else x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])


def _trace(model: nn.Module, inputs: Arguments, decompositions: Mapping[Any, Any]) -> fx.GraphModule:
    watch, (leaves, spec) = _Watch(), pytree.tree_flatten(inputs)

    def function(state: dict[str, Tensor], tensors: list[Tensor]) -> Any:
        found = iter(tensors)
        given = pytree.tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        with watch, _Detaching(watch), sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(model, state, *given)

    state = {name: _copy_tensor(tensor) for name, tensor in _tensors(model).items()}
    module = trace_graph(function, decompositions, state, list(map(_copy_tensor, _tensors_among(inputs))))
    _place_detach(module.graph, watch.without_gradient)
    simplify_trace(module.graph)
    return module


def _copy_tensor(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor. A trace computes with values and may write into it."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class _Watch(TorchDispatchMode):
    """Records operations that stop gradients: those under `torch.no_grad`, and the forward's own `detach`.

    A trace also has `detach` wherever autograd saves a tensor. These do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.without_gradient: set[fx.Node] = set()
        self.detaching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graph = current_graph()
        last = next(iter(reversed(graph.nodes)))
        stops = self.detaching or not torch.is_grad_enabled()
        result = func(*args, **(kwargs or {}))
        if stops:
            for node in reversed(graph.nodes):
                if node is last:
                    break
                self.without_gradient.add(node)
        return result


class _Detaching(TorchFunctionMode):
    """Sets `detaching` of a watch while the forward itself detaches a tensor."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func not in _DETACHES:
            return func(*args, **(kwargs or {}))
        self.watch.detaching = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.watch.detaching = False


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """Computes `F.one_hot` without reading the values."""
    if num_classes < 0:
        return F.one_hot(x, num_classes)
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).to(torch.int64)


_DATA: Any = Tensor.data
_DETACHES = {torch.detach, torch.detach_, Tensor.detach, Tensor.detach_, _DATA.__get__}


def _place_detach(graph: fx.Graph, without_gradient: set[fx.Node]) -> None:
    """Puts `detach` where gradients end, and removes it everywhere else."""
    for node in list(graph.nodes):
        if node.target is _ATEN.detach.default and node not in without_gradient:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _ATEN.detach_.default:
            node.target = _ATEN.detach.default
        elif node in without_gradient and is_mutating(node) and node.meta["val"].is_floating_point():
            _keep_gradient(graph, node)
            without_gradient.remove(node)
    for node in list(graph.nodes):
        ends = [user for user in node.users if user not in without_gradient]
        if node in without_gradient and ends and isinstance(node.meta.get("val"), Tensor):
            if node.target is not _ATEN.detach.default:
                with graph.inserting_after(node):
                    new = _add_detach(graph, node)
                for user in ends:
                    user.replace_input_with(node, new)


def _keep_gradient(graph: fx.Graph, node: fx.Node) -> None:
    """Gives a value written under `torch.no_grad` the gradient of the old value, by `new + (old - old)`."""
    old = node.args[0]
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    with graph.inserting_before(node):
        new = graph.call_function(getattr(getattr(_ATEN, packet.removesuffix("_")), overload), node.args, node.kwargs)
        zero = graph.call_function(_ATEN.sub.Tensor, (old, _add_detach(graph, old)))
        total = graph.call_function(_ATEN.add.Tensor, (_add_detach(graph, new), zero))
    node.target, node.args, node.kwargs = _ATEN.copy_.default, (old, total), {}


def _add_detach(graph: fx.Graph, node: Any) -> fx.Node:
    return graph.call_function(_ATEN.detach.default, (node,))
