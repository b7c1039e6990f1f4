"""Calls of a network under construction, and the errors for nodes that cannot be lowered."""

from collections.abc import Sequence
from typing import Any, Literal

import sympy
import torch
from torch import fx

from jaxensemble.errors import UnsupportedError
from jaxensemble.network.network import Arg, Call, Layer, Ref, Var, Variable
from torch_bridge.compat import free_unbacked_symbols, pytree
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.graph.nodes import source_line
from torch_bridge.graph.sizes.open_axes import BATCH
from torch_bridge.lowering.layouts.layout import Size
from torch_bridge.lowering.sizes import emit_size
from torch_bridge.lowering.tensors import ModuleState
from torch_bridge.lowering.values import Value, as_number, module_scope, size, sizes

DrawMode = Literal["training", "evaluation"]
"""The mode whose random draws the network returns with its outputs, so that PyTorch can have the same."""


class Calls:
    """The calls of a network, collected one ATen node after the other.

    - `node`: the node being lowered.
    - `state`: the tensors of the PyTorch module.
    - `draws`: the random numbers that the forward draws in the mode `draw_mode`, in order.
    - `sources`: the inputs, from which sizes can be read.
    - `size_sources`: the arrays from which the sizes of the node's arguments were read.
    - `open_names`: the names of open sizes.
    """

    def __init__(self, captured: TorchGraph, draw_mode: DrawMode | None = None):
        self.captured = captured
        self.draw_mode: DrawMode | None = draw_mode
        self.draws: list[Value] = []
        self.state = ModuleState(captured.model, captured.unchanged_counters)
        self.node: fx.Node
        self.layers: dict[str, Layer] = {}
        self.variables: dict[str, Variable] = {}
        self.calls: list[Call] = []
        self.sources: list[Value] = []
        self.size_sources: list[Value] = []
        self.open_names: dict[Any, str] = {}
        self.evaluation_only = captured.evaluation_only

    def emit(self, target: str, *args: Any, **kwargs: Any) -> Ref:
        """Appends a call and returns its result. Numbers that depend on the batch size become calls before it."""
        args, kwargs = pytree.tree_map(
            lambda arg: self.size(arg) if isinstance(arg, sympy.Expr) else arg, (args, kwargs)
        )
        out = Ref(f"v{len(self.calls)}")
        self.calls.append(Call(out.name, target, args, kwargs, self.scope))
        return out

    @property
    def scope(self) -> tuple[str, ...]:
        """The module calls around the node being lowered."""
        return module_scope(self.node)

    @property
    def module_path(self) -> str:
        """The path of the innermost module around the node being lowered; empty for the root."""
        return self.scope[-1].partition("@")[0] if self.scope else ""

    def unsupported(self, reason: str = "") -> UnsupportedError:
        """The error for a node that cannot be carried exactly, with operation, module, line and reason."""
        where = source_line(self.node)
        place = f"{self.node.target} in {self.module_path or 'the root module'}" + (f" ({where})" if where else "")
        return UnsupportedError(f"{place}: {reason}" if reason else place)

    def open_size_error(self, what: str, *sizes: Any) -> UnsupportedError:
        """The error for a node that depends on open sizes, or on sizes that values decide."""
        sizes = tuple(entry for entry in map(size, sizes) if not isinstance(entry, int | float))
        if any(map(free_unbacked_symbols, sizes)):
            return self.unsupported(f"{what} on values, and XLA needs fixed sizes; give it as a number")
        symbols = set().union(*(entry.free_symbols for entry in sizes))
        found = {name for entry, name in self.open_names.items() if name != BATCH and entry.free_symbols & symbols}
        if found:
            return self.unsupported(f"{what} on {' and '.join(sorted(found))}; leave it out of `dynamic`")
        return self.unsupported(f"{what} on the batch size; pass batch_axis=None to fix all shapes")

    def axis_name(self, entry: Any) -> str | None:
        """The name of an open size of an input; None for the batch size."""
        name = self.open_names.get(entry)
        return None if name == BATCH else name

    @property
    def result(self) -> Any:
        """The node's (first) result as PyTorch describes it."""
        val = self.node.meta["val"]
        return val[0] if isinstance(val, tuple | list) else val

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the node's result."""
        return self.result.dtype

    @property
    def result_shape(self) -> tuple[Size, ...]:
        """The shape of the node's result as PyTorch sees it."""
        return sizes(self.result.shape)

    def size(self, entry: Any, near: Sequence[tuple[Ref | Var, Sequence[Size]]] = ()) -> Arg:
        """A size as an argument: a number, or a call that reads the size from an array."""
        wanted = size(entry)
        if isinstance(wanted, int):
            return wanted
        known = [*near, *((value.expr, value.layout.stored_shape) for value in self.sources)]
        found = emit_size(self.emit, wanted, known)
        if found is None:
            raise self.open_size_error(f"the size {wanted} depends", wanted)
        return found

    def number(self, operand: Any) -> Arg:
        """An operand without dimensions as an argument: a number, or a call that computes it from the batch size."""
        return self.size(operand) if isinstance(operand, sympy.Expr | torch.SymInt) else as_number(operand)

    # Paths and random numbers

    def free_path(self, name: str) -> str:
        """A path within the module around the node that is still free."""
        module = self.module_path
        while module in self.layers or (module and self.state.is_empty(module)):
            module = module.rpartition(".")[0]
        base = ".".join(part for part in (module, name) if part)
        path, k = base, 1
        while path in self.variables or path in self.layers or self.state.has_path(path):
            path, k = f"{base}_{k}", k + 1
        return path

    def single_layer(self, name: str, type_: str) -> str:
        """The path of the only layer of this type within the module around the node. A missing layer is added."""
        module = self.module_path
        while module in self.layers:
            module = module.rpartition(".")[0]
        path = ".".join(part for part in (module, name) if part)
        while not (path in self.layers and self.layers[path].type == type_) and self._is_taken(path):
            path += "_"
        self.layers[path] = Layer(path, type_)
        return path

    def _is_taken(self, path: str) -> bool:
        """Returns whether a path already belongs to PyTorch's module, a layer or a variable."""
        # Every module has the attribute `training`.
        own = path.rpartition(".")[2] != "training" and self.state.has_path(path)
        return own or path in self.layers or path in self.variables

    def random_key(self) -> Ref:
        """The next random key of the module around the node."""
        return self.emit(f"layer:{self.single_layer('keys', 'layers.Keys')}")

    def note_draw(self, value: Value) -> None:
        """Notes a value as the draw of the node, if the node runs in the mode whose draws are wanted."""
        if self.draw_mode is not None and self.node.meta.get("mode", self.draw_mode) == self.draw_mode:
            self.draws.append(value)

    def refuse_hidden_draws(self, mode: str) -> None:
        """Checks that a layer does not draw numbers of its own in the mode whose draws are wanted.

        **Raises:** `UnsupportedError` if it does.
        """
        if self.draw_mode is not None and (mode == "always" or (mode == "by_mode" and self.draw_mode == "training")):
            raise self.unsupported("the random numbers that it draws stay within a layer")
