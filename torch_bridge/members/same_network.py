"""Comparison of the members of an ensemble: everything except the values of their tensors has to be equal."""

import dataclasses
import functools
import reprlib
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from jaxensemble.errors import InputError, MemberError

_NOTHING = type("_Nothing", (), {"__repr__": lambda self: "nothing"})()

_BOOKKEEPING = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
"""Attributes of every `nn.Module` that are compared separately."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference between a member and member 0."""

    where: str
    theirs: str
    ours: str


def list_members(models: Any) -> list[nn.Module]:
    """Returns the models as a list.

    **Raises:** `InputError` if there are none, or if one is not a module.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise InputError(f"`models` must be a sequence of modules; got one {type(models).__name__}. Pass [model].")
    if not isinstance(models, Iterable) or isinstance(models, str | Mapping):
        raise InputError(f"`models` must be a sequence of modules; got {type(models).__name__}.")
    members = [_unwrap_compiled(model) for model in models]
    if not members:
        raise InputError("`models` must hold at least one module; got none.")
    strangers = [
        f"{k}: {type(member).__name__}" for k, member in enumerate(members) if not isinstance(member, nn.Module)
    ]
    if strangers:
        raise InputError(f"`models` must hold torch.nn.Modules only; got {', '.join(strangers)}.")
    scripted = [str(k) for k, member in enumerate(members) if isinstance(member, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"`models` must be modules in Python, not TorchScript's; got such for member {', '.join(scripted)}. Pass "
            "the modules that were scripted."
        )
    return members


def _unwrap_compiled(model: Any) -> Any:
    """Returns the module behind `torch.compile`. Its class is known by name: importing it takes longer than porting."""
    return model._orig_mod if type(model).__qualname__ == "OptimizedModule" else model


_MODES = "Call .eval() on all of them, or pass mode='eval', which ports them for evaluation as they are."


def check_members(members: Sequence[nn.Module], *, rates_may_differ: bool = False) -> str | None:
    """Compares every member with member 0. Returns why they have no training mode together, or None.

    With `rates_may_differ`, members in evaluation mode may have dropout of different rates.

    **Raises:** `MemberError` with all other differences from member 0, and the members that have each of them.
    """
    found: dict[Difference, list[int]] = defaultdict(list)
    for k, member in enumerate(members[1:], 1):
        for difference in find_differences(members[0], member):
            found[difference].append(k)
    evaluating = not any(module.training for member in members for module in member.modules())
    if rates_may_differ and evaluating and all(_is_rate(members[0], difference) for difference in found):
        rates = dict.fromkeys(difference.where for difference in found)
        reason = f"members have different rates of dropout ({'; '.join(rates)})"
        return (
            f"{reason}: to train them, build them alike, and give TrainState.create(dropout=[...])" if rates else None
        )
    modes = all(difference.where.endswith(", mode") for difference in found)
    if found:
        raise MemberError(
            f"the {len(members)} members must differ in the values of their tensors only, or they are no one network:\n"
            + "\n".join(_row(difference, _list_numbers(which)) for difference, which in found.items())
            + ("\n" + (_MODES if modes else "Port them as separate ensembles, or build them alike.")),
            details="\n".join(_row(difference, _numbers(which)) for difference, which in found.items()),
        )


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_rates(model: nn.Module) -> tuple[float, ...]:
    """Returns the rates of all layers of dropout, in order."""
    return tuple(module.p for module in model.modules() if isinstance(module, _DROPOUTS))


def _is_rate(model: nn.Module, difference: Difference) -> bool:
    """Returns whether a difference is in a rate of dropout, which evaluation mode does not use."""
    path, _, name = difference.where.rpartition(", ")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    return name == "p" and type(module) in _DROPOUTS


def _row(difference: Difference, members: str) -> str:
    return f"  {difference.where}: {difference.theirs} in {members}, {difference.ours} in member 0"


def _list_numbers(members: Sequence[int]) -> str:
    return _numbers(members[:10]) + (f" and {len(members) - 10} more" if len(members) > 10 else "")


def _numbers(members: Sequence[int]) -> str:
    return f"member{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"


def find_differences(first: nn.Module, other: nn.Module) -> Iterator[Difference]:
    """Yields every difference of the network `other` from `first`."""
    ours = dict(first.named_modules(remove_duplicate=False))
    theirs = dict(other.named_modules(remove_duplicate=False))
    for path in dict.fromkeys((*ours, *theirs)):
        if path not in ours or path not in theirs:
            yield _difference(path, "module", _name(theirs.get(path)), _name(ours.get(path)))
        elif _class(ours[path]) is not _class(theirs[path]):
            yield _difference(path, "class", _name(theirs[path]), _name(ours[path]))
        else:
            yield from _mode_differences(path, ours, theirs)
            yield from _module_differences(path, ours[path], theirs[path])
    yield from _tie_differences(first, other)


def _mode_differences(
    path: str, ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]
) -> Iterator[Difference]:
    """Yields a module's difference in mode, unless the module around it has the same difference."""
    parent = path.rpartition(".")[0]
    modes = theirs[path].training, ours[path].training
    around = theirs[parent].training, ours[parent].training
    if modes[0] != modes[1] and (not path or modes != around):
        names = {True: "training", False: "evaluation"}
        yield _difference(path, "mode", names[modes[0]], names[modes[1]])


