"""Ensembles, built from a network and its stacked weights."""

from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.build import fill_state, skeleton
from jaxensemble.modules.randomness import split_rngs
from jaxensemble.network.weight_map import Origin
from torch_bridge.graph.examples import BatchAxis
from torch_bridge.lowering import Lowered
from torch_bridge.lowering.convert import constant_arrays
from torch_bridge.members.stack import Stack


def build_ensemble(lowered: Lowered, stack: Stack, name: str, batch_axis: BatchAxis, input_layout: str) -> Ensemble:
    """Builds an ensemble from a network and a filled stack."""
    state = fill_state(skeleton(lowered.network), stack.take() | constant_arrays(lowered), stack.members)
    rngs = split_rngs(state.rngs, stack.members)
    origin = Origin(name, lowered.weights, batch_axis, input_layout)
    return Ensemble(state.graphdef, state.params, state.buffers, state.constants, rngs, lowered.network, origin)
