"""`to_flax` and `to_ensemble`: PyTorch modules to Flax modules and ensembles."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import MemberError, ParityError
from jaxensemble.modules.build import fill_state, skeleton
from jaxensemble.modules.state import merge
from torch_bridge import parity
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.examples import Arguments, BatchAxis
from torch_bridge.graph.modes.switch import PortedMode, ported_mode, warn_of_training
from torch_bridge.graph.sizes.open_axes import Dynamic, OpenAxes
from torch_bridge.lowering import Lowered
from torch_bridge.lowering.convert import constant_arrays, convert
from torch_bridge.members.finite import check_finite
from torch_bridge.members.same_network import check_members, dropout_rates, list_members
from torch_bridge.members.stack import Stack, stored_array, warn_of_equal_members
from torch_bridge.members.tensors import check_tensors, tensors_of
from torch_bridge.parity.result import proof_of
from torch_bridge.porting.ensemble import build_ensemble


def to_flax(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_axis: BatchAxis = 0,
    dynamic: Dynamic = None,
    input_layout: str = "torch",
    mode: PortedMode | None = None,
) -> nnx.Module:
    """Ports one PyTorch module to a Flax module with its weights.

    **Arguments:**

    - `model`: any module whose forward `torch.export` can follow.
    - `example_inputs`: the positional arguments of one call, as a tuple: tensors, and tuples, lists and dicts of them.
      Other arguments (a flag, a number, a string, None) are fixed: `network.fixed` and the source name them.
    - `example_kwargs`: the arguments that are given by name.
    - `batch_axis`: the axis of the inputs whose size stays open. A tuple names one for each input; None fixes all
      shapes.
    - `dynamic`: further axes whose sizes stay open, by argument (its name, or its place), with names that you choose:
      `{"ids": {1: "length"}, "mask": {1: "length"}}`. Axes of one name have one size. Instead of a name,
      `torch.export.Dim("length", min=2, max=512)` limits the size. Limits of the forward itself, such as a kernel's
      size or a multiple of 32, are found automatically and are in `network.sizes`. Every size is one more compilation.
    - `input_layout`: `"torch"` for inputs in PyTorch's layout (`[N, C, H, W]`), `"NHWC"` for channels-last inputs.
      Outputs have PyTorch's layout.
    - `mode`: `"eval"` or `"train"` to port the model in that mode, to which it is switched meanwhile; `"as_is"` for the
      mode that it is in. The default is `"as_is"` with a `TrainingModeWarning` where layers are in training mode.
      `predict` of an ensemble warns of these layers for every `mode`.

    **Returns:** an `nnx.Module` in that mode, with submodules named as in PyTorch. It takes the arguments that hold
    tensors, without those that are fixed.

    **Raises:** `UnsupportedError` naming everything that cannot be carried exactly.

    >>> import numpy as np
    >>> import torch
    >>> linear = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
    >>> module = to_flax(linear, (torch.ones(1, 3),))
    >>> bool(abs(module(np.ones((5, 3), "float32")) - linear(torch.ones(5, 3)).detach().numpy()).max() < 1e-6)
    True
    """
    with ported_mode([model], mode):
        arguments = Arguments.of(example_inputs, example_kwargs)
        opened = OpenAxes.of(arguments, arguments.names(model), batch_axis, dynamic)
        lowered = convert(model, arguments, opened, input_layout)
    tensors = tensors_of(model)
    arrays = {
        entry.path: jnp.array(stored_array(entry, tensors[entry.keys[0]], f"`{entry.keys[0]}`"))
        for entry in lowered.weights.entries
    }
    state = fill_state(skeleton(lowered.network), arrays | constant_arrays(lowered))
    warn_of_training(state.graphdef, mode)
    return merge(*state)


def to_ensemble(
    models: Sequence[nn.Module],
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_axis: BatchAxis = 0,
    dynamic: Dynamic = None,
    input_layout: str = "torch",
    mode: PortedMode | None = None,
    check: bool = True,
    allow_nonfinite: bool = False,
) -> Ensemble:
    """Ports an ensemble of PyTorch modules: one Flax network, and the stacked weights of the members.

    **Arguments:**

    - `models`: modules that differ only in the values of their tensors.
    - `example_inputs`, `example_kwargs`, `batch_axis`, `dynamic`, `input_layout`, `mode`: as in `to_flax`.
    - `check`: whether to prove at once that the ensemble gives what the models give: weights bit for bit, and outputs
      for the example inputs in float64 and in the models' own precision. The result is the ensemble's `proof`.
      `torch_bridge.check` proves more.
    - `allow_nonfinite`: whether to accept parameters that are NaN or infinite, and buffers that are NaN.

    **Returns:** an `Ensemble`. An `EqualMembersWarning` names members whose weights are all equal.

    **Raises:** `MemberError` with every difference between members, `InputError` for weights that are not finite,
    `UnsupportedError` for everything that cannot be carried exactly, `ParityError` when the proof fails.

    >>> import torch
    >>> models = [torch.nn.Linear(3, 3) for _ in range(5)]
    >>> ensemble = to_ensemble(models, (torch.randn(64, 3),))
    >>> ensemble(torch.randn(64, 3)).shape
    (5, 64, 3)
    """
    members, arguments = list_members(models), Arguments.of(example_inputs, example_kwargs)
    for member in members:
        check_tensors(member)
    opened = OpenAxes.of(arguments, arguments.names(members[0]), batch_axis, dynamic)
    with ported_mode(members, mode), keep_caches_empty(members, arguments):
        ensemble = _port_members(members, arguments, opened, input_layout, check, allow_nonfinite)
    warn_of_training(ensemble.graphdef, mode)
    return ensemble


def _port_members(
    members: list[nn.Module],
    arguments: Arguments,
    opened: OpenAxes,
    input_layout: str,
    check: bool,
    allow_nonfinite: bool,
) -> Ensemble:
    """Ports checked members, stacks their weights and, with `check`, proves the ensemble."""
    evaluation_only = check_members(members, rates_may_differ=check)  # a forward might use the rate
    if not allow_nonfinite:
        check_finite(members)
    lowered = convert(members[0], arguments, opened, input_layout, evaluation_only=evaluation_only)
    if evaluation_only is not None:
        _check_alike(members, arguments, lowered, opened, input_layout, evaluation_only)
    stack = Stack(lowered.weights, len(members))
    for k, member in enumerate(members):
        stack.put(k, tensors_of(member))
    warn_of_equal_members(stack, [str(k) for k in range(len(members))])
    ensemble = build_ensemble(lowered, stack, type(members[0]).__name__, opened.batch_axis, input_layout)
    if check:
        report = parity.check(members, ensemble, arguments, thorough=False)
        if not report.passed:
            raise ParityError(
                f"the ported ensemble does not give what PyTorch gives:\n{report.failures}", details=str(report)
            )
        ensemble = ensemble.proven(proof_of([report]))
    return ensemble


def _check_alike(
    members: list[nn.Module],
    arguments: Arguments,
    lowered: Lowered,
    opened: OpenAxes,
    input_layout: str,
    evaluation_only: str,
) -> None:
    """Checks that members with different rates of dropout have the same network: a forward may read a rate itself.

    **Raises:** `MemberError` naming the members that have another network.
    """
    alike = {dropout_rates(members[0]): True}
    for member in members[1:]:
        if dropout_rates(member) not in alike:
            lowered_too = convert(member, arguments, opened, input_layout, evaluation_only=evaluation_only)
            alike[dropout_rates(member)] = lowered_too.network == lowered.network
    other = [str(k) for k, member in enumerate(members) if not alike[dropout_rates(member)]]
    if other:
        raise MemberError(
            f"{evaluation_only}, and the forward of {', '.join(other)} computes with it in evaluation mode, too: build "
            "the members alike, or port them as separate ensembles"
        )
