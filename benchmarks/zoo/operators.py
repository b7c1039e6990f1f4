"""PyTorch's own operator database, three samples of each operator. `python -m benchmarks.zoo.operators`; resumable.

Every tensor of a sample is an input. Those that have gradients are multiplied by a weight of one, which each of two
members has: so every operation is run under `vmap`. Values and gradients are compared in float64.
"""

import contextlib
import dataclasses
import re
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer
from torch import Tensor

import torch_bridge
from benchmarks.results import append_lines, write_lines
from benchmarks.zoo.outcomes import FILE, STATUSES, Outcome, load
from benchmarks.zoo.samples import SAMPLES, Applied, Sample, entries, samples_of
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import JaxEnsembleError, RandomnessError, UnsupportedError
from torch_bridge.lowering import REFUSALS

SECONDS = 120
TOLERANCE, OF_GRADIENTS = 1e-12, 1e-11
"""Largest differences, relative to the largest value: float64 rounding, and nothing else; as for the proof."""

CANCELLED = 1e-2
"""Gradients below are compared as if this were the largest: samples are of size one, and what is less has cancelled."""


class Expected:
    """Returns PyTorch's values, and gradients of their weighted sum by all inputs that have one."""

    def __init__(self, samples: Sequence[Sample]):
        self.model = Applied(samples)
        given = [tensor for sample in samples for tensor in sample.tensors]
        self.inputs = tuple(tensor.detach() for tensor in given)
        self.values = self._values()
        tracked = [x.detach().clone().requires_grad_(x.requires_grad and x.is_floating_point()) for x in given]
        self.outputs, self.by, self.gradients = [], [k for k, x in enumerate(tracked) if x.requires_grad], []
        try:
            results = self.model(*tracked)
            self.outputs = [k for k, y in enumerate(results) if y.requires_grad]
            total = torch.stack([_weighted(results[k], torch) for k in self.outputs]).sum()
            found = torch.autograd.grad(total, [tracked[k] for k in self.by], allow_unused=True)
            self.gradients = [
                torch.zeros_like(tracked[k]) if gradient is None else gradient
                for k, gradient in zip(self.by, found, strict=True)
            ]
        except (RuntimeError, NotImplementedError):  # the operator has no gradient
            self.outputs, self.by = [], []

    def _values(self) -> list[Tensor]:
        with torch.no_grad():
            return list(self.model(*(x.clone() for x in self.inputs)))

    def is_random(self) -> bool:
        """Returns whether another call gives another result."""
        torch.manual_seed(1)
        return any(not torch.equal(_plain(a), _plain(b)) for a, b in zip(self.values, self._values(), strict=True))


def _plain(x: Tensor) -> Tensor:
    return torch.nan_to_num(x) if x.is_floating_point() else x


def _weighted(y: Any, numbers: Any) -> Any:
    """Returns the sum of all elements, weighted unevenly."""
    complex_ = y.is_complex() if isinstance(y, Tensor) else jnp.iscomplexobj(y)
    real = numbers.real(y) + 0.5 * numbers.imag(y) if complex_ else y
    weights = np.linspace(0.5, 1.5, int(np.prod(y.shape)))
    return (real.reshape(-1) * (torch.from_numpy(weights) if numbers is torch else weights)).sum()


def differences(expected: Expected) -> Iterator[str]:
    """Yields how the ported ensemble of samples differs from PyTorch.

    **Raises:** whatever porting or running it raises.
    """
    models = [expected.model, Applied(expected.model.samples)]
    ensemble = torch_bridge.to_ensemble([m.eval() for m in models], expected.inputs, batch_axis=None, check=False)
    values, gradients = computed(ensemble, expected)
    for k, (value, wanted) in enumerate(zip(values, expected.values, strict=True)):
        for member in range(2):
            if what := difference(np.asarray(value)[member], wanted):
                yield f"result {k}: {what}"
                break
    for k, gradient, wanted in zip(expected.by, gradients, expected.gradients, strict=True):
        if what := difference(np.asarray(gradient), wanted, OF_GRADIENTS, CANCELLED):
            yield f"gradient by input {k}: {what}"


