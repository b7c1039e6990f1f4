"""Ensembles, built from a network and its stacked weights."""

from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.ensemble import Ensemble
from jaxensemble.modules.build import fill_state, skeleton
from jaxensemble.modules.randomness import split_rngs
from jaxensemble.network.weight_map import Origin
from torch_bridge.graph.examples import BatchAxis
from torch_bridge.lowering import Lowered
from torch_bridge.lowering.convert import constant_arrays
from torch_bridge.members.stack import Stack


def build_ensemble(
    lowered: Lowered,
    stack: Stack,
    name: str,
    batch_axis: BatchAxis,
    input_layout: str,
    placement: Placement | None = None,
) -> Ensemble:
    """Builds an ensemble from a network and a filled stack, which for a mesh has the members of this process."""
    members, slots = (stack.members,) * 2 if placement is None else (placement.members, placement.slots)
    constants = constant_arrays(lowered)
    if placement is not None:
        constants = placement.put(constants, SHARED)
    state = fill_state(skeleton(lowered.network), stack.take(placement) | constants, slots)
    rngs = split_rngs(state.rngs, members)
    rngs = rngs if placement is None else placement.place(rngs)
    origin = Origin(name, lowered.weights, batch_axis, input_layout)
    trees = state.params, state.buffers, state.constants, rngs
    return Ensemble(state.graphdef, *trees, lowered.network, origin, placement=placement)
