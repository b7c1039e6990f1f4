"""`Expected` content of a checkpoint of a model."""

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
    """Content that a checkpoint of a model must have.

    - `tensors`: the shape and dtype under each name.
    - `ties`: for a name whose tensor has several names in the model, all of these names.
    - `nonfinite`: where the tensors of a model with fresh weights are not finite: masks hold infinities.
    - `counters`: counters of batches in normalisation layers, from the model. A file may lack them: PyTorch did not
      always save them, and its own `load_state_dict` keeps the model's.
    - `trained`: the number of parameters of each shape; tied ones count once, frozen ones only if all are frozen.
    """

    tensors: Mapping[str, tuple[Shape, torch.dtype]]
    ties: Mapping[str, tuple[str, ...]]
    nonfinite: Mapping[str, Tensor]
    counters: Mapping[str, Tensor]
    trained: Counter[Shape]

    @classmethod
    def of(cls, model: nn.Module) -> "Expected":
        """Returns the content for a model.

        **Raises:** `InputError` for a model whose state dict is not just its parameters and buffers.
        """
        tensors, saved = tensors_of(model), set(model.state_dict())
        unsaved = [key for key, _ in model.named_parameters(remove_duplicate=False) if key not in saved]
        if odd := sorted(saved - tensors.keys()) + unsaved:
            raise InputError(
                f"the state dict of {type(model).__name__} must hold its parameters and buffers by their names; these "
                f"names differ: {', '.join(odd)}. Load the members yourself, and pass them to to_ensemble."
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
        """The number of tensors that a file must hold; tied ones count once."""
        return len({self.ties.get(key, (key,)) for key in self.tensors if key not in self.counters})

    def missing_names(self, names: Iterable[str]) -> list[str]:
        """Returns the names of the model that are not given. For tied tensors, one name is enough."""
        given = set(names)
        return [key for key in self.tensors if given.isdisjoint(self.ties.get(key, (key,)))]

    def suffices(self, names: Iterable[str]) -> bool:
        """Returns whether these are all names of the model, except counters."""
        return self.counters.keys() >= set(self.missing_names(names))

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under all names of the model: safetensors stores ties once, and counters may lack."""
        whole = dict(tensors)
        for key, group in self.ties.items():
            present = [name for name in group if name in tensors]
            if key not in tensors and present:
                whole[key] = tensors[present[0]]
        return {**{key: self.counters[key].clone() for key in self.counters if key not in whole}, **whole}

    def problems(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """Yields every difference from the expected content."""
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
