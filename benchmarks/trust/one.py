"""One random network: proved as it is, or with an error planted that the proof has to find."""

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.utils._pytree as pytree

import torch_bridge
from benchmarks.trust import mutations
from benchmarks.trust.networks import Choices, Drawn, drawn
from jaxensemble import Ensemble, InputError, JaxEnsembleError, Plan, UnsupportedError
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.lowering import Lowered
from torch_bridge.parity import precision
from torch_bridge.parity.draws import can_draw
from torch_bridge.parity.float64 import convert_to_float64
from torch_bridge.parity.inputs import resize_inputs
from torch_bridge.parity.training import STAGE

Way = Callable[[Ensemble, Sequence[Any]], Any]
WAYS: dict[str, Way] = {
    **{
        repr(plan): lambda ensemble, inputs, plan=plan: ensemble(*inputs, plan=plan)
        for plan in (Plan(members=1), Plan(members=1, unroll=True), Plan(members=1, rows=2))
    },
    "prepared": lambda ensemble, inputs: ensemble.prepare(*inputs)(*inputs),
    "prepared, all at once": lambda ensemble, inputs: ensemble.prepare(*inputs, plan=Plan())(*inputs),
    "prepared, fold=False": lambda ensemble, inputs: ensemble.prepare(*inputs, fold=False)(*inputs),
    "padded": lambda ensemble, inputs: ensemble.padded()(*inputs),
}
"""Ways of running an ensemble, all of which give the same outputs."""

_convert: Any = importlib.import_module("torch_bridge.lowering.convert")
_divergence: Any = importlib.import_module("torch_bridge.parity.divergence")


@dataclasses.dataclass(frozen=True)
class Proved:
    """The outcome of a random network.

    `status` is `passed`, `failed` (a wrong number), `refused` (`UnsupportedError`) or `crashed`; `steps` are the names
    of its parts.
    """

    status: str
    steps: list[str]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The outcome of a planted error.

    `status` is `caught`, `raised` (porting itself failed), `missed`, or `equal` where no output is changed by it.
    `named` is the module that the report names, `planted` where the error is, if it is in a module of its own.
    """

    name: str
    status: str
    named: str = ""
    planted: list[str] = dataclasses.field(default_factory=list)


def proved(choices: Choices, *, thorough: bool = True) -> Proved:
    """Compares a random network with PyTorch in every stage of `check`, and with itself in another way of running it.

    With `thorough=False`, only in those stages that `to_ensemble` goes through by default.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network, way = drawn(choices), choices.pick([*WAYS])
        try:
            ensemble = _ported(network)
            report = torch_bridge.check(network.models, ensemble, network.inputs, thorough=thorough)
            failed = [row for row in report.rows if not row.passed]
            wrong = [f"{row.stage} against {row.case}: {row.error:.2e} > {row.limit:.2e}" for row in failed]
            wrong += _difference_of_ways(ensemble, network, way) if thorough else []
        except UnsupportedError as error:
            return Proved("refused", network.steps, str(error)[:500])
        except Exception as error:  # no network may cause another error
            return Proved("crashed", network.steps, f"{type(error).__name__}: {error}"[:1000])
    return Proved("failed" if wrong else "passed", network.steps, "; ".join(wrong))


def _ported(network: Drawn) -> Ensemble:
    return torch_bridge.to_ensemble(network.models, network.inputs, batch_axis=network.batch_axis, check=False)


def _difference_of_ways(ensemble: Ensemble, network: Drawn, way: str) -> list[str]:
    """Returns how outputs in a way of running differ from those of a call of all members at once."""
    if can_draw(ensemble, network.inputs):  # others for other rows
        return []
    members = network.models[:1]
    with (
        keep_caches_empty(members, network.inputs),
        jax.enable_x64(True),
        precision.equal_precision(),
        precision.double_precision(),
    ):
        (double,), inputs = precision.double_copies(members), precision.doubled(network.inputs)
        exact = convert_to_float64(ensemble, double, inputs)
        all_at_once = _leaves(exact(*inputs, plan=Plan()))
        try:
            others = _leaves(WAYS[way](exact, inputs))
        except InputError:  # the network mixes rows
            if "rows" not in way and way != "padded":
                raise
            return []
    error = max(_distance(a, b) for a, b in zip(others, all_at_once, strict=True))
    return [f"{way}: {error:.2e} from {Plan()}"] if error > 1e-11 else []


