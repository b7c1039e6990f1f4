"""Plans: the number of members, and of rows of the minibatch, that one step takes."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxensemble.errors import InputError
from jaxensemble.running.compilers import compiler_names, has_compiler

TILE = 8 << 20
"""Bytes that the largest step of a tile may read and write: the next step finds its operands in the cache."""

LEAST = 4
"""The fewest rows of a tile, unless memory wants fewer: products of a few rows are slow, and one long sum."""

_UNROLLED = 10
"""The most members whose steps are written out one after another: compiling takes that many times as long."""

_ROWS = 32
"""The fewest rows with which a few members of a network without convolutions are run one after another."""

_COMPILER = "eigen"
"""The settings of XLA's compiler with which CPUs run nearly all programs faster."""

_GRAPHS = "graphs"
"""The settings of XLA's compiler for small programs on GPUs, which `tune` tries."""

_SHARE = 0.5
"""The share of free memory for a program's arrays other than inputs, weights and outputs."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The members and rows that one step takes; None for all. Every plan gives the same results, to rounding.

    - `Plan()` runs all members at once, with `jax.vmap`; `Plan(members=1)` one after another, in one program.
      `torch.func.vmap(..., chunk_size=k)` is `Plan(members=k)`.
    - `Plan(members=1, rows=8)` takes one member and 8 rows a step: on CPUs, small steps stay in the cache. Only for
      networks that keep rows apart, as most do in evaluation mode.
    - `unroll` writes the steps out one after another instead of a loop, which takes longer to compile.
    - `compiler` names settings of XLA's compiler, of `jaxensemble.running.compilers.COMPILERS`: on CPUs, `"eigen"` for
      another library of products and convolutions; on GPUs, `"graphs"` for CUDA graphs of a few kernels. Within
      `jax.jit` of your own, its settings count instead.
    - `Plan(members=4, offload=True)` is for weights in the memory of the host, as after
      `jax.device_put(ensemble, jax.devices("cpu")[0])`: four members at a time are copied to the default device, the
      next four while these compute. Not for prepared programs, meshes and calls within `jax.jit`.
    - `remat` is for training: for the gradient only the results of convolutions and products are kept, and
      all others computed again, which takes less memory and more time.

    Sizes need not divide: the last step then repeats some of the work; in training, it has fewer rows. Dropout draws
    other numbers for other `rows`.

    **Raises:** `InputError` for sizes that are not positive integers.

    >>> Plan(members=1, rows=8)
    Plan(members=1, rows=8)
    """

    members: int | None = None
    rows: int | None = None
    unroll: bool = False
    remat: bool = False
    compiler: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        sizes = {"members": self.members, "rows": self.rows}
        wrong = [f"{name}={size!r}" for name, size in sizes.items() if not is_size(size)]
        switches = {"unroll": self.unroll, "remat": self.remat, "offload": self.offload}
        wrong += [f"{name}={value!r}" for name, value in switches.items() if not isinstance(value, bool)]
        if self.compiler is not None and self.compiler not in compiler_names():
            wrong.append(f"compiler={self.compiler!r}")
        if wrong:
            raise InputError(
                "a plan takes positive integers or None for `members` and `rows`, True or False for `unroll`, `remat` "
                f"and `offload`, and for `compiler` one of {', '.join(compiler_names())}; got {', '.join(wrong)}"
            )

        if self.offload is True and self.members is None:
            raise InputError("a plan with `offload` needs `members`: how many of them are on the device at once")

    def __repr__(self) -> str:
        fields = [f"{f.name}={value!r}" for f in dataclasses.fields(self) if (value := getattr(self, f.name))]
        return f"Plan({', '.join(fields)})"


def is_size(size: Any) -> bool:
    """Returns whether a size is a positive integer or None."""
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)


def check_plan(plan: Any) -> Any:
    """Returns the plan that a caller gave.

    **Raises:** `InputError` for anything but a `Plan`, `"auto"` and None.
    """
    if plan is not None and plan != "auto" and not isinstance(plan, Plan):
        raise InputError(f"`plan` must be a jaxensemble.Plan, 'auto' or None; got {plan!r}")
    return plan


