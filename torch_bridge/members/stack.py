"""Stacking of M sets of tensors in preallocated `[M, ...]` arrays, one member at a time, and back."""

import functools
import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from torch import Tensor

from jaxensemble.devices.placement import Placement
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import EqualMembersWarning, InputError, StateError
from jaxensemble.modules.state import flatten
from jaxensemble.network.weight_map import Entry, Origin, WeightMap
from torch_bridge.arrays import TORCH_DTYPES, cast_exactly, jax_dtype, to_numpy, to_tensor

_ALIGNMENT = 64  # bytes


class Stack:
    """The arrays of an ensemble while they are being filled. Holds the stack itself and nothing else."""

    def __init__(self, weights: WeightMap, members: int):
        self.weights = weights
        self.members = members
        self._arrays: dict[str, np.ndarray] = {}

    def put(self, member: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies one member's tensors, by PyTorch key, into the arrays."""
        for entry in self.weights.entries:
            array = stored_array(entry, tensors[entry.keys[0]], f"member {member}, `{entry.keys[0]}`")
            if entry.path not in self._arrays:
                self._arrays[entry.path] = _allocate_aligned((self.members, *array.shape), array.dtype)
            self._arrays[entry.path][member] = array

    def equal_members(self) -> list[list[int]]:
        """Returns groups of members whose tensors are all equal, bit for bit. Stops once all members differ."""
        groups = [list(range(self.members))] if self._arrays else []
        for array in self._arrays.values():
            rows = array.reshape(self.members, math.prod(array.shape[1:])).view(np.uint8)
            found: dict[tuple[int, bytes], list[int]] = defaultdict(list)
            for k, group in enumerate(groups):
                for member in group:
                    found[k, hashlib.sha256(rows[member]).digest()].append(member)
            groups = [group for group in found.values() if len(group) > 1]
            if not groups:
                break
        return groups

    def take(self, placement: Placement | None = None) -> dict[str, jax.Array]:
        """Returns the filled arrays by path, on JAX's default device or on a mesh. The stack is empty afterwards.

        On CPUs the arrays are not copied: nothing else refers to them. For a mesh, the members of the stack must be
        those that this process has on its devices.
        """
        put = functools.partial(jax.device_put, may_alias=True) if placement is None else placement.assemble
        return {path: put(self._arrays.pop(path)) for path in list(self._arrays)}


def warn_of_equal_members(stack: Stack, names: Sequence[str]) -> None:
    """Warns of members with equal weights. The warning points to the caller of the caller's caller."""
    for group in stack.equal_members():
        warnings.warn(
            f"members {', '.join(names[k] for k in group)} have equal weights, bit for bit: they count as one network",
            EqualMembersWarning,
            stacklevel=4,
        )


def _allocate_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array at an address that is aligned as XLA needs it, so that XLA need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def stored_array(entry: Entry, tensor: Tensor, what: str) -> np.ndarray:
    """Returns a tensor as the network stores it: rearranged, in a dtype of JAX. May be a view of the tensor."""
    array = to_numpy(tensor, what)
    return entry.rearrangement.apply(cast_exactly(array, jax_dtype(array.dtype, what), what))


def to_torch(ensemble: Ensemble) -> list[dict[str, Tensor]]:
    """Returns the state dicts of an ensemble's members: PyTorch's keys, layouts and dtypes, bit for bit.

    Tied tensors are one tensor under each of their keys. Buffers that PyTorch does not save are left out.

    **Raises:** `InputError` for an ensemble that was not ported from PyTorch.

    >>> import torch, torch_bridge
    >>> models = [torch.nn.Sequential(torch.nn.Linear(3, 2)) for _ in range(4)]
    >>> ensemble = torch_bridge.to_ensemble(models, (torch.ones(1, 3),))
    >>> bool(torch.equal(to_torch(ensemble)[2]["0.weight"], models[2][0].weight))
    True
    """
    origin = check_ensemble(ensemble, on_mesh=True).origin
    if not isinstance(origin, Origin):
        raise InputError(
            "`ensemble` must be one that was ported from PyTorch: only then it is known which PyTorch keys and layouts "
            "its arrays have; this one was made from Flax modules."
        )
    return [
        {key: tensor for entry, tensor in tensors if entry.persistent for key in entry.keys}
        for tensors in _members_tensors(ensemble, origin)
    ]


def check_ensemble(ensemble: Any, *, on_mesh: bool = False) -> Ensemble:
    """Returns an ensemble as it is; one whose members are on a mesh of devices only if `on_mesh` says so.

    **Raises:** `InputError` for anything else.
    """
    if not isinstance(ensemble, Ensemble):
        raise InputError(f"`ensemble` must be a jaxensemble.Ensemble; got a {type(ensemble).__name__}")
    if ensemble.placement is not None and not on_mesh:
        raise InputError(
            f"the members of `ensemble` are {ensemble.placement}, and PyTorch's are on one: give ensemble.over(None)"
        )
    return ensemble


def tensors_of_members(ensemble: Ensemble) -> list[dict[str, Tensor]]:
    """Returns the tensors of every member as `to_torch` does, including buffers that PyTorch does not save."""
    return [
        {key: tensor for entry, tensor in tensors for key in entry.keys}
        for tensors in _members_tensors(ensemble, ensemble.origin)
    ]


def _members_tensors(ensemble: Ensemble, origin: Origin) -> list[list[tuple[Entry, Tensor]]]:
    stacked = {**flatten(ensemble.params), **flatten(ensemble.buffers)}
    lost = [entry.path for entry in origin.weights.entries if entry.path not in stacked]
    if lost:
        raise StateError(f"the ensemble lacks arrays that it was ported with: {', '.join(lost)}")
    arrays = {entry.path: np.asarray(stacked[entry.path]) for entry in origin.weights.entries}
    return [
        [(entry, _tensor(entry, arrays[entry.path][member])) for entry in origin.weights.entries]
        for member in range(len(ensemble))
    ]


def _tensor(entry: Entry, array: np.ndarray) -> Tensor:
    return to_tensor(entry.rearrangement.invert(array, entry.shape), TORCH_DTYPES[entry.dtype])
