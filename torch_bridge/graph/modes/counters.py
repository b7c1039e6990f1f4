"""Counters of batches, which normalisation increments in training."""

import torch
from torch import fx, nn
from torch.export import ExportedProgram

COUNTER = "torch_bridge: counts batches"
"""The key in a placeholder's `meta` that marks a counter."""


def counter_of(node: fx.Node) -> fx.Node | None:
    """Returns the counter in `num_batches_tracked += 1`, which a BatchNorm layer does in each of its calls, or None."""
    counter = node.args[0] if node.args else None
    if node.target != torch.ops.aten.add_.Tensor or not isinstance(counter, fx.Node):
        return None
    return counter if COUNTER in counter.meta else counter_of(counter)


def find_unchanged_counters(model: nn.Module, training: ExportedProgram) -> frozenset[str]:
    """Returns the keys of counters of BatchNorms whose forwards do not count, for example those of a subclass."""
    keys, held = training.graph_signature.inputs_to_buffers, dict(model.named_buffers(remove_duplicate=False))
    nodes = [node for node in map(counter_of, training.graph.nodes) if node is not None]
    counted = {id(held[keys[node.name]]) for node in nodes}  # a buffer may have several names
    batch_norm = nn.modules.batchnorm._BatchNorm
    return frozenset(
        key
        for key in keys.values()
        if id(held[key]) not in counted
        and is_counter(model, key)
        and isinstance(model.get_submodule(key.rpartition(".")[0]), batch_norm)
    )


def mark_counters(model: nn.Module, program: ExportedProgram) -> None:
    """Marks the placeholders of counters that normalisation keeps."""
    keys = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in keys and is_counter(model, keys[node.name]):
            node.meta[COUNTER] = True


def is_counter(model: nn.Module, key: str) -> bool:
    """Returns whether a buffer counts the batches of one of PyTorch's layers. The ported layer counts them itself."""
    path, _, name = key.rpartition(".")
    return name == "num_batches_tracked" and isinstance(model.get_submodule(path), nn.modules.batchnorm._NormBase)
