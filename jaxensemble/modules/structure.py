"""Structures of Flax modules, without their arrays: classes, static attributes, and the places of variables.

A [`Structure`][] is a module's `nnx.GraphDef`, read once. Flax compares graph definitions attribute by attribute with
`==`, so that two `functools.partial` objects or two lambdas of the same line differ. Here these are equal if they do
the same, so that two instances of one network have one structure, and one compilation.
"""

import dataclasses
import functools
import types
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxensemble.compat import LeafAttr, NodeAttr, NodeDef, NodeRef, Tracer, VariableDef
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.layers.mode import Training
from jaxensemble.modules.portable import make_portable

Path = tuple[str, ...]

STATISTICS = "use_running_average"
MODE_FLAGS = ("deterministic", STATISTICS)  # the flags that `nnx.Module.train()` and `.eval()` set


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a module: its path (the first of several paths) and the class of its variable."""

    path: Path
    type: type

    @property
    def name(self) -> str:
        """The path with dots: `conv1.kernel`."""
        return ".".join(self.path)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A static attribute."""

    value: Any


@dataclasses.dataclass(eq=False)
class Node:
    """A module, or a container of modules. A shared module is one node: nodes form a graph, which may have cycles."""

    path: Path
    type: type
    children: dict[str, "Node | Leaf | Fixed"]


