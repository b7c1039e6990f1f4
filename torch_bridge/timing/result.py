"""Results of `time`: a row for every variant, and ratios with their intervals."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxensemble.running.device import human_bytes
from torch_bridge.report import draw_table, save_json
from torch_bridge.timing.load import describe_load, is_busy
from torch_bridge.timing.pictures import Bar, draw_bars
from torch_bridge.timing.statistics import ratio_interval

WIDEST = 1.5
"""Largest quotient of the ends of an interval."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Way of running the ensemble, in a process of its own. Times are in seconds.

    - `rounds`: the median call of every block; empty for a variant that failed. Only the fastest have all rounds.
    - `first`: the first call, compilation included.
    - `transfer`: moving inputs to the device and outputs from it, which no other figure includes.
    - `peak`: bytes at the peak, on a CPU beyond what the process had before. Ours includes the plans that it measured.
      NaN where the system does not say (a CPU under Windows); the table shows "unknown".
    - `quartiles`: the range of the middle half of the rounds; for a single round, of its calls.
    - `kinds`: the medians of the two kinds of calls, and the share of the slower kind; None for one kind.
    - `failure`: why there is no figure.
    """

    name: str
    framework: str
    rounds: tuple[float, ...] = ()
    quartiles: tuple[float, float] = (0.0, 0.0)
    first: float = 0.0
    transfer: float = math.nan
    peak: float = math.nan
    failure: str = ""
    note: str = ""
    kinds: tuple[float, float, float] | None = None

    @property
    def median(self) -> float:
        """The seconds of one call of all members; infinite for a variant that failed."""
        return statistics.median(self.rounds) if self.rounds else float("inf")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratio of the speeds of two variants, with its 95 % interval.

    - `why`: remarks on the ratio, and known reasons for a wide interval.
    """

    ours: str
    theirs: str
    value: float
    low: float
    high: float
    rounds: int
    why: str = ""

    @classmethod
    def of(cls, ours: Variant, theirs: Variant) -> "Ratio":
        """Returns the ratio of two variants that were measured in the same rounds."""
        low, high = ratio_interval(ours.rounds, theirs.rounds)
        kinds = [v.name for v in (ours, theirs) if v.kinds]
        why = f"the calls of {' and of '.join(kinds)} fall into two kinds" if kinds else ""
        return cls(ours.name, theirs.name, theirs.median / ours.median, low, high, len(ours.rounds), why)

    def widen(self, control: "Ratio | None", why: str = "") -> "Ratio":
        """Returns the ratio, with its interval widened by the ratio of two processes with the same work.

        `why` is another possible reason for a wide interval.
        """
        reasons = [reason for reason in (why, self.why) if reason]
        if control is None:
            return dataclasses.replace(self, why=", and ".join(reasons))
        if control.withheld:
            reasons.append("two processes with the same work differ by as much")
        low, high = self.low * min(1, control.low), self.high * max(1, control.high)
        return dataclasses.replace(self, low=low, high=high, why=", and ".join(reasons))

    @property
    def decided(self) -> bool:
        """True if one variant is faster: the interval does not contain 1, over at least five rounds."""
        return self.rounds >= 5 and not self.withheld and (self.low > 1 or self.high < 1)

    @property
    def withheld(self) -> bool:
        """True if the interval is too wide for a ratio."""
        return not self.high <= WIDEST * self.low

    def __str__(self) -> str:
        if self.withheld:
            return (
                f"no ratio of {self.ours} and {self.theirs}: its interval, {self.low:.2f} to {self.high:.2f}, is wider "
                f"than a factor of {WIDEST:g}; {self.why or 'more rounds may narrow it'}"
            )
        interval = f"{self.low:.2f} to {self.high:.2f}{'' if self.decided else ', no winner'}"
        return (
            f"{self.ours} is {self.value:.2f} times as fast as {self.theirs} ({interval}){self.why and f'; {self.why}'}"
        )


