"""What PyTorch says: every member run on its own, all of them under `torch.func.vmap`, and the same in float64."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from jaxensemble.errors import InputError, described
from torch_bridge.compat import pytree
from torch_bridge.graph.caches.functions import tensors_forgotten
from torch_bridge.graph.examples import Arguments, axes_of, tensors_mapped
from torch_bridge.graph.outputs import arrays_of
from torch_bridge.graph.sizes.functions import DirectDistances
from torch_bridge.members.finite import has_fractions

Inputs = Arguments | tuple[Any, ...]
"""The arguments of one call, or a tuple of its positional ones."""


class CannotRun(InputError):
    """PyTorch cannot run the models on these inputs."""


@contextlib.contextmanager
def equal_precision(*, tf32: bool = False) -> Iterator[None]:
    """The same float32 on both sides, for a while: neither framework may round products to TF32, or both may.

    By context managers, which work where torch has frozen its flags.
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
def widened() -> Iterator[None]:
    """PyTorch in float64 for a while, whatever a forward says: `x.float()`, `torch.arange(3.0)`, `dtype=torch.float32`.

    Without it, the float64 copy of such a model computes in float32, or fails where both meet. Distances are
    computed as they are defined. Complex numbers are complex128.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with tensors_forgotten(), _Widened(), DirectDistances():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def single() -> Iterator[None]:
    """PyTorch in float32 for a while, within `widened` too."""
    before, paused = torch.get_default_dtype(), _Widened.paused
    torch.set_default_dtype(torch.float32)
    _Widened.paused = True
    try:
        with tensors_forgotten():
            yield
    finally:
        torch.set_default_dtype(before)
        _Widened.paused = paused


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
_WIDE |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)
_SINGLE = {wide: torch.complex64 if wide.is_complex else torch.float32 for wide in (*_WIDE, *_WIDE.values())}
_CASTS = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)
_CASTS |= {getattr(Tensor, name): getattr(Tensor, "cdouble") for name in ("cfloat", "chalf")}  # noqa: B009


class _Widened(TorchFunctionMode):
    paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _Widened.paused:
            return func(*args, **(kwargs or {}))

        def wide(value: Any) -> Any:
            return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value

        kwargs = kwargs or {}
        if func is not torch.empty_strided:  # by which the exporter makes its stand-in for a tensor, of its dtype
            args = [wide(value) for value in args]
            kwargs = {name: wide(value) for name, value in kwargs.items()}
        return (_CASTS[func] if func in _CASTS else func)(*args, **kwargs)


def in_double(models: Sequence[nn.Module], *, training: bool = False) -> list[nn.Module]:
    """Copies of the models in float64 and complex128, all in one mode."""
    for model in models:
        detach_computed(model)
    return [_cast(copy.deepcopy(model), _WIDE).train(training) for model in models]


def in_single(models: Sequence[nn.Module], inputs: Any) -> tuple[list[nn.Module], Any]:
    """Copies of models and inputs in float32 and complex64, to be run within `single`."""
    with single():
        return [_cast(copy.deepcopy(model), _SINGLE) for model in models], _cast_leaves(inputs, _SINGLE)


def _cast(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> nn.Module:
    """The model, with its parameters and buffers cast. `nn.Module.double` leaves complex numbers as they are."""
    return model._apply(lambda tensor: tensor.to(dtypes.get(tensor.dtype, tensor.dtype)))


def _cast_leaves(tree: Any, dtypes: Mapping[torch.dtype, torch.dtype]) -> Any:
    return pytree.tree_map(lambda x: x.to(dtypes.get(x.dtype, x.dtype)) if isinstance(x, Tensor) else x, tree)


def detach_computed(model: nn.Module) -> None:
    """Legacy weight norm leaves a weight behind that it computes anew at every call, and that cannot be copied."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook, "name", None)
            if isinstance(name, str) and isinstance(vars(module).get(name), Tensor):
                vars(module)[name] = vars(module)[name].detach()


def doubled(inputs: Any) -> Any:
    """The inputs with floating-point tensors in float64, and complex ones in complex128."""
    return _cast_leaves(inputs, _WIDE)


def laid_out(inputs: Inputs, layout: str) -> tuple[Any, ...]:
    """PyTorch's inputs as an ensemble takes them by position that was ported with this `input_layout`."""
    entries = Arguments.of(inputs).entries
    if layout == "torch":
        return entries
    return tensors_mapped(lambda x: x.movedim(1, -1) if x.ndim >= 3 else x, entries)


