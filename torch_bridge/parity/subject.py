"""The subject of a check: models, ensemble and inputs, and how they are laid out."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.network.weight_map import Origin
from jaxensemble.running.prepared import Prepared
from torch_bridge.graph.examples import Arguments, BatchAxis
from torch_bridge.graph.forward import Inputs
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.parity.draws import can_draw
from torch_bridge.parity.inputs import ensemble_inputs
from torch_bridge.parity.metrics import EXACT, EXACT_DEEP, arrays_by_place


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """The models, the ensemble and the inputs that a check compares, and the options of the check."""

    members: list[nn.Module]
    ensemble: Ensemble
    inputs: Arguments
    thorough: bool
    train: bool
    key: jax.Array
    input_layout: str
    output_layout: str
    prepared: Prepared | None = None

    @property
    def origin(self) -> Origin | None:
        """The origin of an ensemble that was ported; None for other ensembles."""
        return self.ensemble.origin if isinstance(self.ensemble.origin, Origin) else None

    @functools.cached_property
    def opened(self) -> OpenAxes:
        """The axes whose sizes stay open."""
        return OpenAxes.of_ensemble(self.ensemble) if self.origin else OpenAxes()

    @property
    def batch_axis(self) -> BatchAxis:
        """The axis of the rows, as for `to_ensemble`."""
        return self.opened.batch_axis

    @property
    def limit(self) -> float:
        """The largest float64 error of an output that passes."""
        layers = len(self.ensemble.network.layers) if self.ensemble.network is not None else 0
        return EXACT if layers <= 100 else EXACT_DEEP

    def is_random(self) -> bool:
        """Returns whether the ensemble draws random numbers for these inputs."""
        return can_draw(self.ensemble, self.arrays(self.inputs))

    def arrays(self, inputs: Inputs) -> tuple[Any, ...]:
        """The inputs as the ensemble takes them, by position."""
        return ensemble_inputs(inputs, self.input_layout)

    def results(self, outputs: Any) -> dict[str, np.ndarray]:
        """The outputs of the ensemble by place, in PyTorch's layout."""
        found = arrays_by_place(outputs)
        if self.output_layout == "torch":
            return found
        return {place: np.moveaxis(array, -1, 2) if array.ndim >= 4 else array for place, array in found.items()}
