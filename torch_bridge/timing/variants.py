"""Ways of running an ensemble that are compared: PyTorch's and ours."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from jaxensemble.arrays import as_arrays
from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.state import merge
from jaxensemble.network.arguments import insert_fixed, keep_arrays
from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.outputs import arrays_of
from torch_bridge.parity import reference

Runnable = Callable[[], Any]

OURS = "jaxensemble"
PLAIN_JAX = "jax.jit(jax.vmap)"


def torch_variants(device: str, *, images: bool) -> list[str]:
    """Returns the names of PyTorch's ways on a device, with channels-last ways for images.

    - `member`: the forward is compiled once, and members run one after another, which saves minutes for large networks.
    - `graph`: all kernels of a call are recorded in one CUDA graph. CPUs have no such graphs, and there
      `reduce-overhead`, which uses them too, is the default mode.
    """
    modes = ["default", "max-autotune"] if device == "cpu" else ["default", "reduce-overhead", "max-autotune"]
    layouts = ["", ", channels_last"] if images else [""]
    ways = [*(f"loop{layout}" for layout in layouts), "torch.func.vmap"]
    members = [f"compile(member{layout}, default)" for layout in layouts]
    compiled = [f"compile({way}, {mode})" for mode in modes for way in ways]
    held = [*ways, *members, *(name for name in compiled if name.endswith(", default)"))]
    return [*ways, *compiled, *members, *(f"graph({name})" for name in held if device != "cpu")]


def is_loop(name: str) -> bool:
    """Returns whether a way gives a list of the members' outputs, not one stack."""
    return "torch.func.vmap" not in name


def split_mode(name: str) -> tuple[str, str | None]:
    """Returns a way and the mode in which it is compiled; None for a way that is not compiled.

    >>> split_mode("compile(loop, channels_last, default)"), split_mode("loop")
    (('loop, channels_last', 'default'), ('loop', None))
    """
    if not name.startswith("compile("):
        return name, None
    way, _, mode = name.removeprefix("compile(").removesuffix(")").rpartition(", ")
    return way, mode


def recorded_way(name: str) -> str | None:
    """Returns the way of which a CUDA graph is recorded; None without a graph.

    >>> recorded_way("graph(compile(loop, default))"), recorded_way("loop")
    ('compile(loop, default)', None)
    """
    return name.removeprefix("graph(").removesuffix(")") if name.startswith("graph(") else None


def torch_call(name: str, models: Sequence[nn.Module], inputs: Arguments | tuple[Any, ...]) -> Runnable:
    """Returns the call of all members in PyTorch, the way `name`. It gives their outputs, stacked or as a list."""
    inner = recorded_way(name)
    if inner:
        return record_graph(torch_call(inner, models, inputs))
    arguments = Arguments.of(inputs)
    way, mode = split_mode(name)
    if way.endswith(", channels_last"):
        models, arguments = to_channels_last(models, arguments)
    function, given = _WAYS[way.removesuffix(", channels_last")](models, arguments, compiler(mode))

    def call() -> Any:
        with torch.inference_mode():
            return function(*given)

    return call


def compiler(mode: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a function that compiles functions in a mode; without a mode, it leaves them as they are."""
    return (lambda function: function) if mode is None else partial(torch.compile, mode=mode, dynamic=False)


def shared_forward(models: Sequence[nn.Module]) -> Callable[[Any, Any, Any], Any]:
    """Returns the forward that members share, as a function of parameters, buffers and inputs."""
    base = copy.deepcopy(models[0]).to("meta")
    return lambda params, buffers, inputs: functional_call(base, (params, buffers), *inputs)


def record_graph(call: Runnable, *, warm_ups: int = 3) -> Runnable:
    """Returns a call that replays the kernels of `call` from a CUDA graph, into the same outputs.

    Calls on another stream come first, see https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


_Way = tuple[Callable[..., Any], tuple[Any, ...]]


def _loop(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> _Way:
    return compiled(lambda positional, named: [model(*positional, **named) for model in models]), tuple(inputs)


def _vmap(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> _Way:
    params, buffers = stack_module_state(list(models))
    tensors, calling = reference.split_tensors(inputs)
    member = shared_forward(models)
    function = compiled(vmap(lambda params, buffers, x: arrays_of(member(params, buffers, calling(x))), (0, 0, None)))
    return function, ({k: v.detach() for k, v in params.items()}, buffers, tensors)


def _member(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> _Way:
    member = compiled(shared_forward(models))
    states = [({k: v.detach() for k, v in m.named_parameters()}, dict(m.named_buffers())) for m in models]
    return lambda *inputs: [member(*state, inputs) for state in states], tuple(inputs)


_WAYS = {"loop": _loop, "torch.func.vmap": _vmap, "member": _member}


def to_channels_last(models: Sequence[nn.Module], inputs: Any) -> tuple[list[nn.Module], Any]:
    """Returns copies of the models, and their inputs, with channels last in memory."""
    to_last: Any = {"memory_format": torch.channels_last}
    return [copy.deepcopy(model).to(**to_last) for model in models], pytree.tree_map(_image_channels_last, inputs)


def _image_channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def jax_call(name: str, ensemble: Ensemble, inputs: tuple[Any, ...]) -> Runnable:
    """Returns the call of all members in JAX; `inputs` are those with arrays. Ours is tuned first."""
    arrays = jax.device_put(as_arrays(inputs, "inputs"))
    if name == OURS:
        everything = insert_fixed(ensemble.network, arrays)
        tuned = ensemble.tune(*everything)
        return lambda: tuned(*everything)

    @jax.jit
    def run(params: Any, buffers: Any, arrays: Any) -> Any:
        def member(params: Any, buffers: Any) -> Any:
            return keep_arrays(merge(ensemble.graphdef, params, buffers, ensemble.constants, one_rngs)(*arrays))

        return jax.vmap(member)(params, buffers)

    one_rngs = jax.tree.map(lambda leaf: leaf[0], ensemble.rngs)
    return lambda: run(ensemble.params, ensemble.buffers, arrays)
