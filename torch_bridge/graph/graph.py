"""`TorchGraph`: a module's forward as a graph of operations, with its inputs, outputs and weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from jaxensemble.network.network import ReferenceTree
from torch_bridge.graph.sizes.open_axes import Limits


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """A module's forward as a functional ATen graph.

    - `weights`: placeholder name to state key, parameters and buffers alike.
    - `constants`: placeholder name to tensor, for tensors that are not part of the module's state.
    - `inputs`: one tree for each argument, of references to placeholders by name and of fixed values.
    - `arguments`: the names of the arguments; empty for arguments that are given by position only.
    - `outputs`: a tree of nodes and fixed values.
    - `evaluation_only`: why there is no training mode, or None.
    - `open_axes`: placeholder name to the names of the input's open axes.
    - `sizes`: the limits of open sizes, except the batch's.
    - `unchanged_counters`: the keys of counters of batches that the forward leaves as they are in training.
    - `updates`: the keys of buffers that the forward itself writes in training, and the values it leaves in them.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: tuple[ReferenceTree, ...]
    arguments: tuple[str, ...]
    outputs: Any
    weights: Mapping[str, str]
    constants: Mapping[str, Tensor]
    open_axes: Mapping[str, Mapping[int, str]]
    sizes: Limits
    evaluation_only: str | None = None
    updates: Mapping[str, fx.Node] = dataclasses.field(default_factory=dict)
    unchanged_counters: frozenset[str] = frozenset()
