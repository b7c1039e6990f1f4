"""Uses of PyTorch that have no public way, or that differ from version to version.

Tried with PyTorch 2.11.0 (Python 3.12), 2.13.0 (3.11) and 2.15.0 (3.13).

Differences are detected from what PyTorch has or computes, never from its version.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, _prims_common, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._decomp import core_aten_decompositions, decomposition_table, decompositions
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.node import has_side_effect, map_aggregate
from torch.nn.modules import transformer
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "REMOVED",
    "TorchDispatchMode",
    "count_compiled_graphs",
    "current_graph",
    "decomposition_table",
    "decompositions_below_autograd",
    "fix_complex_means",
    "fix_lstm_states",
    "free_unbacked_symbols",
    "has_cumulative_average",
    "has_side_effect",
    "is_functorch_wrapped_tensor",
    "is_mutating",
    "linear_cross_entropy",
    "map_aggregate",
    "pytree",
    "schema_of",
    "skip_mask_inspection",
    "ties_share_gradients",
    "trace_graph",
    "watch_guards",
]

REMOVED = {"aten.cholesky.default": "2.15"}
"""Operations that have a rule and that later versions lack, each with such a version. All others must exist."""

_LINEAR_CROSS_ENTROPY = "torch.nn.modules.linear_cross_entropy"
linear_cross_entropy: Any = (
    importlib.import_module(_LINEAR_CROSS_ENTROPY) if importlib.util.find_spec(_LINEAR_CROSS_ENTROPY) else None
)
"""The module behind `nn.LinearCrossEntropyLoss`, or None before it came (2.13)."""


def schema_of(operation: Any) -> Any:
    """Returns the schema of an ATen operation; None for any other function."""
    return getattr(operation, "_schema", None)


def is_mutating(node: fx.Node) -> bool:
    """Returns whether a node writes into one of its arguments."""
    return getattr(schema_of(node.target), "is_mutable", False)


def has_cumulative_average(module: nn.Module) -> bool:
    """Returns whether a module is a normalisation with `momentum=None`."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None


@contextlib.contextmanager
def skip_mask_inspection() -> Iterator[None]:
    """Keeps transformer layers from comparing masks with a causal mask when `is_causal` is not given.

    The results are the same, and `torch.export` cannot follow decisions by values.
    """
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextlib.contextmanager
def fix_complex_means() -> Iterator[None]:
    """Keeps the batch size open where complex numbers are divided by it.

    The exporter would turn the size into a fixed complex number.
    """
    before = _prims_common.dtype_to_type_ctor

    def constructor(dtype: torch.dtype) -> Callable[[Any], Any]:
        make: Any = before(dtype)
        of_symbols = torch.sym_float if dtype.is_complex else make
        return lambda x: of_symbols(x) if isinstance(x, torch.SymInt | torch.SymFloat) else make(x)

    _prims_common.dtype_to_type_ctor = constructor
    try:
        yield
    finally:
        _prims_common.dtype_to_type_ctor = before


@functools.cache
def ties_share_gradients() -> bool:
    """Returns whether `clamp`, `fmax` and `fmin` share the gradient between equal arguments, as PyTorch 2.15 does.

    Until 2.13, the first argument has the whole gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pair = [torch.zeros(1, device="cpu", requires_grad=True) for _ in range(2)]
        first, _ = torch.autograd.grad(torch.fmax(*pair).sum(), pair)
        return first.item() == 0.5


@contextlib.contextmanager
def fix_lstm_states() -> Iterator[None]:
    """Removes the extra axis that the exporter of PyTorch 2.11 gives the states of `nn.LSTM`."""
    before = decompositions.one_layer_lstm
    if _has_wrong_states(before):
        decompositions.one_layer_lstm = functools.partial(_one_layer_lstm, before)
    try:
        yield
    finally:
        decompositions.one_layer_lstm = before


def _one_layer_lstm(layer: Callable[..., Any], x: Tensor, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer, and gives its states the shapes of the initial states."""
    y, states = layer(x, hidden, *args, **kwargs)
    return y, tuple(state.reshape(start.shape) for state, start in zip(states, hidden, strict=True))


@functools.cache
def _has_wrong_states(layer: Callable[..., Any]) -> bool:
    x, state, weight = torch.zeros(1, 2, 1), torch.zeros(2, 1), torch.zeros(4, 1)
    _, states = layer(x, (state, state), (weight, weight), False)
    return states[0].ndim != state.ndim


def trace_graph(function: Callable[..., Any], decompositions: Mapping[Any, Any], *args: Any) -> fx.GraphModule:
    """Returns the operations of a function on tensors, below autograd and all transforms of `torch.func`."""
    return make_fx(function, dict(decompositions), record_stack_traces=True)(*args)


def decompositions_below_autograd() -> dict[Any, Callable[..., Any]]:
    """Returns PyTorch's decompositions of operations, including backward functions."""
    needed = ("_backward", "native_")
    backward = {key: way for key, way in decomposition_table.items() if any(part in str(key) for part in needed)}
    return {**backward, **core_aten_decompositions()}


def current_graph() -> fx.Graph:
    """Returns the graph that `trace_graph` is making."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


@contextlib.contextmanager
def watch_guards(record: Callable[[Any], None], is_needless: Callable[[Any], bool]) -> Iterator[None]:
    """Calls `record` with every condition on open sizes that the exporter makes, and removes needless ones."""
    log_guard, produce_guards = ShapeEnv._log_guard, ShapeEnv.produce_guards

    def log_and_record(self: ShapeEnv, prefix: str, guard: Any, *args: Any, **kwargs: Any) -> None:
        record(guard)
        log_guard(self, prefix, guard, *args, **kwargs)

    def produce_needed(self: ShapeEnv, *args: Any, **kwargs: Any) -> list[str]:
        self.guards = [guard for guard in self.guards if not is_needless(guard.expr)]
        return produce_guards(self, *args, **kwargs)

    ShapeEnv._log_guard, ShapeEnv.produce_guards = log_and_record, produce_needed  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShapeEnv._log_guard, ShapeEnv.produce_guards = log_guard, produce_guards


def count_compiled_graphs() -> int:
    """Returns the number of graphs that `torch.compile` has compiled in this process."""
    from torch._dynamo.utils import counters  # takes seconds to import

    return counters["stats"]["unique_graphs"]
