"""`Saved`: the parts of an ensemble that an artifact holds."""

import dataclasses
from typing import Any

from jaxensemble.modules.stacking import count_members
from jaxensemble.modules.state import State
from jaxensemble.network.proof import Lineage, Proof
from jaxensemble.network.sources import Source


@dataclasses.dataclass(frozen=True)
class Saved:
    """The parts of an ensemble that a file or another process keeps.

    - `state`: structure and arrays; all arrays except constants have a leading axis of members.
    - `network`, `origin`: the ported `Network` and its `Origin`, or the values that the ensemble has instead.
    - `proof`, `lineage`, `sources`: as in the ensemble.
    """

    state: State
    network: Any
    origin: Any
    proof: Proof | None = None
    lineage: Lineage | None = None
    sources: tuple[Source, ...] | None = None

    @property
    def members(self) -> int:
        """The number of members."""
        return count_members({"params": self.state.params, "buffers": self.state.buffers})
