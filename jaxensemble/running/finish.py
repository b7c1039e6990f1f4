"""Predictions as the last steps of a call's program."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxensemble.network.arguments import restore_outputs
from jaxensemble.network.network import Network, ReferenceTree
from jaxensemble.uncertainty.predictions import find_nan, read_outputs


@dataclasses.dataclass(frozen=True)
class PredictionSteps:
    """The steps from the outputs of all members to their prediction, as a function that a program can hold.

    - `task`, `class_axis`: as in `Prediction.from_outputs`.
    - `outputs`: the outputs of a ported network; None for any other network.
    """

    task: str
    class_axis: int | None
    outputs: ReferenceTree = dataclasses.field(hash=False)

    @classmethod
    def of(cls, task: str, options: Mapping[str, Any], network: Network | None) -> "PredictionSteps | None":
        """Returns the steps for checked options; None for options that are checked against the values of outputs."""
        axis, scale = options.get("class_axis"), options.get("outputs_are", "logits")
        if not (axis is None or type(axis) is int) or not (isinstance(scale, str) and scale == "logits"):
            return None
        return cls(task, axis, None if network is None else network.outputs)

    def __call__(self, outputs: Any) -> Any:
        """Returns the prediction, and the members and rows `[M, N]` that are NaN."""
        outputs = outputs if self.outputs is None else restore_outputs(self.outputs, outputs)
        options = {} if self.class_axis is None else {"class_axis": self.class_axis}
        prediction = read_outputs(getattr(outputs, "logits", outputs), self.task, **options)
        return prediction, find_nan(prediction)


@dataclasses.dataclass(frozen=True)
class FigureSteps:
    """The steps from the outputs of all members to some figures of their prediction, which alone leave the device."""

    steps: PredictionSteps
    names: tuple[str, ...]

    def __call__(self, outputs: Any) -> Any:
        """Returns the figures by name, and the members `[M]` and rows `[N]` that are NaN."""
        prediction, lost = self.steps(outputs)
        return {name: getattr(prediction, name) for name in self.names}, (lost.any(1), lost.any(0))