@dataclasses.dataclass(frozen=True)
class TimingReport:
    """Times of all variants, and the ratios of ours to them; prints as a table.

    - `best`: ours against the fastest of PyTorch's ways; None where ours or all of PyTorch's failed.
    - `plain`: ours against `jax.jit(jax.vmap(...))` of the same network.
    - `control`: ours against itself in another process. Its interval widens the intervals of `best` and `plain`.
    - `rows`: predictions of one call, for the throughput: members times the size of the minibatch.
    - `environment`: the machine, the versions, and the load of other processes meanwhile.
    """

    variants: tuple[Variant, ...]
    best: Ratio | None
    plain: Ratio | None
    control: Ratio | None
    rows: int
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """True if other processes took so much of the cores meanwhile that figures cannot be trusted."""
        load = self.environment.get("load")
        return load is not None and is_busy(load["before"], load["during"], self.environment["cores"])

    def __str__(self) -> str:
        title = "Time of one call" + (", on a machine that was BUSY with others' work" if self.busy else "")
        text = draw_table(title, _COLUMNS, [self._row(v) for v in sorted(self.variants, key=lambda v: v.median)])
        return "\n".join([text, *self._notes()])

    def _notes(self) -> list[str]:
        """Returns the lines below the table: ratios, remarks on variants, and the environment."""
        ratios = [str(ratio) for ratio in (self.best, self.plain) if ratio]
        if self.control:
            ratios.append(f"control, ours against itself: {self.control.low:.2f} to {self.control.high:.2f}")
        notes = [f"{v.name}: {v.failure or v.note}" for v in self.variants if v.failure or v.note]
        kinds = [f"{v.name}: {_kinds_text(*v.kinds)}" for v in self.variants if v.kinds]
        return [*ratios, *notes, *kinds, *_environment_lines(self.environment)]

    def _row(self, v: Variant) -> tuple[str, ...]:
        if not v.rounds:
            return (v.name, "failed", *[""] * (len(_COLUMNS) - 2))
        low, high = v.quartiles
        return (
            v.name,
            f"{1e3 * v.median:.3g} ms",
            f"{1e3 * low:.3g} to {1e3 * high:.3g}",
            f"{self.rows / v.median:,.0f}",
            f"{v.first:.2g} s",
            "" if math.isnan(v.transfer) else f"{1e3 * v.transfer:.2g} ms",
            "unknown" if math.isnan(v.peak) else human_bytes(v.peak),
        )

    def to_markdown(self) -> str:
        """Returns the table in Markdown, with the lines below it as a list."""
        rows = [self._row(v) for v in sorted(self.variants, key=lambda v: v.median)]
        lines = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1)), *rows]
        notes = [f"- {line}" for line in self._notes()]
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *notes])

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "variants": [_variant_json(v) for v in self.variants],
            **{name: value and _ratio_json(value) for name, value in self._ratios().items()},
            "rows": self.rows,
            "environment": self.environment,
        }

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        save_json(path, self.to_json())

    def plot(self, path: str | Path) -> None:
        """Draws the medians as bars, with the range of the middle half of the calls. Needs matplotlib."""
        ran = (variant for variant in self.variants if variant.rounds)
        draw_bars((Bar(each.name, each.framework, each.median, each.quartiles) for each in ran), Path(path))

    def _ratios(self) -> dict[str, Ratio | None]:
        return {"best": self.best, "plain": self.plain, "control": self.control}


def _ratio_json(ratio: Ratio) -> dict[str, Any]:
    return dataclasses.asdict(ratio) | {"withheld": ratio.withheld}


def _kinds_text(fast: float, slow: float, share: float) -> str:
    return f"calls of two kinds, {1e3 * fast:.3g} ms and, {share:.0%} of them, {1e3 * slow:.3g} ms"


def _environment_lines(environment: Mapping[str, Any]) -> list[str]:
    """Returns lines about the environment: work, machine, versions, load of others; none where it is not known."""
    if "load" not in environment:
        return []
    found, versions = environment, environment["versions"]
    device = found["processor"] if found["device"] == "cpu" else f"{found['jax_device']}, {found['processor']}"
    names = ("torch", "jax", "jaxlib", "flax", "numpy")
    work = "a training step" if found["train"] else "a prediction"
    return [
        f"{work} of {found['members']} x {found['network']}, inputs {', '.join(found['inputs'])}; "
        f"{found['rounds']} rounds",
        f"on {device}, {found['threads']} of {found['cores']} cores; PyTorch's threads: {found['torch_threads_tried']}",
        f"Python {found['python']}, {', '.join(f'{name} {versions[name]}' for name in names)}; {found['date'][:10]}",
        describe_load(found["load"]["before"], found["load"]["during"], found["cores"]),
    ]


def _variant_json(variant: Variant) -> dict[str, Any]:
    """Returns a variant as JSON data, with None for missing figures."""
    fields = dataclasses.asdict(variant) | {"median": variant.median}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields.items()}


_COLUMNS = ("", "median", "middle half", "predictions / s", "first call", "transfer", "peak memory")
