"""The ways of running an ensemble that are compared: PyTorch's, and ours."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from jaxensemble.ensemble import Ensemble
from jaxensemble.inputs import as_arrays
from jaxensemble.state import merge
from torch_bridge.compat import pytree

Call = Callable[[], Any]

OURS = "jaxensemble"
PLAIN = "jax.jit(jax.vmap)"


def torch_variants(device: str, *, images: bool) -> list[str]:
    """The names of PyTorch's ways on a device; channels-last ones where there are images.

    On CPUs, `reduce-overhead` is the default mode: it is about CUDA graphs.
    """
    modes = ["default", "max-autotune"] if device == "cpu" else ["default", "reduce-overhead", "max-autotune"]
    loops = ["loop", *(["loop, channels_last"] if images else [])]
    maps = ["torch.func.vmap"]
    compiled = [f"compile({way}, {mode})" for mode in modes for way in (*loops, *maps)]
    return [*loops, *maps, *compiled]


def is_loop(name: str) -> bool:
    """Whether a way gives a list with the outputs of every member, and not one stack."""
    return "torch.func.vmap" not in name


def mode_of(name: str) -> tuple[str, str | None]:
    """A way and the mode in which it is compiled; None for one that is not.

    >>> mode_of("compile(loop, channels_last, default)"), mode_of("loop")
    (('loop, channels_last', 'default'), ('loop', None))
    """
    if not name.startswith("compile("):
        return name, None
    way, _, mode = name.removeprefix("compile(").removesuffix(")").rpartition(", ")
    return way, mode


def torch_call(name: str, models: Sequence[nn.Module], inputs: tuple[Any, ...]) -> Call:
    """One call of all members in PyTorch, as `name` says; outputs of all members, stacked or as a list."""
    way, mode = mode_of(name)
    function, arguments = _way(way, models, inputs)
    if mode is not None:
        function = torch.compile(function, mode=mode, dynamic=False)

    def call() -> Any:
        with torch.inference_mode():
            return function(*arguments)

    return call


def _way(name: str, models: Sequence[nn.Module], inputs: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if name == "torch.func.vmap":
        base = copy.deepcopy(models[0]).to("meta")
        params, buffers = stack_module_state(list(models))

        def member(params: Any, buffers: Any, inputs: Any) -> Any:
            return functional_call(base, (params, buffers), inputs)

        return vmap(member, (0, 0, None)), ({k: v.detach() for k, v in params.items()}, buffers, inputs)
    if name == "loop, channels_last":
        models, inputs = channels_last(models, inputs)

    def loop(*inputs: Any) -> list[Any]:
        return [model(*inputs) for model in models]

    return loop, inputs


def channels_last(models: Sequence[nn.Module], inputs: Any) -> tuple[list[nn.Module], Any]:
    """Copies of the models, and their inputs, with channels last in memory."""
    to_last: Any = {"memory_format": torch.channels_last}
    return [copy.deepcopy(model).to(**to_last) for model in models], pytree.tree_map(_channels_last, inputs)


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def jax_call(name: str, ensemble: Ensemble, inputs: tuple[Any, ...]) -> Call:
    """One call of all members in JAX. Ours is tuned first."""
    arrays = jax.device_put(as_arrays(inputs, "inputs"))
    if name == OURS:
        tuned = ensemble.tune(*arrays)
        return lambda: tuned(*arrays)

    @jax.jit
    def run(params: Any, buffers: Any, arrays: Any) -> Any:
        def member(params: Any, buffers: Any) -> Any:
            return merge(ensemble.graphdef, params, buffers, ensemble.constants, one_rngs)(*arrays)

        return jax.vmap(member)(params, buffers)

    one_rngs = jax.tree.map(lambda leaf: leaf[0], ensemble.rngs)
    return lambda: run(ensemble.params, ensemble.buffers, arrays)
