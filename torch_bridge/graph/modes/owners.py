"""Modules whose mode an operation takes, in models that are in training mode in part."""

from torch import nn
from torch.export import ExportedProgram

from jaxensemble.errors import UnsupportedError
from torch_bridge.graph.modes.agreement import Modes
from torch_bridge.graph.nodes import source_line
from torch_bridge.graph.stand_ins import (
    NAMES,
    training_flag,
)


def check_owners(model: nn.Module, evaluation: ExportedProgram, as_it_is: ExportedProgram, modes: Modes) -> None:
    """Checks that every operation with a mode takes the mode of the module that owns the operation.

    A ported layer has the mode of the module that holds its weights, or without weights, of the module around it.

    **Raises:** `UnsupportedError` for an operation that takes the mode of another module.
    """
    ours, theirs = ([node for node in each.graph.nodes if node.target in NAMES] for each in (evaluation, as_it_is))
    signature = evaluation.graph_signature
    keys = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    same = len(ours) == len(theirs)
    wrong = [] if same else ["it has other operations with a mode than in evaluation mode"]
    for node, twin in zip(ours, theirs, strict=True) if same else ():
        if modes.of[node.name].when != "by_mode":
            continue
        held = [keys[given.name] for given in node.all_input_nodes if given.name in keys]
        scope = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1][0]
        owner = held[0].rpartition(".")[0] if held else scope
        if bool(training_flag(twin)) != model.get_submodule(owner).training:
            wrong.append(
                f"{node.target} does not take that of `{owner or 'itself'}` ({source_line(node) or node.name})"
            )
    if wrong:
        raise UnsupportedError(
            f"{type(model).__name__} is in training mode in part, and its forward takes the mode of other modules than "
            f"those that hold the layers: {'; '.join(wrong)}. Call .eval() or .train() on it, or pass mode='eval'."
        )