@dataclasses.dataclass(frozen=True)
class Demand:
    """The work of an ensemble on one minibatch, as a device sees it.

    - `members`, `rows`: their numbers; None for rows that cannot be split.
    - `peak`: the bytes of all intermediate arrays that are alive at once in one member's call, before XLA fuses any.
    - `step`: the bytes that its largest step reads and writes, weights not counted.
    - `convolutions`, `grouped`: whether there are convolutions, and whether any is in groups, such as depthwise ones.
    """

    platform: str
    members: int
    rows: int | None
    peak: int
    step: int
    convolutions: bool
    grouped: bool = False

    def held_bytes(self, plan: Plan) -> float:
        """The bytes of intermediate arrays that a plan needs at once."""
        members = min(plan.members or self.members, self.members)
        rows = min(plan.rows or self.rows, self.rows) / self.rows if self.rows else 1
        return members * rows * self.peak


def guess_plan(demand: Demand, free: float) -> Plan:
    """Guesses a good plan without measuring, within its share of `free` bytes of memory.

    On CPUs a convolution with a kernel for each member is slow, and so are products of many small matrices at once. So
    one member runs after another: written out where there are few, since a loop copies the weights of each and runs
    elementwise steps, which depthwise convolutions are made of, on one core. `benchmarks/results` has figures.
    Elsewhere all members run at once.
    """
    plan = Plan(compiler=_COMPILER if has_compiler(_COMPILER, demand.platform) else None)
    if demand.platform == "cpu":
        if demand.members <= _UNROLLED and (demand.convolutions or (demand.rows or 0) >= _ROWS):
            plan = dataclasses.replace(plan, members=1, unroll=True)
        elif demand.convolutions and not demand.grouped:
            plan = dataclasses.replace(plan, members=1)
    return fit_plan(plan, demand, free)


def is_within_memory(plan: Plan, demand: Demand, free: float) -> bool:
    """Returns whether a plan needs no more than its share of `free` bytes of memory."""
    return demand.held_bytes(plan) <= _SHARE * free


def fit_plan(plan: Plan, demand: Demand, free: float) -> Plan:
    """Fits a plan to memory: fewer members and rows a step if it needs too much."""
    if is_within_memory(plan, demand, free):
        return plan
    budget = _SHARE * free
    members = min(plan.members or demand.members, demand.members)
    members = max(1, min(members, int(budget / (demand.held_bytes(plan) / members))))
    plan = dataclasses.replace(plan, members=members)
    if is_within_memory(plan, demand, free) or not demand.rows:
        return plan
    rows = min(plan.rows or demand.rows, demand.rows)
    return dataclasses.replace(plan, rows=max(1, int(rows * budget / demand.held_bytes(plan))))


def candidate_plans(demand: Demand, free: float) -> Iterator[Plan]:
    """Plans worth measuring that memory allows, the most promising first."""
    first = guess_plan(demand, free)
    if demand.platform == "cpu":
        rows = _near(_tile(demand), demand)
        plans = [Plan(), Plan(members=1), *(Plan(members=1, rows=count) for count in rows)]
        if demand.members <= _UNROLLED:
            plans.append(Plan(members=1, unroll=True))
        plans = [dataclasses.replace(plan, compiler=first.compiler) for plan in plans]
        plans += [dataclasses.replace(plan, compiler=None) for plan in (first, Plan())]
    else:
        plans = [Plan(), *(Plan(members=k) for k in (1, 4, 16, 64) if k < demand.members)]
        if has_compiler(_GRAPHS, demand.platform):
            plans.append(Plan(compiler=_GRAPHS))
    yield from dict.fromkeys(plan for plan in (first, *plans) if is_within_memory(plan, demand, free) or plan == first)


def _tile(demand: Demand) -> int | None:
    """The rows that fit into the cache, a power of two; None if all rows do."""
    if not demand.rows or demand.step <= TILE:
        return None
    rows = max(LEAST, 2 ** int(math.log2(max(1, demand.rows * TILE / demand.step))))
    return rows if rows < demand.rows else None


def _near(rows: int | None, demand: Demand) -> list[int]:
    if not demand.rows:
        return []
    middle = rows or demand.rows
    return [size for size in (middle, 2 * middle, middle // 2, middle // 4) if LEAST <= size < demand.rows]
