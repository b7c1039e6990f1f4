"""Parameters and buffers of a member by name, and checks that a stack can hold them."""

import itertools
from collections.abc import Mapping

from torch import Tensor, nn

from jaxensemble.errors import InputError, UnsupportedError, shorten_list
from torch_bridge.arrays import unsupported_kind


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def check_tensors(model: nn.Module) -> None:
    """Checks that a stack of weights can hold a model's parameters and buffers.

    **Raises:** `InputError` naming every tensor that has no plain values or shares memory with another tensor, and
    `UnsupportedError` for quantised layers, which hold packed integers.
    """
    quantised = [path or "itself" for path, module in model.named_modules() if _is_quantised(module)]
    if quantised:
        raise UnsupportedError(
            f"{type(model).__name__} is quantised ({shorten_list(quantised)}): its layers hold packed integers, for "
            "kernels of PyTorch's own that XLA has no equal of. Port the network as it was before."
        )
    tensors = tensors_of(model)
    odd = {key: unsupported_kind(tensor) for key, tensor in tensors.items()}
    lines = [f"  {key}: {kind}" for key, kind in odd.items() if kind]
    if lines:
        raise InputError(f"{type(model).__name__} must hold plain dense tensors; got\n" + "\n".join(lines))
    lines = [f"  {first} and {second}" for first, second in _overlapping(tensors)]
    if lines:
        raise InputError(
            f"{type(model).__name__} has tensors that share memory without being one tensor:\n"
            + "\n".join(lines)
            + "\n"
            "A stack of weights cannot keep that. Clone one of each pair, or, to tie them, use one Parameter for both."
        )


def _overlapping(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Returns pairs of different tensors, next to each other in memory, that overlap."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), key)
        for key, tensor in {id(tensor): (key, tensor) for key, tensor in tensors.items() if tensor.numel()}.values()
    )
    return [(a[3], b[3]) for a, b in itertools.pairwise(spans) if a[0] == b[0] and b[1] < a[2]]


def _extent(tensor: Tensor) -> int:
    """Returns the bytes from a tensor's first element to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer by name, with tied ones under each name and non-persistent buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