class _Nothing:
    """The value of an attribute that a module lacks, and another module has."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()
_KNOWN: "weakref.WeakValueDictionary[Any, Structure]" = weakref.WeakValueDictionary()


@jax.tree_util.register_static
class Structure(nnx.GraphDef):
    """An `nnx.GraphDef` (`nnx.merge` takes it as one) with the equality described above, and a hash, both of them fast.

    >>> first, second = (Structure.of(nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(seed)))) for seed in (0, 1))
    >>> first == second, [leaf.name for leaf in first.leaves]
    (True, ['bias', 'kernel'])
    """

    __slots__ = ("__weakref__", "_hash", "_key", "entries", "leaves", "modes", "root", "streams", "ties")

    root: Node
    leaves: tuple[Leaf, ...]  # in the order of the graph definition's leaves
    streams: tuple[Leaf, ...]  # the leaves that are random state: keys, and counts of draws
    ties: dict[Path, Leaf]  # further attributes that hold a variable already seen, by path
    entries: dict[Path, tuple[Any, Any]]  # path -> (compared value, shown value)
    modes: dict[Path, Any]  # the training or evaluation flags of all submodules, by path
    _key: Any
    _hash: int

    @classmethod
    def of(cls, graphdef: Any) -> "Structure":
        """The structure of a graph definition; equal structures are one object as long as one of them is in use.

        **Raises:** `UnsupportedError` for array references, and for names with dots, which paths cannot express.
        """
        if isinstance(graphdef, cls):
            return graphdef
        if not isinstance(graphdef, nnx.GraphDef):
            raise InputError(
                "`graphdef` must be the graph definition of a module, as nnx.graphdef(module) gives it; got "
                f"{type(graphdef).__name__}. Ensemble.from_modules(modules) makes an ensemble of modules and their "
                "weights."
            )
        reader = _Reader(graphdef)
        root = reader.read(())
        if not isinstance(root, Node):
            raise InputError(f"`graphdef` must be that of a flax.nnx.Module; got {graphdef!r}")
        key = tuple((path, frozen) for path, (frozen, _) in reader.entries.items())
        known = _KNOWN.get(key)
        if known is not None:
            return known
        self = cls(graphdef.nodes, graphdef.attributes, graphdef.num_leaves)
        streams = tuple(leaf for leaf in reader.leaves if issubclass(leaf.type, nnx.RngState))
        read = {"root": root, "leaves": tuple(reader.leaves), "streams": streams, "ties": reader.ties}
        modes = {path: shown for path, (_, shown) in reader.entries.items() if path and path[-1] in MODE_FLAGS}
        read |= {"entries": reader.entries, "modes": modes, "_key": key, "_hash": hash(key)}
        for name, value in read.items():
            object.__setattr__(self, name, value)  # frozen, like nnx.GraphDef
        return _KNOWN.setdefault(key, self)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Structure):
            return NotImplemented
        return self._hash == other._hash and self._key == other._key

    def __copy__(self) -> "Structure":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Structure":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = [
            dataclasses.replace(node, type=make_portable(node.type), metadata=make_portable(node.metadata))
            if isinstance(node, NodeDef)
            else node
            for node in self.nodes
        ]
        attributes = [
            (
                key,
                kind
                if isinstance(kind, NodeAttr | LeafAttr)
                else dataclasses.replace(kind, value=make_portable(kind.value)),
            )
            for key, kind in self.attributes
        ]
        return _restore_structure, (nodes, attributes, self.num_leaves)

    def __repr__(self) -> str:
        return f"Structure({self.root.type.__name__}, {len(self.leaves)} leaves)"

    def training_layers(self, flags: Collection[str] = MODE_FLAGS) -> tuple[str, ...]:
        """The paths of the layers that one of these flags sets to training mode, if the mode makes a difference.

        A module that reads its mode itself (`if self.training`) is also such a layer; the root is called `itself`.
        """
        return tuple(
            ".".join(path[: -2 if self.entries[path[:-1]][1] is Training else -1]) or "itself"
            for path, evaluating in self.modes.items()
            if path[-1] in flags
            and evaluating is False
            and not (path[-1] != STATISTICS and self._drops_nothing(path[:-1]))
        )

    def _drops_nothing(self, path: Path) -> bool:
        """Returns whether the layer at a path is or contains a dropout with a rate of 0."""
        return any(self.entries.get((*path, name), (None, None))[1] == 0 for name in ("rate", "dropout_rate"))


def _restore_structure(nodes: Any, attributes: Any, num_leaves: int) -> Structure:
    """Restores a pickled structure, by reading its graph definition again."""
    return Structure.of(nnx.GraphDef(nodes, attributes, num_leaves))


def structure_differences(a: nnx.GraphDef, b: nnx.GraphDef) -> list[tuple[str, Any, Any]]:
    """Every place where two modules differ, except in the values of arrays: (path, value in a, value in b).

    The path of the module itself is `""`. Where classes differ, no place below is listed. At a place that only one
    module has, the other value is `NOTHING`.

    >>> a, b = (nnx.graphdef(nnx.LayerNorm(3, epsilon=epsilon, rngs=nnx.Rngs(0))) for epsilon in (1e-5, 1e-6))
    >>> structure_differences(a, b)
    [('epsilon', 1e-05, 1e-06)]
    """
    left, right = Structure.of(a), Structure.of(b)
    if left == right:
        return []
    found: dict[Path, tuple[Any, Any]] = {}
    absent = (NOTHING, NOTHING)
    for path in sorted(left.entries.keys() | right.entries.keys()):  # a container sorts before its content
        (frozen_a, shown_a), (frozen_b, shown_b) = left.entries.get(path, absent), right.entries.get(path, absent)
        if frozen_a != frozen_b and not any(path[:length] in found for length in range(len(path))):
            found[path] = (shown_a, shown_b)
    return [(".".join(path), *shown) for path, shown in found.items()]


class _Reader:
    """Walks a graph definition in the order in which Flax wrote it, which is also the order of its leaves."""

    def __init__(self, graphdef: nnx.GraphDef) -> None:
        self.nodes = iter(graphdef.nodes)
        self.attributes = iter(graphdef.attributes)
        self.seen: dict[int, Node | Leaf] = {}
        self.leaves: list[Leaf] = []
        self.ties: dict[Path, Leaf] = {}
        self.entries: dict[Path, tuple[Any, Any]] = {}

    def read(self, path: Path) -> Node | Leaf | Fixed:
        match next(self.nodes):
            case NodeRef(index=index):
                return self._shared(path, self.seen[index])
            case VariableDef(type=type_, index=index, metadata=metadata, array_refdef=None):
                self.seen[index] = leaf = self._leaf(path, type_)
                self.entries[path] = (("variable", type_, freeze(metadata)), _Variable(type_, metadata))
                return leaf
            case NodeDef(type=types.NoneType):
                return self._fixed(path, None)
            case NodeDef(type=type_, index=index, num_attributes=count, metadata=metadata):
                node = Node(path, type_, {})
                self.entries[path] = (("node", type_, freeze(metadata)), type_)
                if index is not None:
                    self.seen[index] = node
                self._read_children(node, count)
                return node
            case other:
                raise UnsupportedError(f"`{'.'.join(path)}` is {type(other).__name__}: array references are not taken")

    def _read_children(self, node: Node, count: int) -> None:
        for _ in range(count):
            key, attribute = next(self.attributes)
            name = str(key)
            if "." in name:  # torch.nn.ModuleDict refuses dots for the same reason
                raise UnsupportedError(f"{node.type.__name__} has an attribute {name!r}; names cannot contain dots")
            path = (*node.path, name)
            if isinstance(attribute, NodeAttr):
                child = self.read(path)
            elif isinstance(attribute, LeafAttr):
                child = self._leaf(path, jax.Array)
                self.entries[path] = (("array",), jax.Array)
            elif name.startswith("_pytree__"):  # Flax's own record of which attributes hold arrays
                continue
            else:
                child = self._fixed(path, attribute.value)
            if name.startswith("_pytree__"):
                del self.entries[path]
            else:
                node.children[name] = child

    def _leaf(self, path: Path, type_: type) -> Leaf:
        leaf = Leaf(path, type_)
        self.leaves.append(leaf)
        return leaf

    def _fixed(self, path: Path, value: Any) -> Fixed:
        self.entries[path] = (freeze(value), value)
        return Fixed(value)

    def _shared(self, path: Path, target: Node | Leaf) -> Node | Leaf:
        if isinstance(target, Leaf):
            self.ties[path] = target
        self.entries[path] = (("shared", target.path), _Shared(".".join(target.path)))
        return target


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Value shown for an attribute that holds the same object as another attribute."""

    name: str

    def __repr__(self) -> str:
        return f"the same object as `{self.name}`"