def computed(ensemble: Ensemble, expected: Expected) -> tuple[list[Any], list[Any]]:
    """Returns the ensemble's outputs, and gradients of their weighted sum: the mean of the two equal members."""
    arrays = [x.resolve_conj().resolve_neg().numpy() for x in expected.inputs]

    def objective(given: list[jax.Array], others: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        inputs = list(others)
        for k, x in zip(expected.by, given, strict=True):
            inputs[k] = x
        results = list(ensemble(*inputs))
        parts = [jax.vmap(lambda y: _weighted(y, jnp))(results[k]).mean() for k in expected.outputs]
        return sum(parts, start=jnp.zeros(())), results

    others = [jnp.asarray(array) for array in arrays]
    given = [others[k] for k in expected.by]
    if not given:
        return jax.jit(objective)(given, others)[1], []
    (_, values), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(given, others)
    return values, gradients


def difference(got: np.ndarray, wanted: Tensor, tolerance: float = TOLERANCE, least: float = 1e-30) -> str | None:
    """Returns how an array differs from a tensor in shape, kind of dtype, or values; None if it does not."""
    if wanted.dtype in (torch.bfloat16, torch.complex32):
        wanted, got = wanted.to(torch.promote_types(wanted.dtype, torch.float32)), got.astype(np.float32)
    want = wanted.numpy(force=True)
    if got.shape != want.shape:
        return f"shape {got.shape} for {want.shape}"
    if got.dtype.kind != want.dtype.kind:
        return f"dtype {got.dtype} for {want.dtype}"
    if got.dtype.kind in "biu":
        return None if np.array_equal(got, want) else f"{np.sum(got != want)} of {want.size} elements"
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return "infinities or NaNs in other places"
    error = np.abs(got[finite] - want[finite]).max(initial=0.0)
    scale = max(np.abs(want[finite]).max(initial=0.0), least)
    return None if error <= tolerance * scale else f"error {error / scale:.1e} of the largest value"


# Outcomes


def outcome(name: str, entry: Any, limit: int = SAMPLES) -> Outcome:
    """Ports an operator's samples together; if the result is not exact, one by one."""
    try:
        samples = samples_of(entry, limit)
    except Exception as error:  # PyTorch's own, as where it lacks what a sample is made with
        return Outcome(name, "left out", reason=f"no samples: {error}"[:300])
    if not samples:
        return Outcome(name, "left out", reason="no sample has a dense tensor")
    if judged(samples)[0] == "exact":
        return Outcome(name, "exact", len(samples), len(samples))
    found = [judged([sample]) for sample in samples]
    worst = max(found, key=lambda entry: STATUSES.index(entry[0]))
    return Outcome(
        name,
        worst[0],
        len(samples),
        sum(status == "exact" for status, _ in found),
        tuple(sorted({operation for status, reason in found if status == "missing" for operation in unruled(reason)})),
        worst[1],
    )


def judged(samples: Sequence[Sample]) -> tuple[str, str]:
    """Returns the status of samples that are ported together, and why they are not exact."""
    with jax.enable_x64(True), warnings.catch_warnings(), _time_limit():
        warnings.simplefilter("ignore")
        try:
            expected = Expected(samples)
            if expected.is_random():
                return "left out", "PyTorch gives something else at every call"
        except (RuntimeError, AssertionError) as error:  # PyTorch's own, for example where a copy is not a view
            return "left out", f"PyTorch: {error}"[:600]
        try:
            found = list(differences(expected))
        except UnsupportedError as error:
            return "missing" if unruled(error.details) else "refused", error.details[:600]
        except RandomnessError as error:
            return "left out", str(error)
        except JaxEnsembleError as error:
            return "refused", f"{type(error).__name__}: {error}"[:600]
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"[:600]
    return ("wrong", "; ".join(found)[:600]) if found else ("exact", "")


def unruled(message: str) -> list[str]:
    """Returns the operations without a rule that an error lists."""
    listed = re.findall(r"^  (\S+) in ", message, re.MULTILINE) if "operations that have no rule" in message else []
    return [operation for operation in listed if operation not in REFUSALS]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(
    only: Annotated[list[str] | None, typer.Option(help="Names of operators; all of them without.")] = None,
    again: Annotated[list[str] | None, typer.Option(help="Statuses of operators that are run again.")] = None,
    samples: Annotated[int, typer.Option(help="The most samples of an operator.")] = SAMPLES,
    minutes: Annotated[float, typer.Option(help="After these, no more operators are begun.")] = 600,
    file: Annotated[Path, typer.Option(help="A file of JSON lines; what stands there is not run again.")] = FILE,
) -> None:
    """Ports every operator of PyTorch's database with some of its samples, and compares values and gradients."""
    begun, done, known = time.monotonic(), load(file), entries()
    for name in only or known:
        if name in done and not only and done[name].status not in (again or ()):
            continue
        if time.monotonic() - begun > 60 * minutes:
            break
        found = outcome(name, known[name], samples)
        append_lines(file, [dataclasses.asdict(found)])
        jax.clear_caches()
        if found.status != "exact":
            print(f"{name}: {found.status} {found.reason[:200]}", flush=True)
    write_lines(file, [dataclasses.asdict(found) for found in load(file).values()])
    counts = {status: sum(found.status == status for found in load(file).values()) for status in STATUSES}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"of {len(known)}")


if __name__ == "__main__":
    typer.run(run)
