"""Precisions of PyTorch: equal float32 on both sides, and float64 even where a forward names another dtype."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_bridge.compat import pytree
from torch_bridge.graph.caches.functions import isolate_function_caches
from torch_bridge.graph.sizes.functions import DirectDistances


@contextlib.contextmanager
def equal_precision(*, tf32: bool = False) -> Iterator[None]:
    """Makes float32 the same on both sides: neither framework may round products to TF32, or, with `tf32`, both may.

    Context managers do this: they work where torch has frozen its flags.
    """
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    left: Any = dict.fromkeys(("enabled", "benchmark", "benchmark_limit", "deterministic", "fp32_precision"))
    precision = "default" if tf32 else "highest"
    try:
        with torch.backends.cudnn.flags(**left, allow_tf32=tf32), jax.default_matmul_precision(precision):
            yield
    finally:
        matmul.allow_tf32 = before


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Makes PyTorch compute in float64, whatever dtype a forward names.

    A forward may say `x.float()`, `torch.arange(3.0)` or `dtype=torch.float32`. Its float64 copy would then compute in
    float32, or fail where both dtypes meet. Distances are computed by their definition. Complex numbers are complex128.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with isolate_function_caches(), _DoublePrecision(), DirectDistances():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """Makes PyTorch compute in float32, within `double_precision` too."""
    before, paused = torch.get_default_dtype(), _DoublePrecision.paused
    torch.set_default_dtype(torch.float32)
    _DoublePrecision.paused = True
    try:
        with isolate_function_caches():
            yield
    finally:
        torch.set_default_dtype(before)
        _DoublePrecision.paused = paused


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)


_WIDE |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)


_SINGLE = {wide: torch.complex64 if wide.is_complex else torch.float32 for wide in (*_WIDE, *_WIDE.values())}


_CASTS = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)


_CASTS |= {getattr(Tensor, name): getattr(Tensor, "cdouble") for name in ("cfloat", "chalf")}  # noqa: B009


class _DoublePrecision(TorchFunctionMode):
    """A mode that replaces narrow dtypes in every call of PyTorch."""

    paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _DoublePrecision.paused:
            return func(*args, **(kwargs or {}))

        def wide(value: Any) -> Any:
            return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value

        kwargs = kwargs or {}
        if func is not torch.empty_strided:  # the exporter makes fake tensors by it, with the tensor's own dtype
            args = [wide(value) for value in args]
            kwargs = {name: wide(value) for name, value in kwargs.items()}
        return (_CASTS[func] if func in _CASTS else func)(*args, **kwargs)


def double_copies(models: Sequence[nn.Module], *, training: bool = False) -> list[nn.Module]:
    """Copies of the models in float64 and complex128, all in one mode."""
    for model in models:
        detach_computed_weights(model)
    return [_cast(copy.deepcopy(model), _WIDE).train(training) for model in models]


def single_copies(models: Sequence[nn.Module], inputs: Any) -> tuple[list[nn.Module], Any]:
    """Copies of models and inputs in float32 and complex64, to be run within `single_precision`."""
    with single_precision():
        return [_cast(copy.deepcopy(model), _SINGLE) for model in models], _cast_leaves(inputs, _SINGLE)


def _cast(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> nn.Module:
    """The model with its parameters and buffers cast. `nn.Module.double` leaves complex numbers as they are."""
    return model._apply(lambda tensor: tensor.to(dtypes.get(tensor.dtype, tensor.dtype)))


def _cast_leaves(tree: Any, dtypes: Mapping[torch.dtype, torch.dtype]) -> Any:
    """The tree with its tensors cast."""
    return pytree.tree_map(lambda x: x.to(dtypes.get(x.dtype, x.dtype)) if isinstance(x, Tensor) else x, tree)


def detach_computed_weights(model: nn.Module) -> None:
    """Detaches the weights that legacy weight norm computes at every call: with a gradient they cannot be copied."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook, "name", None)
            if isinstance(name, str) and isinstance(vars(module).get(name), Tensor):
                vars(module)[name] = vars(module)[name].detach()


def doubled(inputs: Any) -> Any:
    """The inputs with floating-point tensors in float64, and complex ones in complex128."""
    return _cast_leaves(inputs, _WIDE)
