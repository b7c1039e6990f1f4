"""The tensors of a module as rules see them: their holders, names and kinds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

COUNTER = "num_batches_tracked"


class ModuleState:
    """The tensors of a module and its submodules by key. Tied tensors have several keys.

    `uncounted` are counters of batches that no layer increments.
    """

    def __init__(self, model: nn.Module, unchanged_counters: Iterable[str] = ()):
        self.model = model
        self.tensors: dict[str, Tensor] = {}
        self.parameters: set[str] = set()
        self.non_persistent: set[str] = set()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        by_identity: dict[int, list[str]] = defaultdict(list)
        for path, module in self.modules.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                key = f"{path}.{name}" if path else name
                self.tensors[key] = tensor
                by_identity[id(tensor)].append(key)
                if name in module._parameters:
                    self.parameters.add(key)
                if name in module._non_persistent_buffers_set:
                    self.non_persistent.add(key)
        self.names = {key: tuple(keys) for keys in by_identity.values() for key in keys}
        self.unchanged_counters = {name for key in unchanged_counters for name in self.names[key]}

    def kind(self, key: str) -> Literal["param", "buffer"]:
        """The kind of a tensor: a parameter wherever one of its names is a parameter, else a buffer."""
        return "param" if any(name in self.parameters for name in self.names[key]) else "buffer"

    def has_path(self, path: str) -> bool:
        """Returns whether a submodule, or an attribute of one, has this path."""
        parent, _, leaf = path.rpartition(".")
        return path in self.modules or (parent in self.modules and hasattr(self.modules[parent], leaf))

    def is_empty(self, path: str) -> bool:
        """Returns whether a module holds neither tensors nor submodules."""
        module = self.modules[path]
        return not (any(True for _ in module.children()) or self.own_keys(path))

    def own_keys(self, path: str) -> set[str]:
        """The keys of the tensors that a module holds itself, except counters of batches that a layer increments."""
        module = self.modules[path]
        names = [name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None]
        keys = {f"{path}.{name}" if path else name for name in names}
        return {key for key in keys if key.rpartition(".")[2] != COUNTER or key in self.unchanged_counters}

    def holders(self, keys: Sequence[str]) -> list[str]:
        """The modules that hold all of these tensors themselves, and perhaps others."""
        homes = [{name.rpartition(".")[0] for name in self.names[key]} for key in keys]
        return sorted(set.intersection(*homes))

    def has_only(self, path: str, count: int) -> bool:
        """Returns whether a module within the model holds this many tensors and nothing else, not even submodules."""
        return bool(path) and not any(True for _ in self.modules[path].children()) and len(self.own_keys(path)) == count
