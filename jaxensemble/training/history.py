"""History of the epochs of `fit`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """Losses and metrics of the members, epoch by epoch.

    - `loss`: the loss on minibatches, as the mean over the steps of an epoch, `[epochs, M]`.
    - `validation`: `loss` and all metrics on the validation set after each epoch, `[epochs, M]` each.
    - `active`: which members were trained in an epoch, `[epochs, M]`; a member that has stopped no longer changes.

    >>> history = History(np.array([[2.0, 3.0], [1.0, 2.0]]), {"loss": np.array([[1.0, 5.0], [2.0, 4.0]])})
    >>> len(history), history.best.tolist()
    (2, [0, 1])
    """

    loss: np.ndarray
    validation: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    active: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), bool))

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def best(self) -> np.ndarray:
        """The epoch with every member's least validation loss, `[M]`; without validation, its least training loss."""
        losses = self.validation.get("loss", self.loss)
        return np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0)

    def after(self, loss: np.ndarray, validation: Mapping[str, np.ndarray], active: np.ndarray) -> "History":
        """Returns the history with one more epoch; every array is `[M]`."""
        more = lambda rows, row: np.concatenate([rows, row[None]]) if len(rows) else row[None]  # noqa: E731
        measured = {name: more(self.validation.get(name, ()), row) for name, row in validation.items()}
        return History(more(self.loss, loss), measured, more(self.active, active))

    def to_json(self) -> dict[str, Any]:
        """Returns the history as plain data."""
        return {
            "loss": self.loss.tolist(),
            "validation": {name: values.tolist() for name, values in self.validation.items()},
            "active": self.active.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "History":
        """Returns the history from the data of `to_json`."""
        validation = {name: np.array(values) for name, values in content["validation"].items()}
        return cls(np.array(content["loss"]), validation, np.array(content["active"], bool))

    def plot(self, path: str | Path) -> None:
        """Draws a curve for every member into a picture file, with a panel for the loss and for every metric."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "pictures are drawn by matplotlib: pip install 'jaxensemble[plots]'", name=error.name
            ) from error
        metrics = [name for name in self.validation if name != "loss"]
        figure = Figure(figsize=(4.5 * (1 + len(metrics)), 3.5), layout="constrained")
        epochs = np.arange(1, len(self) + 1)
        for axis, name in zip(figure.subplots(1, 1 + len(metrics), squeeze=False)[0], ["loss", *metrics], strict=True):
            for values, style, label in self._lines(name):
                lines = axis.plot(epochs, values, style, linewidth=0.8, alpha=0.7)
                lines[0].set_label(label)
            axis.set(xlabel="epoch", ylabel=name, title=f"{name} of {self.loss.shape[1]} members")
            axis.locator_params("x", integer=True)
            axis.legend()
        figure.savefig(path, dpi=150)

    def _lines(self, name: str) -> list[tuple[np.ndarray, str, str]]:
        found = [(self.loss, "--C0", "training")] if name == "loss" else []
        return [*found, *([(self.validation[name], "-C1", "validation")] if name in self.validation else [])]