def loop(models: Sequence[nn.Module], inputs: Inputs | Sequence[Inputs]) -> list[Any]:
    """Every member's outputs; `inputs` are one call's arguments, or a list with those of each member.

    **Raises:** `CannotRun` where a member's forward raises.
    """
    per_member: list[Any] = inputs if isinstance(inputs, list) else [inputs] * len(models)
    try:
        return [evaluated(model, arguments) for model, arguments in zip(models, per_member, strict=True)]
    except CannotRun:
        raise
    except Exception as error:  # as of inputs for other models
        own = _in_own_precision(models[0], per_member[0]) or error
        raise CannotRun(
            f"PyTorch itself cannot run {type(models[0]).__name__} on these inputs ({shapes(per_member[0])}): "
            f"{described(own)}",
            details=str(own),
        ) from error


def _in_own_precision(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What the model says in float32, if it fails there as well: of a copy in float64, users know nothing."""
    (single_model,), single_inputs = in_single([model], inputs)
    try:
        with single():
            evaluated(single_model, single_inputs)
    except Exception as error:  # which is what is asked for
        return error
    return None


def shapes(inputs: Any) -> str:
    """Dtypes and shapes of inputs, as errors name them."""
    leaves = pytree.tree_leaves(inputs)
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in leaves
    )


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What a model gives for inputs that it may write into."""
    return Arguments.of(tensors_mapped(Tensor.clone, inputs)).call(model)


def evaluated(model: nn.Module, inputs: Inputs) -> Any:
    """The same without gradients, which are on only where the forward itself takes some."""
    try:
        with torch.no_grad():
            return called(model, inputs)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return tensors_mapped(Tensor.detach, called(model, inputs))


def mapped(models: Sequence[nn.Module], inputs: Inputs | list[Inputs]) -> Callable[[], dict[str, Tensor]]:
    """A call of all members by `torch.func`: `stack_module_state` beforehand, then `functional_call` under `vmap`.

    It gives the tensors among the outputs by place, `[M, ...]`.
    """
    params, buffers = torch.func.stack_module_state(list(models))
    base = copy.deepcopy(models[0])  # PyTorch leaves mapped tensors in modules that stand under several names
    each = isinstance(inputs, list)
    tensors, calling = with_tensors(stacked_inputs(inputs) if isinstance(inputs, list) else inputs)

    def call(params: Any, buffers: Any, tensors: list[Tensor]) -> dict[str, Tensor]:
        arguments = calling(tensors)
        return arrays_of(functional_call(base, (params, buffers), *arguments))

    vectorised = torch.func.vmap(call, in_dims=(0, 0, 0 if each else None), randomness="different")
    return torch.no_grad()(lambda: vectorised(params, buffers, tensors))


def with_tensors(inputs: Inputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Arguments]]:
    """The tensors of inputs, which `torch.func` can map, and what makes the arguments of a call of such."""
    leaves, spec = pytree.tree_flatten(Arguments.of(inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def arguments(tensors: Sequence[Tensor]) -> Arguments:
        found = iter(tensors)
        return pytree.tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return tensors, arguments


def stacked_inputs(per_member: Sequence[Inputs]) -> Any:
    """Inputs `[M, ...]` of those of every member; what is no tensor is the same for all."""
    return pytree.tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0], *per_member)


def resized(inputs: Inputs, size: int, batch_axis: Any, seed: int = 0) -> Arguments:
    """Inputs with another batch size: rows taken in turn, floating ones scaled and shifted so that no two are equal."""
    inputs = Arguments.of(inputs)
    axes = axes_of(inputs, batch_axis)
    given = batch_size(inputs, batch_axis)
    generator = torch.Generator().manual_seed(seed)

    def resize(x: Any, axis: int | None) -> Any:
        if not isinstance(x, Tensor) or axis is None or x.ndim <= axis or x.shape[axis] != given:
            return x
        rows = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
        if not has_fractions(x):
            return rows
        shape = [size if k == axis else 1 for k in range(x.ndim)]
        scale = torch.rand(shape, generator=generator, dtype=torch.float64).to(x)
        return rows * (0.75 + 0.5 * scale)

    pairs = zip(inputs.entries, axes, strict=True)
    return inputs.replaced([pytree.tree_map(lambda x, axis=axis: resize(x, axis), value) for value, axis in pairs])


def batch_size(inputs: Inputs, batch_axis: Any) -> int | None:
    """The size of the inputs along the batch axis, that of the first tensor that has one."""
    arguments = Arguments.of(inputs)
    for value, axis in zip(arguments.entries, axes_of(arguments, batch_axis), strict=True):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and axis is not None and leaf.ndim > axis:
                return leaf.shape[axis]
    return None


def per_member(inputs: Inputs, members: int, batch_axis: Any) -> list[Inputs]:
    """Inputs of its own for every member, of equal shapes."""
    size = batch_size(inputs, batch_axis)
    if size is None:
        return [pytree.tree_map(lambda x, k=k: _scaled(x, 1 + 0.1 * k), inputs) for k in range(members)]
    return [resized(inputs, size, batch_axis, seed=k + 1) for k in range(members)]


def _scaled(x: Any, factor: float) -> Any:
    return x * factor if isinstance(x, Tensor) and has_fractions(x) else x