@dataclasses.dataclass(frozen=True, eq=False)
class _Variable:
    """Value shown for a variable: its class, and its metadata except Flax's defaults."""

    type: type
    metadata: Mapping[str, Any]

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.metadata.items() if k not in ("hijax", "ref", "eager_sharding")}
        return f"{self.type.__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


class _Unhashable:
    """A value that cannot be hashed, compared with `==` if the comparison gives a plain truth value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Unhashable) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (self.value == other.value) is True


def freeze(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Converts a static attribute to a hashable value: two are equal if and only if both attributes do the same.

    Partial objects are compared by function and arguments; functions by code, defaults and the values that they close
    over; containers item by item; all other values by type and `==`.
    """
    if id(value) in inside:
        return ("recursion", len(inside) - inside.index(id(value)))
    inner = functools.partial(freeze, inside=(*inside, id(value)))
    match value:
        case functools.partial():
            return (type(value), inner(value.func), inner(value.args), inner(value.keywords))
        case types.FunctionType():
            parts = (value.__defaults__, value.__kwdefaults__, tuple(_closure_values(value)))
            return (types.FunctionType, value.__code__, id(value.__globals__), *map(inner, parts))
        case Mapping():
            return (type(value), frozenset((inner(key), inner(item)) for key, item in value.items()))
        case list() | tuple():
            return (type(value), *map(inner, value))
        case set() | frozenset():
            return (type(value), frozenset(map(inner, value)))
        case np.ndarray():
            return (np.ndarray, value.shape, value.dtype, value.tobytes())
        case jax.Array() if not isinstance(value, Tracer):
            return (jax.Array, *freeze(np.asarray(value)))
        case _ if _is_hashable(value):
            return (type(value), value)
    return _Unhashable(value)


def _closure_values(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        yield cell.cell_contents if cell != types.CellType() else NOTHING


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
