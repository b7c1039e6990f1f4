"""Writes `docs/coverage.md`, from the tables of rules and the zoo's results. `python -m benchmarks.zoo.coverage`."""

import collections
import re
import sys
import textwrap
from collections.abc import Iterable

from benchmarks.results import RESULTS, ROOT
from benchmarks.zoo import outcomes
from benchmarks.zoo.results import load
from torch_bridge.lowering import REFUSALS, RULES

PAGE = ROOT / "docs" / "coverage.md"

_INTRODUCTION = """\
# What is covered

`python -m benchmarks.zoo.coverage` makes this page from the tables of rules and from the results of `make zoo` and
`make operators`. A test compares the page with them.

`torch.export` writes a network's forward as operations without side effects. The network can be ported if each of these
operations has a rule. An operation without a rule, or an option that cannot be carried exactly, is refused with an
error that names every such place: module, operation and line. `torch_bridge.register` adds a rule of your own.
"""


def page() -> str:
    """Returns the page as Markdown."""
    return "\n".join([_INTRODUCTION, *_networks(), *_training(), *_operators(), *_operations()])


def _networks() -> list[str]:
    lines = [
        "## Networks\n",
        "Each network is an ensemble of two, with random running statistics and random values for constant weights.",
        "*float64*: the largest error, relative to the largest output. *float32*: our error over PyTorch's own, both",
        "against float64; 2 or less passes. *Transposes*: of activations, in the program of one member's call. The",
        "networks of `transformers`, one of each family, are small (two layers of 16 features), and are called with",
        "masks and flags by name. The networks of `timm` are the smallest published ones of each of its modules, with",
        "fewer layers if even these are large. Networks that have not run yet are not listed.\n",
    ]
    for file in sorted(RESULTS.glob("zoo-*.jsonl")):
        results = sorted(load(file).values(), key=lambda result: result.name)
        passed = sum(result.status == "passed" for result in results)
        lines += [f"### {file.stem.removeprefix('zoo-')}: {passed} of {len(results)}\n"]
        lines += ["| network | | parameters | float64 | float32 | transposes | lines of Flax |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|"]
        for result in results:
            figures = (
                f"{result.parameters:,}",
                "" if result.float64 is None else f"{result.float64:.1e}",
                "" if result.float32 is None else f"{result.float32:.2f}",
                "" if result.transposes is None else str(result.transposes),
                "" if result.source_lines is None else str(result.source_lines),
            )
            lines.append(f"| {result.name} | {result.status} | {' | '.join(figures)} |")
        lines.append("")
    return lines


def _training() -> list[str]:
    found = sorted(load(RESULTS / "training-timm.jsonl").values(), key=lambda result: result.name)
    passed = sum(result.status == "passed" for result in found)
    lines = [
        f"### Ten training steps of timm: {passed} of {len(found)}\n",
        "The steps are SGD with momentum and weight decay in float64, by an ensemble of two. PyTorch gets the random",
        "numbers that the ensemble drew for dropout and stochastic depth. *float64*: the largest error of losses,",
        "parameters and buffers after these steps, relative to the largest number of each; 1e-9 or less passes.\n",
        "| network | | parameters | float64 |",
        "|---|---|---:|---:|",
    ]
    for result in found:
        error = "" if result.float64 is None else f"{result.float64:.1e}"
        lines.append(f"| {result.name} | {result.status} | {result.parameters:,} | {error} |")
    return [*lines, ""]


def _operators() -> list[str]:
    found = sorted(outcomes.load().values(), key=lambda outcome: outcome.name)
    of = {status: [outcome for outcome in found if outcome.status == status] for status in outcomes.STATUSES}
    compared = len(found) - len(of["left out"])
    lines = [
        "## PyTorch's operator database\n",
        f"All {len(found)} operators of PyTorch's own tests that compute with float64, each with up to three of its",
        "samples: values and gradients in float64, two members under `vmap`. Random numbers and tensors made from",
        f"sizes alone cannot be compared, and are left out. Of the {compared} others, {len(of['exact'])} are exact,",
        f"{len(of['refused'])} are refused, {len(of['missing'])} have no rule, {len(of['wrong'])} are wrong, and",
        f"{len(of['crashed'])} crash.\n",
        f"**Exact.** {_listing(outcome.name for outcome in of['exact'])}\n",
        f"**Left out.** {_listing(outcome.name for outcome in of['left out'])}\n",
    ]
    for status, title in (
        ("refused", "Refused"),
        ("missing", "Without a rule"),
        ("wrong", "Wrong"),
        ("crashed", "Crash"),
    ):
        if of[status]:
            lines += [f"| {title} | samples that are exact | |", "|---|---:|---|"]
            lines += [f"| {o.name} | {o.exact} of {o.samples} | {_reason(o)} |" for o in of[status]]
            lines.append("")
    return lines


def _reason(outcome: outcomes.Outcome) -> str:
    """Returns the reason why an operator is not exact, without the module and the line that an error names."""
    if outcome.missing:
        return _listing(outcome.missing)
    text = " ".join(outcome.reason.split()).partition(" Write the forward with other")[0]
    text = re.sub(r" ?\(\w+\.py:\d+: .*?\)\)?(?=[:.]|$)|^Applied uses operations that have no rule: ", "", text)
    text = text.replace(" in the root module", "").replace("Applied.forward", "the forward")
    return textwrap.shorten(text, 160, placeholder=" ...").replace("|", "\\|")


def _operations() -> list[str]:
    families = collections.defaultdict(set)
    for operation, rule in RULES.items():
        if rule.__module__.startswith("torch_bridge."):
            families[rule.__module__].add(_short(operation))
    lines = ["## Operations\n", "All operations with a rule, by family, without overloads.\n"]
    for module in sorted(families):
        title = (sys.modules[module].__doc__ or "").splitlines()[0]
        lines += [f"**{title}** {_listing(families[module])}\n"]
    lines += ["## Refused\n"]
    reasons = collections.defaultdict(set)
    for operation, reason in REFUSALS.items():
        reasons[reason].add(_short(operation))
    return lines + [f"{_listing(operations)}: {reason}.\n" for reason, operations in reasons.items()]


def _short(operation: str) -> str:
    return operation.removeprefix("aten.").rpartition(".")[0]


def _listing(operations: Iterable[str]) -> str:
    return ", ".join(f"`{operation}`" for operation in sorted(operations))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
