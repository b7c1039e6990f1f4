"""Tensors that forwards compute from the weights and keep for their next call: tables by device, length or size.

The first call fills such a cache, and later calls read it. A cache is not part of the network. The code that fills
it is ported instead.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaxensemble.errors import InputError, UnsupportedError, describe_error
from torch_bridge.graph.caches.assignments import Assignments, is_cached_property, read_assignments
from torch_bridge.graph.caches.functions import clear_function_caches, has_cached_tensors
from torch_bridge.graph.caches.objects import (
    ABSENT,
    PLAIN,
    Place,
    Snapshot,
    cache_attributes,
    cache_owners,
    forget_after_calls,
    forgotten_places,
    has_cached_methods,
    has_tensor_leaf,
    indexed_leaves,
    is_buffer,
    is_forgetting,
    keep_between_calls,
    move_empty_buffers,
    set_attribute,
)
from torch_bridge.graph.forward import evaluate_model
from torch_bridge.graph.modes.switch import switch_mode
from torch_bridge.graph.outputs import output_leaves
from torch_bridge.members.same_network import has_same_effect

_EMPTY, _EMPTY_ITEMS = "empty", "empty items"
"""The two ways of clearing a container: no items, or the same items with None instead of each tensor."""

_RESET = "reset"
"""The way of clearing a value that a cache is checked by: a length, a dtype, a device."""

Attribute = tuple[type, str]
"""A class, and an attribute of its objects. The attribute is cleared alike in all objects."""

Ways = dict[Attribute, Any]
"""How attributes are cleared: a way of clearing a container, or the value that is set."""


@contextlib.contextmanager
def keep_caches_empty(models: Sequence[nn.Module], inputs: Any) -> Iterator[None]:
    """Clears caches as `clear_caches` does. Within it, the models and copies of them keep nothing between calls."""
    if any(map(is_forgetting, models)):
        yield
    else:
        with clear_caches(models, inputs), move_empty_buffers(models), forget_after_calls(models):
            yield


@contextlib.contextmanager
def clear_caches(models: Sequence[nn.Module], inputs: Any) -> Iterator[None]:
    """Clears everything that the models' forwards can compute again, within it. Afterwards it is restored.

    **Raises:** `UnsupportedError` for caches whose contents differ from what the forward puts into them when they are
    empty, `InputError` if PyTorch cannot run models with caches on `inputs`, the arguments of a call.
    """
    kept = [Snapshot(model) for model in dict.fromkeys(models)]
    try:
        _clear_all(models, inputs)
        yield
    finally:
        for model in kept:
            model.restore()


def check_calls_repeat(model: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> None:
    """Checks that the tensors that a call within `keep_caches_empty` kept do not change the next call's outputs.

    **Raises:** `UnsupportedError` if they do.
    """
    if not (places := forgotten_places(model)):
        return
    with keep_between_calls(model):
        first, second = (_outputs(model, inputs, training) for _ in range(2))
    if not _are_equal(first, second):
        raise UnsupportedError(
            f"{type(model).__name__}.forward changes what its next call computes with: {_list_places(places)}. A "
            "network is a function of its inputs and weights: keep such state out of the forward, or give it as an "
            "input."
        )
    places.clear()


def _clear_all(models: Sequence[nn.Module], inputs: Any) -> None:
    remembered = any(map(has_cached_methods, models)) and has_cached_tensors()
    candidates = [_candidates(model) for model in models]
    if not isinstance(inputs, tuple) or not (remembered or any(candidates)):
        clear_function_caches()
        return
    before = [_call_results(model, inputs) for model in models]
    ways = _ways_that_work(models, candidates, inputs)
    problems = []
    for k, (model, calls) in enumerate(zip(models, before, strict=True)):
        if ways or remembered:
            which = f"member {k}, " if len(models) > 1 else ""
            problems += [which + problem for problem in _stale_places(model, ways, inputs, calls)]
    if problems:
        raise UnsupportedError(_error_text(problems))
    for model in models:
        _clear(model, ways)
        _fill_buffers(model, ways, inputs)


def _fill_buffers(model: nn.Module, ways: Ways, inputs: tuple[Any, ...]) -> None:
    """Computes the cleared buffers that are never None again, in the size that a call on `inputs` needs."""
    made = {
        (path, name)
        for path, owner in cache_owners(model)
        for kind, name in ways
        if kind is type(owner) and is_buffer(owner, name) and None not in read_assignments(kind)[name].constants
    }
    if made:
        kept = Snapshot(model)
        _outputs(model, inputs, False)
        paths = {path for path, _ in made}
        tensors = {
            (path, n)
            for path, owner in cache_owners(model)
            for n, v in cache_attributes(owner).items()
            if has_tensor_leaf(v)
        }
        kept.restore({place for place in kept.changed() if place[0] not in paths or place in tensors - made})


def _error_text(problems: list[str]) -> str:
    return (
        "what modules keep from earlier calls must equal what their forwards compute from the weights; it differs in\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\nThe weights were changed after it was kept (load_state_dict, an optimizer's step), or it was set by hand. "
        "Empty it (.clear(), or None), so that the next call computes it. If it is not a function of the weights, make "
        "it a buffer."
    )


def _list_places(places: set[Place]) -> str:
    return ", ".join(f"`{'.'.join(filter(None, place))}`" for place in sorted(places))


def _class_of(owner: Any) -> type:
    return owner if isinstance(owner, type) else type(owner)


def _candidates(model: nn.Module) -> dict[Attribute, list[Any]]:
    """Returns the attributes that may be caches and hold tensors, each with the ways in which it may be cleared."""
    found: dict[Attribute, list[Any]] = {}
    for _, owner in cache_owners(model):
        for name, value in cache_attributes(owner).items():
            kind = _class_of(owner)
            if (kind, name) in found or not has_tensor_leaf(value):
                continue
            if isinstance(value, dict | list):
                found[kind, name] = [_EMPTY, _EMPTY_ITEMS]
                continue
            assigned = read_assignments(kind).get(name, Assignments())
            elsewhere = not is_buffer(owner, name) and (assigned.constants or not assigned.made_at_first)
            if assigned.made_later or elsewhere:
                found[kind, name] = _possible_values(kind, name, assigned)
    return found


def _possible_values(kind: type, name: str, assigned: Assignments) -> list[Any]:
    """Returns the values that an attribute may have had before a call filled it."""
    if is_cached_property(kind, name):
        return [ABSENT]
    inherited = [ABSENT] if hasattr(kind, name) else []
    return inherited + (sorted(assigned.constants, key=lambda value: value is not None) or [None, ABSENT])


def _ways_that_work(
    models: Sequence[nn.Module], candidates: Sequence[dict[Attribute, list[Any]]], inputs: tuple[Any, ...]
) -> Ways:
    """Returns the caches and how to clear them: the attributes that a forward fills again after they are cleared."""
    chosen: Ways = {}
    for model, found in zip(models, candidates, strict=True):
        new = {attribute: ways for attribute, ways in found.items() if attribute not in chosen}
        if not new:
            continue
        at_once = chosen | {attribute: ways[0] for attribute, ways in new.items()}
        together = _related_attributes(model, at_once) | at_once
        if len(_refilled_attributes(model, together, inputs)) == len(at_once):
            chosen = together
            continue
        for attribute, ways in new.items():
            # Alone as well: a related attribute may be set by the caller, for example the size of images.
            tried = [
                more | {attribute: way} for way in ways for more in (_related_attributes(model, {attribute: way}), {})
            ]
            chosen |= next((one for one in tried if attribute in _refilled_attributes(model, one, inputs)), {})
    return chosen


def _related_attributes(model: nn.Module, ways: Ways) -> Ways:
    """Returns the attributes that the owners of these caches assign after `__init__`, to be cleared with the caches."""
    kinds = {kind for kind, _ in ways}
    return {
        (_class_of(owner), name): _RESET
        for _, owner in cache_owners(model)
        for name, value in (cache_attributes(owner).items() if _class_of(owner) in kinds else ())
        if (_class_of(owner), name) not in ways and isinstance(value, PLAIN)
        if read_assignments(_class_of(owner)).get(name, Assignments()).made_later
    }


def _refilled_attributes(model: nn.Module, ways: Ways, inputs: tuple[Any, ...]) -> set[Attribute]:
    """Clears the attributes, calls the model, and returns those attributes that hold tensors afterwards."""
    found: set[Attribute] = set()
    for training in (False, True):
        with (
            keep_between_calls(model),
            contextlib.suppress(Exception),
        ):  # a forward may need what was cleared
            _clear(model, ways)
            _outputs(model, inputs, training)
            for _, owner in cache_owners(model):
                kept = cache_attributes(owner).items()
                found |= {(_class_of(owner), name) for name, value in kept if has_tensor_leaf(value)} & ways.keys()
        if not training and not found:
            return found
        if len(found) == len(ways):
            break
    return found


def _clear(model: nn.Module, ways: Ways) -> None:
    """Clears the caches, and the values that they are checked by."""
    clear_function_caches()
    for _, owner in cache_owners(model):
        kind, kept = _class_of(owner), cache_attributes(owner)
        for name in kept:
            if (kind, name) in ways:
                _clear_one(owner, name, kept[name], ways[kind, name])


def _clear_one(owner: Any, name: str, value: Any, way: Any) -> None:
    if way is _RESET:
        constants = read_assignments(_class_of(owner))[name].constants
        number = isinstance(value, int | float) and not isinstance(value, bool)
        set_attribute(owner, name, constants[0] if constants else 0 if number else None)
    elif way is _EMPTY and isinstance(value, dict | list):
        value.clear()
    elif way is _EMPTY_ITEMS and isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            value[key] = None if has_tensor_leaf(value[key]) else value[key]
    elif has_tensor_leaf(value):
        set_attribute(owner, name, way if way is ABSENT else copy.deepcopy(way))


_CallResult = tuple[list[Any], dict[str, Tensor]]
"""The outputs of a call, and the tensors that the model keeps after the call."""


def _call_results(model: nn.Module, inputs: tuple[Any, ...]) -> list[_CallResult]:
    """Returns a call in evaluation mode, and a call in training mode if it works: BatchNorm refuses single values."""
    found: list[_CallResult] = []
    for training in (False, True):
        try:
            with keep_between_calls(model):
                found.append((_outputs(model, inputs, training), _tensors(model)))
        except Exception as error:
            if not training:
                raise InputError(
                    f"PyTorch itself cannot run {type(model).__name__} on the example inputs: {describe_error(error)}",
                    details=str(error),
                ) from error
    return found


def _stale_places(model: nn.Module, ways: Ways, inputs: tuple[Any, ...], before: Sequence[_CallResult]) -> list[str]:
    """Returns the places whose tensors differ, in either mode, from what a call puts there after they are cleared."""
    found: set[str] = set()
    for training, (outputs, kept) in zip((False, True), before, strict=False):
        with keep_between_calls(model):
            _clear(model, ways)
            again, made = _outputs(model, inputs, training), _tensors(model)
        places = {place for place in kept if place in made and not _is_recomputed(kept[place], made[place])}
        if not places and not _are_equal(outputs, again):
            places = {f"its outputs in {'training' if training else 'evaluation'} mode"}
        found |= places
    return sorted(found)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"`{path}.{name}{index}`".replace("`.", "`"): leaf
        for path, owner in cache_owners(model)
        for name, value in cache_attributes(owner).items()
        if not is_buffer(owner, name)
        for index, leaf in indexed_leaves(value)
        if isinstance(leaf, Tensor)
    }


def _is_recomputed(kept: Tensor, made: Tensor) -> bool:
    """Returns whether two tensors are equal. A table of a different size is of another call, and outputs check it."""
    return kept.shape != made.shape or _are_equal([kept], [made])


def _are_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return has_same_effect(list(a), list(b), {})


def _outputs(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Any]:
    """Calls the model in one mode with a fixed seed, and restores buffers, modes and generators."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), switch_mode([model], training):
            torch.manual_seed(0)
            return [leaf for _, leaf in output_leaves(evaluate_model(model, inputs))]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
