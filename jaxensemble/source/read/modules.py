"""The tree of modules of a network."""

import dataclasses
from collections.abc import Iterator

from jaxensemble.errors import InputError
from jaxensemble.network.network import Layer, Network, Variable
from jaxensemble.source.names import check_child

Path = tuple[str, ...]

MOST_CHILDREN = 10_000
"""The most children that a numbered module may have: its list gets a slot for each child."""


@dataclasses.dataclass
class Module:
    """Node of the module tree. `layer` is set if the node is a layer, which has no children.

    `is_filler` marks a node that `fill_gaps` has put in for a child that the network does not name.
    """

    path: Path
    class_name: str
    kind: str
    layer: Layer | None = None
    variables: dict[str, Variable] = dataclasses.field(default_factory=dict)
    children: dict[str, "Module"] = dataclasses.field(default_factory=dict)
    is_filler: bool = False

    def descendant(self, path: Path) -> "Module":
        """Returns the module at a path beneath this module."""
        module = self
        for name in path:
            module = module.children[name]
        return module

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def has_content(self) -> bool:
        """Returns whether a layer or variable is in this module or beneath, so that the module has to exist."""
        return bool(self.layer or self.variables) or any(child.has_content for child in self.children.values())

    @property
    def is_numbered(self) -> bool:
        """Returns whether the children of the module are in a list."""
        numbers = [name for name in self.children if name.isascii() and name.isdigit() and str(int(name)) == name]
        return self.kind == "sequence" and not self.variables and len(numbers) == len(self.children)

    @property
    def has_no_class(self) -> bool:
        """Returns whether the class is PyTorch's own `nn.Sequential`, or named after the module's attribute."""
        return self.class_name in ("", "Sequential", self.name.title().replace("_", ""))

    def walk(self) -> Iterator["Module"]:
        """Yields the module and all modules beneath it, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def split_path(path: str) -> Path:
    """Returns the parts of a dotted path; the root has none."""
    return tuple(path.split(".")) if path else ()


def module_tree(network: Network) -> Module:
    """Returns the modules of a network, from its layers, its variables and the scopes of its calls.

    **Raises:** `InputError` for a module on the way that is not in `network.modules`, and for a name that Flax cannot
    hold.
    """
    layers = {layer.path for layer in network.layers}
    root = Module((), network.name, network.modules.get("", ("", "module"))[1])
    for layer in network.layers:
        _node(root, split_path(layer.path), network, layers).layer = layer
    for variable in network.variables:
        *parent, name = split_path(variable.path)
        check_child(name, variable.path)
        _node(root, tuple(parent), network, layers).variables[name] = variable
    for scope in dict.fromkeys(call.scope for call in network.calls):
        for path in map(scope_path, scope):
            if not is_inside_layer(root, path):
                _node(root, path, network, layers)
    for module in root.walk():
        if module.is_numbered and module.children and max(map(int, module.children)) >= MOST_CHILDREN:
            raise InputError(
                f"{'.'.join(module.path)!r} numbers its children too high; expected numbers below {MOST_CHILDREN}"
            )
    return root


def _node(root: Module, path: Path, network: Network, layers: set[str]) -> Module:
    node = root
    for depth, name in enumerate(path):
        if name not in node.children:
            full = ".".join(path[: depth + 1])
            check_child(name, full)
            if full not in network.modules and full not in layers:
                raise InputError(f"`modules` must name every module on the way to a layer or call; {full!r} is missing")
            class_name, kind = network.modules.get(full, ("", "module"))
            node.children[name] = Module(path[: depth + 1], class_name, kind)
        node = node.children[name]
    return node


def is_inside_layer(root: Module, path: Path) -> bool:
    """Returns whether a path leads to a layer, or into a layer."""
    node: Module | None = root
    for name in path:
        node = node.children.get(name) if node else None
        if node and node.layer:
            return True
    return False


def module_levels(root: Module) -> list[tuple[Module, int]]:
    """Returns every module except the root, with a level above its children's, equal for all modules of one class.

    No level fits classes that hold one another, or themselves. The level of every module is then its height.
    """
    modules = [module for module in root.walk() if module.path]
    levels: dict[Path, int] = {}
    for module in reversed(modules):  # children before parents
        levels[module.path] = 1 + max((levels[child.path] for child in module.children.values()), default=-1)
    heights = dict(levels)
    for _ in range(len(modules) + 1):
        before = dict(levels)
        highest: dict[str, int] = {}
        for module in reversed(modules):
            lowest = 1 + max((levels[child.path] for child in module.children.values()), default=-1)
            levels[module.path] = max(levels[module.path], lowest)
            if module.kind == "module" and not module.layer:
                highest[module.class_name] = max(highest.get(module.class_name, 0), levels[module.path])
        for module in modules:
            if module.kind == "module" and not module.layer:
                levels[module.path] = highest[module.class_name]
        if levels == before:
            return [(module, levels[module.path]) for module in modules]
    return [(module, heights[module.path]) for module in modules]


def scope_path(entry: str) -> Path:
    """Returns the path of the module that an entry of a scope names, without the count of its call."""
    return split_path(entry.partition("@")[0])
