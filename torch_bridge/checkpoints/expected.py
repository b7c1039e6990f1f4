"""`Expected`: what a checkpoint of a model has to hold."""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from jaxensemble.errors import InputError
from torch_bridge.graph.modes.counters import is_counter
from torch_bridge.members.finite import has_fractions
from torch_bridge.members.tensors import tensors_of

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a checkpoint of a model has to hold.

    - `tensors`: the shape and dtype under each name.
    - `ties`: for a name whose tensor the model holds under several, all of these.
    - `nonfinite`: where the tensors of a model with fresh weights are not finite: masks hold infinities.
    - `counters`: batches counted by normalisation, as the model has them. A file may lack them: PyTorch did not always
      have them, and its own `load_state_dict` leaves the model's.
    - `trained`: how many parameters there are of each shape, tied ones once, frozen ones not unless all are.
    """

    tensors: Mapping[str, tuple[Shape, torch.dtype]]
    ties: Mapping[str, tuple[str, ...]]
    nonfinite: Mapping[str, Tensor]
    counters: Mapping[str, Tensor]
    trained: Counter[Shape]

    @classmethod
    def of(cls, model: nn.Module) -> "Expected":
        """**Raises:** `InputError` for a model whose state dict is not simply its parameters and buffers."""
        tensors, saved = tensors_of(model), set(model.state_dict())
        unsaved = [key for key, _ in model.named_parameters(remove_duplicate=False) if key not in saved]
        if odd := sorted(saved - tensors.keys()) + unsaved:
            raise InputError(
                f"the state dict of {type(model).__name__} must hold its parameters and buffers by their names; it has "
                f"others, or lacks some: {', '.join(odd)}. Load the members yourself, and pass them to to_ensemble."
            )
        names: dict[int, list[str]] = defaultdict(list)
        for key, tensor in tensors.items():
            if key in saved:
                names[id(tensor)].append(key)
        fractions = {key: tensor for key, tensor in tensors.items() if key in saved and has_fractions(tensor)}
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        nonfinite = {key: ~tensor.isfinite() for key, tensor in fractions.items()}
        return cls(
            {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items() if key in saved},
            {key: tuple(group) for group in names.values() for key in group if len(group) > 1},
            {key: mask for key, mask in nonfinite.items() if mask.any()},
            {key: tensor.clone() for key, tensor in tensors.items() if key in saved and is_counter(model, key)},
            Counter(tuple(parameter.shape) for parameter in trained or parameters),
        )

    @functools.cached_property
    def distinct_count(self) -> int:
        """The number of tensors that a file has to hold, tied ones once."""
        return len({self.ties.get(key, (key,)) for key in self.tensors if key not in self.counters})

    def missing_names(self, names: Iterable[str]) -> list[str]:
        """The names of the model that are not among these. Of tied tensors, one suffices."""
        given = set(names)
        return [key for key in self.tensors if given.isdisjoint(self.ties.get(key, (key,)))]

    def suffices(self, names: Iterable[str]) -> bool:
        """Whether these are all names of the model, but for counters."""
        return self.counters.keys() >= set(self.missing_names(names))

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under all names of the model: safetensors stores none twice, and counters may lack."""
        whole = dict(tensors)
        for key, group in self.ties.items():
            present = [name for name in group if name in tensors]
            if key not in tensors and present:
                whole[key] = tensors[present[0]]
        return {**{key: self.counters[key].clone() for key in self.counters if key not in whole}, **whole}

    def problems(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """Every difference to what a checkpoint has to hold."""
        for key in dict.fromkeys((*self.tensors, *tensors)):
            if key not in self.tensors:
                yield f"`{key}`: unexpected, {_description(tuple(tensors[key].shape), tensors[key].dtype)}"
                continue
            wanted = _description(*self.tensors[key])
            if key not in tensors:
                yield f"`{key}`: missing, expected {wanted}"
            elif (got := _description(tuple(tensors[key].shape), tensors[key].dtype)) != wanted:
                yield f"`{key}`: expected {wanted}, got {got}"
            elif key in self.ties and not _is_equal(tensors[self.ties[key][0]], tensors[key]):
                yield f"`{key}`: tied to `{self.ties[key][0]}` in the model, expected the same values"


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a.nan_to_num(), b.nan_to_num())


def _description(shape: Shape, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
