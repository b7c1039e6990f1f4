"""Tensors that modules keep outside of parameters and buffers: found, restored, and removed after every call."""

import contextlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge.graph.caches.functions import clear_function_caches, is_cached

PLAIN = (bool, int, float, str, type(None), tuple, torch.Size, torch.dtype, torch.device)
"""Types of the values that a cache is checked by: a length, a dtype, a device."""

_OWN = vars(nn.Module()).keys()
_CONTAINERS = (dict, list, set)
_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)

ABSENT: Any = type("_Absent", (), {"__repr__": lambda self: "nothing"})()
"""The value of an attribute that does not exist."""

Place = tuple[str, str]
"""The path of a module, or of an object in a module's attribute, and the name of an attribute."""


def cache_owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the paths and owners of possible caches: modules, objects in their attributes, and their classes."""
    kinds: dict[type, None] = {}
    objects: set[int] = set()
    for path, module in model.named_modules():
        yield path, module
        kinds.update(dict.fromkeys(type(module).__mro__))
        for name, value in vars(module).items():
            if name not in _OWN and hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
                if id(value) not in objects:
                    objects.add(id(value))
                    yield f"{path}.{name}".lstrip("."), value
    for kind in kinds:
        if not kind.__module__.startswith("torch.") and any(isinstance(x, _CONTAINERS) for x in vars(kind).values()):
            yield kind.__qualname__, kind


def cache_attributes(owner: Any) -> dict[str, Any]:
    """Returns the attributes that may keep tensors, with non-persistent buffers. Of a class, only its containers."""
    if isinstance(owner, type):
        return {name: value for name, value in vars(owner).items() if isinstance(value, _CONTAINERS)}
    if not isinstance(owner, nn.Module):
        return dict(vars(owner))
    computed = {
        getattr(hook, "name", None) for hook in owner._forward_pre_hooks.values()
    }  # for example, by legacy weight norm
    if isinstance(owner, nn.RNNBase):
        computed |= {"_flat_weights", "_flat_weight_refs"}
    own = {name: value for name, value in vars(owner).items() if name not in _OWN | computed}
    return own | {name: owner._buffers[name] for name in owner._non_persistent_buffers_set if name in owner._buffers}


def is_buffer(owner: Any, name: str) -> bool:
    """Returns whether an attribute is, or is to become again, a buffer that PyTorch does not save."""
    return name in getattr(owner, "_non_persistent_buffers_set", ()) and name not in vars(owner)


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute or a non-persistent buffer, without the module's `__setattr__`."""
    held = owner._buffers if is_buffer(owner, name) else vars(owner)
    if value is ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


