"""PyTorch's own results: every member run alone, or all members under `torch.func.vmap`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jaxensemble.errors import InputError, describe_error
from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.forward import Inputs, describe_shapes, evaluate_model
from torch_bridge.graph.outputs import arrays_of
from torch_bridge.parity.inputs import stack_inputs
from torch_bridge.parity.precision import single_copies, single_precision


class CannotRun(InputError):
    """PyTorch cannot run the models on these inputs."""


def run_loop(models: Sequence[nn.Module], inputs: Inputs | Sequence[Inputs]) -> list[Any]:
    """Runs every member. `inputs` are the arguments of one call, or a list with the arguments for each member.

    **Returns:** the outputs of every member.

    **Raises:** `CannotRun` where a member's forward raises.
    """
    per_member: list[Any] = inputs if isinstance(inputs, list) else [inputs] * len(models)
    try:
        return [evaluate_model(model, arguments) for model, arguments in zip(models, per_member, strict=True)]
    except CannotRun:
        raise
    except Exception as error:  # for example inputs for other models
        own = _own_error(models[0], per_member[0]) or error
        raise CannotRun(
            f"PyTorch itself cannot run {type(models[0]).__name__} on these inputs ({describe_shapes(per_member[0])}): "
            f"{describe_error(own)}",
            details=str(own),
        ) from error


def _own_error(model: nn.Module, inputs: Inputs) -> Exception | None:
    """The error that the model raises in float32, if it fails there too. Users know nothing of a copy in float64."""
    (single_model,), single_inputs = single_copies([model], inputs)
    try:
        with single_precision():
            evaluate_model(single_model, single_inputs)
    except Exception as error:  # the result asked for
        return error
    return None


def vmapped_call(models: Sequence[nn.Module], inputs: Inputs | list[Inputs]) -> Callable[[], dict[str, Tensor]]:
    """Prepares a call of all members by `torch.func`.

    `stack_module_state` runs now, and `functional_call` under `vmap` at each call. The call returns the tensors among
    the outputs by place, `[M, ...]`.
    """
    params, buffers = torch.func.stack_module_state(list(models))
    base = copy.deepcopy(models[0])  # PyTorch leaves mapped tensors in modules that have several names
    each = isinstance(inputs, list)
    tensors, calling = split_tensors(stack_inputs(inputs) if isinstance(inputs, list) else inputs)

    def call(params: Any, buffers: Any, tensors: list[Tensor]) -> dict[str, Tensor]:
        arguments = calling(tensors)
        return arrays_of(functional_call(base, (params, buffers), *arguments))

    vectorised = torch.func.vmap(call, in_dims=(0, 0, 0 if each else None), randomness="different")
    return torch.no_grad()(lambda: vectorised(params, buffers, tensors))


def split_tensors(inputs: Inputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Arguments]]:
    """Splits the tensors, which `torch.func` can map, from the other arguments.

    **Returns:** the tensors, and a function that makes the arguments of a call from such tensors.
    """
    leaves, spec = pytree.tree_flatten(Arguments.of(inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def arguments(tensors: Sequence[Tensor]) -> Arguments:
        found = iter(tensors)
        return pytree.tree_unflatten([next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return tensors, arguments
