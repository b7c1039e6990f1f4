"""The first module whose output differs between PyTorch and the ported network."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.build import skeleton
from jaxensemble.modules.state import Tree, merge
from jaxensemble.network.arguments import bind_arguments
from jaxensemble.network.weight_map import Origin
from torch_bridge.compat import is_functorch_wrapped_tensor
from torch_bridge.graph.capture import capture
from torch_bridge.graph.forward import Inputs, evaluate_model
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering import OPERATIONS, lower
from torch_bridge.parity.metrics import normwise_error


def first_divergence(
    ensemble: Ensemble, doubles: Sequence[nn.Module], inputs: Inputs, arrays: tuple[Any, ...], limit: float
) -> str | None:
    """Finds the first module call, in order of completion, whose float64 output differs in any member.

    The network is lowered again with every module's output among its outputs, and runs with the ensemble's own weights.

    **Returns:** path and error; None where no single module differs: the outputs agree, or the ensemble was not ported
    from PyTorch.
    """
    origin = ensemble.origin
    if not isinstance(origin, Origin):
        return None
    lowered = lower(
        capture(doubles[0], inputs, OPERATIONS, OpenAxes.of_ensemble(ensemble)), origin.input_layout, observed=True
    )
    state = skeleton(lowered.network)
    arrays = jax.tree.map(np.asarray, bind_arguments(ensemble.network, arrays))

    @jax.jit
    def module_outputs(params: Tree, buffers: Tree) -> dict[str, Any]:
        return merge(state.graphdef, params, buffers, ensemble.constants, state.rngs)(*arrays)

    found: list[tuple[int, int, str]] = []
    for k, model in enumerate(doubles):
        theirs = _module_outputs(model, inputs)
        ours = module_outputs(*jax.tree.map(lambda leaf, k=k: leaf[k], (ensemble.params, ensemble.buffers)))
        for position, (call, expected) in enumerate(theirs):
            if call in ours:
                error, _ = normwise_error(np.asarray(ours[call])[None], expected[None])
                if not error <= limit:
                    found.append((position, k, f"{call.partition('@')[0]} ({error:.1e}, member {k})"))
                    break
    return min(found)[2] if found else None


def _module_outputs(model: nn.Module, inputs: Inputs) -> list[tuple[str, np.ndarray]]:
    """The output of every module call that returns one tensor, in order of completion, under the name of its scope."""
    results: list[tuple[str, np.ndarray]] = []
    calls: dict[str, int] = {}
    handles = []

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            count = calls.get(path, 0)
            calls[path] = count + 1
            if isinstance(output, Tensor) and not is_functorch_wrapped_tensor(output):  # as in torch.func.grad
                results.append((f"{path}@{count}" if count else path, output.detach().cpu().numpy().copy()))

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_hook(keep(path)))
    try:
        evaluate_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return results
