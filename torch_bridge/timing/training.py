"""Training steps of all members in the ways that are compared: forward, backward, and Adam's update.

A call makes `STEPS_PER_CALL` steps on the same minibatch. Ours are one program, as in an epoch of `fit`, which takes
every step's rows out of its data. PyTorch and plain JAX have no such program, and get their minibatches ready-made. The
loss is the mean square of the outputs. The learning rate is so small that thousands of steps take the same course.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from jaxensemble.arrays import as_arrays
from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.state import Tree, merge, split
from jaxensemble.network.arguments import insert_fixed, keep_arrays
from jaxensemble.network.inputs import batch_axes
from jaxensemble.training import TrainState
from jaxensemble.training.data import as_data, count_rows
from jaxensemble.training.planning import make_step
from jaxensemble.training.step import run_steps
from torch_bridge.graph.examples import Arguments
from torch_bridge.parity import reference
from torch_bridge.parity.gradients import float_leaves
from torch_bridge.timing.variants import (
    OURS,
    Runnable,
    compiler,
    record_graph,
    recorded_way,
    shared_forward,
    split_mode,
    to_channels_last,
)

RATE = 1e-10
STEPS_PER_CALL = 10
"""Number of steps in one call."""


def torch_step(name: str, models: Sequence[nn.Module], inputs: Arguments | tuple[Any, ...]) -> Runnable:
    """Returns the call of all members' steps in PyTorch, the way `name`. It gives the losses, a list or a stack."""
    inner = recorded_way(name)
    if inner:
        return record_graph(torch_step(inner, models, inputs), warm_ups=1)  # a call makes ten steps
    way, mode = split_mode(name)
    arguments = Arguments.of(inputs)
    models = [copy.deepcopy(model).train().requires_grad_(True) for model in models]
    if way.endswith(", channels_last"):
        models, arguments = to_channels_last(models, arguments)
    return _repeat_step(_STEPS[way.removesuffix(", channels_last")](models, arguments, compiler(mode)))


def _repeat_step(step: Runnable) -> Runnable:
    def steps() -> Any:
        losses = step()
        for _ in range(STEPS_PER_CALL - 1):
            step()
        return losses

    return steps


def _loop_step(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> Runnable:
    losses = compiled(lambda positional, named: [_torch_square(model(*positional, **named)) for model in models])
    return _adam_step(models, lambda: losses(*inputs))


def _member_step(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> Runnable:
    member = shared_forward(models)
    loss = compiled(lambda params, buffers, inputs: _torch_square(member(params, buffers, inputs)))
    states = [(dict(model.named_parameters()), dict(model.named_buffers())) for model in models]
    return _adam_step(models, lambda: [loss(*state, tuple(inputs)) for state in states])


def _adam_step(models: Sequence[nn.Module], losses: Callable[[], list[Tensor]]) -> Runnable:
    optimizer = _make_adam([param for model in models for param in model.parameters()])

    def step() -> list[Tensor]:
        found = losses()
        optimizer.zero_grad()
        torch.stack(found).sum().backward()
        optimizer.step()
        return [loss.detach() for loss in found]

    return step


def _mapped_step(models: Sequence[nn.Module], inputs: Arguments, compiled: Callable[..., Any]) -> Runnable:
    member = shared_forward(models)
    params, buffers = stack_module_state(list(models))
    optimizer = _make_adam(list(params.values()))
    tensors, calling = reference.split_tensors(inputs)

    def loss(params: Any, buffers: Any, tensors: Any) -> Tensor:
        return _torch_square(member(params, buffers, calling(tensors)))

    function = compiled(vmap(torch.func.grad_and_value(loss), (0, 0, None)))

    def step() -> Tensor:
        grads, losses = function({name: param.detach() for name, param in params.items()}, buffers, tensors)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
        return losses

    return step


_STEPS = {"loop": _loop_step, "torch.func.vmap": _mapped_step, "member": _member_step}


def _make_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    fused = not any(param.is_complex() for param in params)  # PyTorch fuses for real numbers only
    return torch.optim.Adam(params, RATE, fused=fused, capturable=params[0].is_cuda)  # so that a CUDA graph can hold it


def _torch_square(outputs: Any) -> Tensor:
    return torch.stack([leaf.square().mean() for leaf in float_leaves(outputs)]).sum()


def _jax_square(outputs: Any, targets: Any = None) -> jax.Array:
    leaves = float_leaves(outputs)
    return sum((jnp.mean(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros((), leaves[0].dtype))


def jax_step(name: str, ensemble: Ensemble, inputs: tuple[Any, ...]) -> Runnable:
    """Returns the call of the steps of all members in JAX: ours, or a plain program of `jax.vmap` and optax."""
    arrays = jax.device_put(as_arrays(inputs, "inputs"))
    optimizer = optax.adam(RATE)
    return (
        _our_steps(ensemble, optimizer, arrays)
        if name == OURS
        else _repeat_step(_plain_step(ensemble, optimizer, arrays))
    )


def _our_steps(ensemble: Ensemble, optimizer: optax.GradientTransformation, arrays: Any) -> Runnable:
    state = TrainState.create(ensemble, optimizer, jax.random.key(0))
    size = count_rows(arrays, batch_axes(ensemble.network, arrays, each=False))
    everything = tuple(insert_fixed(ensemble.network, arrays))
    data, rows = as_data(ensemble, everything, jnp.zeros(size), jnp.arange(size))
    step = make_step(state, data, rows, _jax_square, each=False, plan=None)
    order = jnp.tile(jnp.arange(size), (STEPS_PER_CALL, 1))

    def steps() -> jax.Array:
        nonlocal state
        state, losses = run_steps(state, data, order, None, step=step)
        return losses[0]

    return steps


def _plain_step(ensemble: Ensemble, optimizer: optax.GradientTransformation, arrays: Any) -> Runnable:
    training, one_rngs = ensemble.train(), jax.tree.map(lambda leaf: leaf[0], ensemble.rngs)
    params, buffers = ensemble.params, ensemble.buffers
    opt_state = jax.vmap(optimizer.init)(params)

    @jax.jit
    def run(params: Tree, buffers: Tree, opt_state: Any, arrays: Any) -> Any:
        def loss(params: Tree, buffers: Tree) -> Any:
            module = merge(training.graphdef, params, buffers, ensemble.constants, one_rngs)
            return _jax_square(keep_arrays(module(*arrays))), split(module).buffers

        (losses, buffers), grads = jax.vmap(jax.value_and_grad(loss, has_aux=True))(params, buffers)
        updates, opt_state = jax.vmap(optimizer.update)(jax.tree.map(jnp.conj, grads), opt_state, params)
        return optax.apply_updates(params, updates), buffers, opt_state, losses

    def step() -> jax.Array:
        nonlocal params, buffers, opt_state
        params, buffers, opt_state, losses = run(params, buffers, opt_state, arrays)
        return losses

    return step