def _module_differences(path: str, first: nn.Module, other: nn.Module) -> Iterator[Difference]:
    for kind in ("_parameters", "_buffers"):
        yield from _tensor_differences(path, getattr(first, kind), getattr(other, kind))
    for kind in ("_modules", "_parameters", "_buffers"):
        ours, theirs = list(getattr(first, kind)), list(getattr(other, kind))
        if ours != theirs and sorted(ours) == sorted(theirs):
            yield _difference(path, f"order of {kind[1:]}", theirs, ours)
    if first._non_persistent_buffers_set != other._non_persistent_buffers_set:
        yield _difference(
            path,
            "non-persistent buffers",
            sorted(other._non_persistent_buffers_set),
            sorted(first._non_persistent_buffers_set),
        )
    ours, theirs = _attributes(first), _attributes(other)
    for name in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(name, _NOTHING), theirs.get(name, _NOTHING)
        if not has_same_effect(a, b, {}):
            yield _difference(path, name, b, a)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns a module's own attributes, without those that a hook computes at every call (legacy weight norm).

    Recurrent layers' lists of their parameters are left out too, and so are hooks of loading and saving, which a
    forward never calls. Hooks are stored under meaningless numbers: only their order counts.
    """
    computed = {getattr(hook, "name", None) for hook in module._forward_pre_hooks.values()}
    loading = {name for name in vars(module) if "state_dict" in name and name.endswith("_hooks")}
    again = {"_flat_weights", "_flat_weight_refs"} if isinstance(module, nn.RNNBase) else set()
    own = {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING | computed | again | loading}
    return {name: list(v.values()) if "_hooks" in name and isinstance(v, Mapping) else v for name, v in own.items()}


def _tensor_differences(path: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*first, *other)):
        a, b = _describe_tensor(first.get(name, _NOTHING)), _describe_tensor(other.get(name, _NOTHING))
        if a != b:
            yield Difference(f"{path}.{name}" if path else name, b, a)


def _describe_tensor(tensor: Any) -> str:
    """Returns the properties of a tensor that have to be equal."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "an uninitialised tensor"
    frozen = "" if tensor.requires_grad or not isinstance(tensor, nn.Parameter) else ", frozen"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{frozen}"


def _tie_differences(first: nn.Module, other: nn.Module) -> Iterator[Difference]:
    ours, theirs = _ties(first), _ties(other)
    for names in sorted(ours ^ theirs):
        if names in ours:
            yield Difference(" = ".join(names), "not tied", "tied")
        else:
            yield Difference(" = ".join(names), "tied", "not tied")


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        groups[id(tensor)].append(name)
    return {tuple(names) for names in groups.values() if len(names) > 1}


def _difference(path: str, what: str, theirs: Any, ours: Any) -> Difference:
    show = lambda value: value if isinstance(value, str) else reprlib.repr(value)  # noqa: E731
    return Difference(f"{path or 'the root module'}, {what}", show(theirs), show(ours))


def _class(module: nn.Module) -> type:
    """Returns the module's class, or for a parametrised module the class before parametrisation."""
    return parametrize.type_before_parametrizations(module)


def _name(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"{_class(module).__module__}.{_class(module).__qualname__}"


def has_same_effect(a: Any, b: Any, seen: dict[tuple[int, int], bool]) -> bool:
    """Returns whether two attributes are equal for a forward: by value, or by code for functions."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if (id(a), id(b)) in seen:
        return seen[id(a), id(b)]
    seen[id(a), id(b)] = True  # ends cycles: a cycle differs only if something outside of it does
    seen[id(a), id(b)] = result = _same(a, b, seen)
    return result


def _same(a: Any, b: Any, seen: dict[tuple[int, int], bool]) -> bool:
    match a:
        case Tensor():
            return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b) or _equal_nan(a, b))
        case np.ndarray():
            return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        case nn.Module():
            return type(a) is type(b)  # registered modules are compared at their own paths
        case float():
            return a == b or (a != a and b != b)
        case types.FunctionType():
            return a.__code__ == b.__code__ and all(
                has_same_effect(getattr(a, part), getattr(b, part), seen)
                for part in ("__defaults__", "__kwdefaults__", "__closure__")
            )
        case types.MethodType():
            return has_same_effect(a.__func__, b.__func__, seen) and has_same_effect(a.__self__, b.__self__, seen)
        case types.CellType():
            return has_same_effect(a.cell_contents, b.cell_contents, seen)
        case functools.partial():
            return all(
                has_same_effect(getattr(a, part), getattr(b, part), seen) for part in ("func", "args", "keywords")
            )
        case Mapping():
            return list(a) == list(b) and all(has_same_effect(a[key], b[key], seen) for key in a)
        case list() | tuple():
            return len(a) == len(b) and all(has_same_effect(x, y, seen) for x, y in zip(a, b, strict=True))
    if type(a).__eq__ is not object.__eq__:
        return bool(a == b)
    return hasattr(a, "__dict__") and has_same_effect(vars(a), vars(b), seen)


def _equal_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())