def _leaves(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the largest number; infinite where NaN or infinity is on one side alone."""
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=a.dtype.kind in "fc"
    ):
        return np.inf
    scale = np.abs(b[finite]).max(initial=0)
    return float(np.abs(a[finite] - b[finite]).max(initial=0) / (scale or 1))


def mutants(choices: Choices, wanted: Sequence[str]) -> list[Mutant]:
    """Plants errors into a random network, and returns their outcomes; none if the network is refused."""
    with warnings.catch_warnings(), _captured_once():
        warnings.simplefilter("ignore")
        network = drawn(choices)
        try:
            right = _ported(network)
            lowered = _convert.convert(network.models[0], network.inputs, OpenAxes(network.batch_axis))
        except UnsupportedError:
            return []
        return [mutant for name in wanted if (mutant := _mutant(network, right, lowered, name)) is not None]


def _mutant(network: Drawn, right: Ensemble, lowered: Lowered, name: str) -> Mutant | None:
    change, fault = mutations.CHANGES.get(name), mutations.FAULTS.get(name)
    if change is not None and change(lowered) is None:
        return None
    places = list(mutations.places(lowered, name)) if change is not None else []
    with _planted(change) if change is not None else contextlib.nullcontext():
        try:
            wrong: Ensemble | None = _ported(network)
            wrong = fault(wrong) if fault is not None and wrong is not None else wrong
            if wrong is None:
                return None
            in_training = name == "momentum"
            if not in_training and not _differ(right, wrong, network):
                return Mutant(name, "equal")
            report = torch_bridge.check(network.models, wrong, network.inputs, thorough=in_training)
        except (JaxEnsembleError, TypeError, ValueError) as error:
            return Mutant(name, "raised", str(error)[:200], places)
    if in_training and not any(row.stage == STAGE for row in report.rows):
        return None
    return Mutant(name, "missed" if report.passed else "caught", report.diverged or "", places)


@contextlib.contextmanager
def _captured_once() -> Iterator[None]:
    """Exports a network once in each precision: its graph is the same for all errors, and takes long."""
    captured: dict[torch.dtype, Any] = {}
    capture = _convert.capture

    def once(*args: Any) -> Any:
        dtype = torch.get_default_dtype()
        if dtype not in captured:
            captured[dtype] = capture(*args)
        return captured[dtype]

    with _replaced("capture", once):
        yield


@contextlib.contextmanager
def _planted(change: mutations.Change) -> Iterator[None]:
    lower = _convert.lower

    def wrong(*args: Any, **kwargs: Any) -> Lowered:
        lowered = lower(*args, **kwargs)
        return change(lowered) or lowered

    with _replaced("lower", wrong):
        yield


@contextlib.contextmanager
def _replaced(name: str, function: Any) -> Iterator[None]:
    """Replaces a function that porting calls, also in the search for the first module that differs."""
    before = getattr(_convert, name)
    for place in (_convert, _divergence):
        setattr(place, name, function)
    try:
        yield
    finally:
        for place in (_convert, _divergence):
            setattr(place, name, before)


def _differ(right: Ensemble, wrong: Ensemble, network: Drawn) -> bool:
    """Returns whether an error changes any output at all, for inputs that the check does not see."""
    inputs = precision.doubled(network.inputs)
    rows = 4 if network.batch_axis == 0 else len(inputs[0])
    with jax.enable_x64(True), precision.equal_precision():
        both = [ensemble.astype("float64") for ensemble in (right, wrong)]
        for seed, scale in enumerate((0.5, 1.0, 2.0)):
            others = resize_inputs(inputs, rows, 0, seed=100 + seed).positional
            others = pytree.tree_map(lambda x, scale=scale: scale * x if x.is_floating_point() else x, others)
            a, b = (_leaves(ensemble(*others)) for ensemble in both)
            if any(x.shape != y.shape or _distance(x, y) > 1e-9 for x, y in zip(a, b, strict=True)):
                return True
    return False
