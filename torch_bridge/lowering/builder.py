"""The builder, from which rules get calls, arrangements and layers for arrays."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from jaxensemble.network.network import Arg, Layer
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.lowering.arrangements import Arrangements
from torch_bridge.lowering.calls import DrawMode
from torch_bridge.lowering.layouts.layout import Layout
from torch_bridge.lowering.values import Storage, Value

Wanted = tuple[Value | None, Layout | None]
"""A leaf of a layer: the weight that fills it, and the layout in which it is stored (None: PyTorch's)."""


class Builder(Arrangements):
    """Collects the layers, variables and calls of a network, one ATen node after the other."""

    def __init__(self, captured: TorchGraph, draw_mode: DrawMode | None = None):
        super().__init__(captured, draw_mode)
        self._layer_weights: dict[str, dict[str, str | None]] = {}

    def claim(
        self,
        type_: str,
        options: Mapping[str, Arg],
        leaves: Mapping[str, Wanted],
        flipped: tuple[int, ...] = (),
        within: str | None = None,
    ) -> str | None:
        """Makes a layer hold these weights.

        **Arguments:**

        - `flipped`: dimensions of the kernel that are stored reversed.
        - `within`: the name for a layer inside a module that holds more than these weights, or does more than the
          layer.

        **Returns:** the path of the layer, or None where the weights are not all that some module holds.
        """
        weights = {leaf: weight for leaf, (weight, _) in leaves.items() if weight is not None}
        keys = {leaf: weight.key for leaf, weight in weights.items()}
        if not keys or None in keys.values() or not all(map(self._is_fitting, weights, weights.values())):
            return None
        if flipped and not self._is_used_once(keys["kernel"]):
            return None
        held = [key for key in keys.values() if key is not None]
        holders = self.holders(held)
        inner = [] if within is None else [self._inner_path(path, within, keys) for path in holders]
        for owner in [*(path for path in holders if self.state.has_only(path, len(held))), *inner]:
            layer = Layer(owner, type_, dict(options))
            if owner in self.layers:
                if (
                    self.layers[owner] == layer
                    and self._layer_weights[owner] == keys
                    and self._is_stored_alike(leaves, flipped)
                ):
                    return owner
            elif not any(key in self.storage for key in keys.values()) and not self._has_constants(owner):
                self.layers[owner], self._layer_weights[owner] = layer, keys
                for leaf, weight in weights.items():
                    self.store(
                        weight,
                        f"{owner}.{leaf}",
                        leaves[leaf][1] or _plain_storage(weight),
                        flipped if leaf == "kernel" else (),
                    )
                return owner
        return None

    def _has_constants(self, module: str) -> bool:
        """Returns whether a module contains a constant or a layer, for which a layer has no place."""
        return any(path.startswith(f"{module}.") for path in (*self.constants, *self.layers))

    def holders(self, keys: Sequence[str]) -> list[str]:
        """The modules that hold all of these tensors themselves, the one around the node first."""
        return sorted(self.state.holders(keys), key=lambda path: path != self.module_path)

    def _inner_path(self, module: str, name: str, keys: Mapping[str, str | None]) -> str:
        """The path of the layer with these weights inside a module."""
        path = f"{module}.{name}" if module else name
        while self._layer_weights.get(path) != keys and self._is_taken(path):
            path += "_"
        return path

    def _is_fitting(self, leaf: str, weight: Value) -> bool:
        """Returns whether a weight is trained in PyTorch exactly if the leaf is trained in Flax."""
        return self.state.kind(weight.key or "") == ("buffer" if leaf in ("mean", "var") else "param")

    def _is_used_once(self, key: str | None) -> bool:
        """Returns whether all uses of a weight are the same operation with the same options."""
        names = [name for name, held in self.captured.weights.items() if held == key]
        users = [user for node in self.captured.graph.nodes if node.name in names for user in node.users]
        return len({(user.target, str(user.args[1:])) for user in users}) == 1

    def _is_stored_alike(self, leaves: Mapping[str, Wanted], flipped: tuple[int, ...]) -> bool:
        """Returns whether the weights are stored as this call needs them: an earlier call has settled the layout."""
        for leaf, (weight, layout) in leaves.items():
            if weight is not None and weight.key is not None:
                held = self.storage[weight.key]
                wanted = Storage("", layout or _plain_storage(weight), flipped if leaf == "kernel" else ())
                if held.rearrangement != wanted.rearrangement:
                    return False
        return True

    def stateless_layer(self, type_: str, options: Mapping[str, Arg], name: str) -> str:
        """The path of a layer without weights: the module around the node if it is otherwise empty, else inside it."""
        module = self.module_path
        layer = Layer(module, type_, dict(options))
        free = module and self.state.is_empty(module) and self.layers.get(module, layer) == layer
        free = free and not any(path.startswith(f"{module}.") for path in self.layers)
        path = module if free else self.free_path(name)
        self.layers[path] = dataclasses.replace(layer, path=path)
        return path

    def is_statistic(self, key: str) -> bool:
        """Returns whether a buffer holds running statistics of one of PyTorch's own normalisations."""
        path, _, name = key.rpartition(".")
        return name.startswith("running_") and isinstance(self.state.modules[path], nn.modules.batchnorm._NormBase)


def _plain_storage(weight: Value) -> Layout:
    """PyTorch's layout of a weight."""
    return Layout(weight.layout.dims, weight.layout.dims)