def indexed_leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values in nested dicts, lists and tuples, with the indices that lead to them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from indexed_leaves(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for k, item in enumerate(value):
            yield from indexed_leaves(item, f"{where}[{k}]")
    else:
        yield where, value


def has_tensor_leaf(value: Any) -> bool:
    """Returns whether a value is a tensor, or a dict, list or tuple that holds a tensor."""
    return any(isinstance(leaf, Tensor) for _, leaf in indexed_leaves(value))


class Snapshot:
    """A copy of everything that a model keeps outside of its parameters and buffers now."""

    def __init__(self, model: nn.Module):
        self._owners = list(cache_owners(model))
        self._before = [cache_attributes(owner) for _, owner in self._owners]
        self._contents: dict[int, tuple[Any, Any]] = {}  # every container by identity, and a copy of it
        for held in self._before:
            _copy(tuple(held.values()), self._contents)
        self._hooks = [(hooks, list(hooks)) for hooks in _hooks_in(model)]

    def changed(self) -> set[Place]:
        """Returns the attributes whose tensors have changed, and all other changed attributes of the same owners."""
        found: set[Place] = set()
        for (path, owner), before in zip(self._owners, self._before, strict=True):
            now = cache_attributes(owner)
            pairs = {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in {**before, **now}}
            names = [name for name, pair in pairs.items() if self._differ(*pair, is_buffer(owner, name))]
            if any(has_tensor_leaf(value) for name in names for value in pairs[name]):
                found |= {(path, name) for name in names}
        return found

    def _differ(self, before: Any, now: Any, is_buffer: bool) -> bool:
        if is_buffer and isinstance(before, Tensor) and isinstance(now, Tensor):
            return before.shape != now.shape  # training mode changes the values of buffers
        if before is not now:
            return has_tensor_leaf(before) or has_tensor_leaf(now) or not isinstance(now, PLAIN) or bool(before != now)
        held = _copy(now, {})
        return any(not _is_same(kept, self._contents.get(key, (None, ()))[1]) for key, (_, kept) in held.items())

    def restore(self, places: set[Place] | None = None) -> None:
        """Restores what the model kept then, everywhere or in some places, in the very same containers."""
        for (path, owner), before in zip(self._owners, self._before, strict=True):
            now = cache_attributes(owner)
            for name in {**before, **now}:
                if places is None or (path, name) in places:
                    for key, (container, held) in _copy(before.get(name), {}).items():
                        _refill(container, held, self._contents.get(key, (None, held))[1])
                    if before.get(name, ABSENT) is not now.get(name, ABSENT):
                        set_attribute(owner, name, before.get(name, ABSENT))
        for hooks, known in self._hooks if places is None else ():  # an attribute may say that a hook exists
            for key in hooks.keys() - set(known):
                del hooks[key]


def _hooks_in(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks


def _copy(value: Any, found: dict[int, tuple[Any, Any]]) -> dict[int, tuple[Any, Any]]:
    """Returns every dict, list, set and tuple in a value by identity: itself, and a copy of its items."""
    if isinstance(value, (*_CONTAINERS, tuple)) and id(value) not in found:
        found[id(value)] = value, value if isinstance(value, tuple) else value.copy()
        for item in value.values() if isinstance(value, dict) else value:
            _copy(item, found)
    return found


def _is_same(a: Any, b: Any) -> bool:
    """Returns whether two containers hold the very same objects."""
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return {*map(id, a)} == {*map(id, b)}
    if isinstance(a, dict):
        return all(key in b and value is b[key] for key, value in a.items())
    return all(x is y for x, y in zip(a, b, strict=True))


def _refill(container: Any, held: Any, before: Any) -> None:
    if not isinstance(container, tuple) and not _is_same(held, before):
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(before)


def has_cached_methods(model: nn.Module) -> bool:
    """Returns whether a class of the model's modules has methods under `functools.lru_cache`, which keep `self`."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return any(is_cached(member) for kind in kinds for member in vars(kind).values())


class _Forgetting:
    """Hooks before and after every call of a model, which restore what the call has kept."""

    def __init__(self, methods: bool) -> None:
        self.forgotten: set[Place] = set()
        self.paused = False
        self.methods = methods
        self._kept: list[Snapshot] = []

    def before(self, model: nn.Module, args: Any) -> None:
        self._kept.append(Snapshot(model))

    def after(self, model: nn.Module, args: Any, outputs: Any) -> None:
        kept = self._kept.pop()
        if not self.paused:
            places = kept.changed()
            kept.restore(places)
            self.forgotten |= places
            if self.methods:
                clear_function_caches()


@contextlib.contextmanager
def forget_after_calls(models: Sequence[nn.Module]) -> Iterator[None]:
    """Has models, and copies of them, drop the tensors that a call keeps at the end of the call, within it.

    >>> class Remembering(nn.Linear):
    ...     last = None
    ...
    ...     def forward(self, x):
    ...         self.last = super().forward(x)
    ...         return self.last
    >>> model = Remembering(2, 2)
    >>> with forget_after_calls([model]):
    ...     _ = model(torch.ones(1, 2))
    >>> model.last is None
    True
    """
    handles = []
    for model in dict.fromkeys(models):
        hooks = _Forgetting(has_cached_methods(model))
        handles.append(model.register_forward_pre_hook(hooks.before, prepend=True))
        handles.append(model.register_forward_hook(hooks.after, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def move_empty_buffers(models: Sequence[nn.Module]) -> Iterator[None]:
    """Turns non-persistent buffers that are None into plain attributes of the models, within it.

    The exporter fails if a forward assigns such a buffer of the model. It allows those of submodules.
    """
    moved = [
        (model, name)
        for model in dict.fromkeys(models)
        for name in model._non_persistent_buffers_set
        if name in model._buffers and model._buffers[name] is None
    ]
    for module, name in moved:
        vars(module)[name] = module._buffers.pop(name)
    try:
        yield
    finally:
        for module, name in moved:
            vars(module).pop(name, None)
            module._buffers[name] = None


def forgotten_places(model: nn.Module) -> set[Place]:
    """Returns the places where calls of a model within `forget_after_calls` kept tensors. Callers empty the set."""
    hooks = _hooks(model)
    return hooks.forgotten if hooks else set()


@contextlib.contextmanager
def restore_attributes(model: nn.Module) -> Iterator[None]:
    """Restores afterwards what the model keeps, in the same containers: the exporter leaves copies."""
    kept = Snapshot(model)
    try:
        yield
    finally:
        kept.restore()


@contextlib.contextmanager
def keep_between_calls(model: nn.Module) -> Iterator[None]:
    """Lets a model within `forget_after_calls` keep what its calls keep. Afterwards its caches are as before."""
    hooks = _hooks(model)
    with restore_attributes(model):
        if hooks:
            hooks.paused = True
        try:
            yield
        finally:
            if hooks:
                hooks.paused = False


def is_forgetting(model: nn.Module) -> bool:
    """Returns whether a model is within `forget_after_calls`."""
    return _hooks(model) is not None


def _hooks(model: nn.Module) -> _Forgetting | None:
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
    return next((owner for owner in hooks if isinstance(owner, _Forgetting)), None)
