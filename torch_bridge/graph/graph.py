"""`TorchGraph`: a module's forward as a graph of operations, and what its inputs, outputs and weights are."""

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
    - `constants`: placeholder name to tensor, for tensors that are no part of the module's state.
    - `inputs`: one tree for each argument, of references to placeholders by name and of what is fixed; `arguments`:
      their names, empty for those that are given by position alone. `outputs`: a tree of nodes and what is fixed.
    - `modules`: path to module, for every submodule.
    - `evaluation_only`: why there is no training mode, or None.
    - `open_axes`: placeholder name to the names of the open axes of that input; `sizes`: what those may be, but the
      batch's.
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
