"""Timing: intervals, reports, and workers."""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import statistics
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import torch_bridge
from jaxensemble.errors import InputError, ParityError
from torch_bridge.graph.examples import Arguments
from torch_bridge.timing import load, run, worker
from torch_bridge.timing.exchange import load_arrays, save_arrays
from torch_bridge.timing.load import LoadReading, describe_load, is_busy, other_load
from torch_bridge.timing.process import Process, _has_output, compare_outputs
from torch_bridge.timing.result import Ratio, TimingReport, Variant
from torch_bridge.timing.run import _prepare_all, _write_job_files
from torch_bridge.timing.statistics import ratio_interval, two_kinds
from torch_bridge.timing.training import _STEPS, jax_step, torch_step
from torch_bridge.timing.variants import (
    _WAYS,
    OURS,
    PLAIN_JAX,
    jax_call,
    recorded_way,
    split_mode,
    torch_call,
    torch_variants,
)
from torch_bridge.timing.worker import Job, Worker


def _variant(name: str, framework: str, *rounds: float, **options: Any) -> Variant:
    return Variant(name, framework, rounds, (min(rounds), max(rounds)), **options)


OURS_RAN = _variant(OURS, "jax", 0.010, 0.011, 0.009, 0.010, 0.010, first=1.5, peak=12_000_000, note="Plan(members=1)")
THEIRS_RAN = _variant("loop", "torch", 0.020, 0.022, 0.018, 0.020, 0.020, first=0.1)
FAILED = Variant("compile(loop, default)", "torch", failure="RuntimeError: no compiler")
REPORT = TimingReport(
    (THEIRS_RAN, OURS_RAN, FAILED), Ratio.of(OURS_RAN, THEIRS_RAN), None, Ratio.of(OURS_RAN, OURS_RAN), rows=640
)


def test_an_interval_holds_the_ratio_and_only_noise_holds_one() -> None:
    noise = np.random.default_rng(0).normal(1, 0.05, size=(2, 20))
    low, high = ratio_interval(noise[0], 1.5 * noise[1])
    assert 1.4 < low < 1.5 < high < 1.6
    low, high = ratio_interval(noise[0], noise[1])
    assert low < 1 < high


def test_what_slows_a_round_slows_both() -> None:
    slow = np.array([1.0, 1.0, 9.0, 9.0, 1.0, 9.0])
    low, high = ratio_interval(slow, 2 * slow)
    assert low == high == 2


def test_a_winner_is_named_only_outside_of_the_noise() -> None:
    assert str(Ratio("a", "b", 2.0, 1.8, 2.5, 10)) == "a is 2.00 times as fast as b (1.80 to 2.50)"
    assert str(Ratio("a", "b", 1.1, 0.9, 1.3, 10)).endswith("(0.90 to 1.30, no winner)")
    assert str(Ratio("a", "b", 2.0, 1.8, 2.5, 10, "it was busy")).endswith("as b (1.80 to 2.50); it was busy")
    assert Ratio("a", "b", 0.5, 0.4, 0.6, 10).decided and not Ratio("a", "b", 0.5, 0.5, 0.5, 1).decided


def test_reports_print_save_and_draw(tmp_path: Path) -> None:
    text = str(REPORT)
    assert "jaxensemble is 2.00 times as fast as loop (2.00 to 2.00)" in text
    assert "control, ours against itself: 1.00 to 1.00" in text
    assert "compile(loop, default): RuntimeError: no compiler" in text
    table, notes = REPORT.to_markdown().split("\n\n")
    first, second, failed = (line.split("|")[1].strip() for line in table.splitlines()[2:])
    assert (first, second, failed) == (OURS, "loop", "compile(loop, default)")
    assert "- control, ours against itself: 1.00 to 1.00" in notes.splitlines()
    assert "64,000" in REPORT.to_markdown()
    REPORT.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["best"]["value"] == 2.0 and content["plain"] is None and content["variants"][2]["median"] is None
    REPORT.plot(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def _ported() -> tuple[list[nn.Module], Any, tuple[torch.Tensor]]:
    models: list[nn.Module] = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval() for _ in range(3)]
    x = (torch.randn(4, 2, 5, 6),)
    return models, torch_bridge.to_ensemble(models, x, check=False), x


@dataclasses.dataclass
class Scaled:
    """The output of `Scaling`."""

    y: torch.Tensor
    by: float


class Scaling(nn.Linear):
    """Takes arguments by name and of every kind, and returns an object."""

    def forward(self, input: torch.Tensor, by: float = 1.0, mask: torch.Tensor | None = None) -> Any:
        y = super().forward(input) * by
        return Scaled(y if mask is None else y * mask, by)


@pytest.mark.parametrize("train", [False, True])
def test_every_worker_takes_and_returns_what_a_forward_does(tmp_path: Path, train: bool) -> None:
    models: list[nn.Module] = [Scaling(3, 2).eval() for _ in range(3)]
    arguments = Arguments((torch.randn(4, 3), 2.0), {"mask": torch.ones(4, 2)})
    _write_job_files(tmp_path, models, torch_bridge.to_ensemble(models, *arguments, check=False), arguments, None)
    found = []
    for framework, name in [
        ("torch", "loop"),
        ("torch", "torch.func.vmap"),
        ("torch", "member"),
        ("jax", OURS),
        ("jax", PLAIN_JAX),
    ]:
        way = Worker(Job(str(tmp_path), name, framework, "cpu", False, False, 1, 0.0, train=train)).way
        found.append(way.arrays(way.wait(way.call())))
        way.move(way.call())
    for arrays in found:
        assert len(arrays) == 1
        np.testing.assert_allclose(arrays[0], found[0][0], rtol=1e-5, atol=1e-6)


def test_every_way_gives_the_same() -> None:
    models, ensemble, x = _ported()
    expected = np.stack([model(*x).detach().numpy() for model in models])
    for name in (*torch_variants("cpu", images=True)[:3], "member", "member, channels_last"):
        outputs = torch_call(name, models, x)()
        outputs = torch.stack(outputs) if isinstance(outputs, list) else outputs["output"]
        np.testing.assert_allclose(outputs.numpy(), expected, atol=1e-6)
    for name in (OURS, PLAIN_JAX):
        np.testing.assert_allclose(jax_call(name, ensemble, tuple(map(np.asarray, x)))(), expected, atol=1e-6)


def test_a_worker_measures_blocks(tmp_path: Path) -> None:
    models, _, x = _ported()
    setup = functools.partial(Path.touch, tmp_path / "set up")
    (tmp_path / "models.pkl").write_bytes(pickle.dumps(setup) + pickle.dumps((models, x)))
    measuring = Worker(Job(str(tmp_path), "loop", "torch", "cpu", tf32=False, x64=False, threads=1, seconds=0.0))
    assert (tmp_path / "set up").exists()
    ready = measuring.prepare()
    (outputs,) = load_arrays(Path(ready["outputs"]))
    assert outputs.shape == (3, 4, 3, 3, 4)
    block = measuring.block()
    assert len(block["samples"]) >= 5 and not block["compiled"]
    assert set(measuring.finish()) == {"transfer", "peak"}


def test_peak_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (worker._peak_memory() or 0) > 1e7 and (worker._largest_memory() or 0) > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(worker, "Path", lambda _: tmp_path / "no proc")
    assert worker._peak_memory() is None
    monkeypatch.setattr(Process, "_ask", lambda self, message: {"transfer": 0.1, "peak": None})
    with contextlib.ExitStack() as stack:
        process = Process(Job(str(tmp_path), "loop", "torch", "cpu", False, False, 1, 0.0), stack)
        process.rounds, process.samples, process.ready = [2.5], [2.5], {"first": 3.0, "note": ""}
        process.finish()
        report = TimingReport((process.variant(),), None, None, None, rows=1)
    assert "unknown" in str(report) and report.to_json()["variants"][0]["peak"] is None


class _Ended:
    def __init__(self, name: str, path: Path, *outputs: np.ndarray, framework: str = "jax") -> None:
        self.name = name
        self.job = Job("", name, framework, "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
        self.failure = ""
        self.ready = {"outputs": str(path / f"{name}.npz")}
        save_arrays(Path(self.ready["outputs"]), outputs)


def test_nothing_is_timed_where_outputs_differ(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 10)
    same, near = _Ended("loop", tmp_path, x), _Ended("vmap", tmp_path, x + 1e-6)
    compare_outputs([same, near])  # type: ignore[list-item]
    others = [
        _Ended("wrong", tmp_path, x + 0.01),
        _Ended("shape", tmp_path, x[:5]),
        _Ended("nan", tmp_path, x * np.nan),
    ]
    with pytest.raises(ParityError, match=r"(?s)not those of loop: .*wrong: 1\.0e-02; shape: inf; nan: nan$"):
        compare_outputs([same, near, *others, others[-1]])  # type: ignore[list-item]
    lost = [_Ended(name, tmp_path, np.where(x > 0.5, value, x)) for name, value in (("lost", np.nan), ("inf", np.inf))]
    compare_outputs([lost[0], lost[0]])  # type: ignore[list-item]
    with pytest.raises(ParityError, match=r"not those of lost: relative to the largest, inf: inf$"):
        compare_outputs(lost)  # type: ignore[arg-type]
    theirs = _Ended("graph", tmp_path, x + 0.01, framework="torch")
    compare_outputs([same, theirs, near])  # type: ignore[list-item]
    assert theirs.failure == "its outputs are not those of loop: 1.0e-02 of the largest"
    compare_outputs([same, others[0]], "tf32")  # type: ignore[list-item]
    twice = _Ended("twice", tmp_path, x + 0.01), same  # both processes of one variant are compared
    twice[1].job = twice[0].job
    with pytest.raises(ParityError, match=r"twice: 1\.0e-02"):
        compare_outputs([near, *twice])  # type: ignore[list-item]


@pytest.mark.further
def test_a_process_that_is_gone_is_told_and_leaves_the_others(tmp_path: Path) -> None:
    job = Job(str(tmp_path), "loop", "torch", "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
    with contextlib.ExitStack() as stack:
        process = Process(job, stack)
        process.start()  # without models, it says so
        assert process.failure.startswith("FileNotFoundError")
        gone = Process(job, stack)
        gone.start()
        gone.failure = ""
        assert gone._process is not None
        gone._process.kill()
        gone._process.wait()
        gone.block()
        assert "exit status -9" in gone.failure
    assert gone.variant().median == float("inf")


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    job = Job(str(tmp_path), "loop", "torch", "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
    with contextlib.ExitStack() as stack:
        process = Process(job, stack, patience=0.0)
        process.start()
        assert process.failure == "no answer in 0 s" and process._process is not None
        assert process._process.wait() != 0


def test_reading_is_waiting_where_nothing_else_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as pipe, os.fdopen(write, "w"):
        assert not _has_output(pipe, 0)
        monkeypatch.setattr(sys, "platform", "win32")
        assert _has_output(pipe, 0)


class _Started:
    def __init__(self, name: str, framework: str, done: list[str]) -> None:
        self.name = name
        self.job = Job("", name, framework, "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
        self.done = done

    def launch(self) -> None:
        self.done.append(f"launch {self.job.variant}")

    def begin(self) -> None:
        self.done.append(f"begin {self.job.variant}")

    def get_ready(self) -> None:
        self.done.append(f"ready {self.job.variant}")


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        (False, "begin a, ready a, begin b, ready b, begin ours, ready ours, begin ours, ready ours"),
        (
            True,
            "launch a, launch b, launch ours, launch ours, begin a, begin b, ready a, ready b, "
            "begin ours, ready ours, begin ours, ready ours",
        ),
    ],
)
def test_ours_are_prepared_alone(together: bool, expected: str) -> None:
    done: list[str] = []
    ways = (("a", "torch"), ("b", "torch"), ("ours", "jax"), ("ours", "jax"))
    runs: Any = [_Started(name, framework, done) for name, framework in ways]
    _prepare_all(runs, lambda text: None, together=together)
    assert ", ".join(done) == expected


def test_all_names_of_pytorchs_ways_are_known() -> None:
    for name in torch_variants("cuda", images=True):
        way, _ = split_mode(recorded_way(name) or name)
        assert way.removesuffix(", channels_last") in {*_WAYS} & {*_STEPS}


@pytest.mark.parametrize("name", ["loop, channels_last", "torch.func.vmap", "member"])
def test_every_way_of_training_starts_with_the_same_losses(name: str) -> None:
    models, ensemble, x = _ported()
    expected = jax_step(PLAIN_JAX, ensemble, tuple(map(np.asarray, x)))()
    np.testing.assert_allclose(np.stack([loss.numpy() for loss in torch_step(name, models, x)()]), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("sample", "kinds"),
    [
        ([10.0, 31.0, 10.2, 10.1, 30.0, 9.9, 10.0, 30.5], (10.0, 30.5, 0.375)),
        ([*[1.0] * 90, *[3.0] * 10], None),  # rare calls are no kind
        ([*[1.0] * 50, *[1.2] * 50], None),  # too near to be distinguished
        ([1.0, 3.0, 1.0, 3.0], None),  # too few
        ([2.0] * 20, None),
        (np.random.default_rng(0).normal(10, 2, 100).tolist(), None),
        (np.random.default_rng(0).uniform(1, 3, 100).tolist(), None),
        (np.random.default_rng(0).exponential(1.0, 100).tolist(), None),
        (np.random.default_rng(0).normal([10.0, 20.0], 0.5, (50, 2)).reshape(-1).tolist(), (10.0, 20.0, 0.5)),
    ],
)
def test_calls_of_two_kinds_are_found(sample: list[float], kinds: tuple[float, float, float] | None) -> None:
    found = two_kinds(sample)
    assert found == (kinds and pytest.approx(kinds, rel=0.05))


@pytest.mark.parametrize("count", [8, 10, 12, 16, 20, 30])
def test_calls_of_one_kind_are_rarely_taken_for_two(count: int) -> None:
    draws = np.random.default_rng(0)
    for samples in (draws.uniform(1, 2, (600, count)), draws.normal(10, 2, (600, count))):
        assert np.mean([two_kinds(sample) is not None for sample in samples.tolist()]) < 0.05
    slow = draws.permuted(np.arange(count) % 3 == 0)
    assert all(two_kinds(draws.normal(np.where(slow, 30.0, 10.0), 0.5).tolist()) for _ in range(50))


@pytest.mark.parametrize("sample", [[3.0], [1.0, 9.0], [1.0, 1.0, 9.0], [9.0, 1.0, 5.0, 2.0], [1.0] * 7 + [50.0] * 6])
def test_the_median_is_within_the_middle_half(sample: list[float], tmp_path: Path) -> None:
    job = Job(str(tmp_path), "loop", "torch", "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
    with contextlib.ExitStack() as stack:
        process = Process(job, stack)
        process.rounds, process.samples = sample, [100.0, *sample] if len(sample) > 1 else sample
        process.ready = {"first": 3.0, "note": ""}
        variant = process.variant()
    low, high = variant.quartiles
    assert min(sample) <= low <= variant.median <= high <= max(sample)


def test_a_ratio_that_says_nothing_is_withheld_with_its_reason() -> None:
    wide = Ratio("a", "b", 12.22, 2.97, 43.81, 10)
    text = "no ratio of a and b: its interval, 2.97 to 43.81, is wider than a factor of 1.5; more rounds may narrow it"
    assert str(wide) == text and wide.withheld and not wide.decided
    assert not Ratio("a", "b", 1.3, 1.2, 1.75, 10).withheld and Ratio("a", "b", 1.3, 1.2, float("nan"), 10).withheld
    control = Ratio("a", "a", 1.0, 0.5, 3.0, 10)
    reasons = "the machine was busy, and two processes with the same work differ by as much"
    assert str(Ratio("a", "b", 1.3, 1.2, 1.4, 10).widen(control, "the machine was busy")).endswith(f"; {reasons}")
    two = _variant("b", "torch", *[1.0, 9.0] * 5, kinds=(1.0, 9.0, 0.5))
    assert str(Ratio.of(_variant("a", "jax", *[1.0] * 10), two)).endswith("; the calls of b fall into two kinds")


def test_what_others_do_is_told_apart_from_our_own_work() -> None:
    ours = {1: 5.0, 2: 7.0}
    start = LoadReading(100.0, 50.0, ours)
    assert other_load([(start, LoadReading(102.0, 53.0, {1: 6.0, 2: 9.0}))]) == 0.0
    assert other_load([(start, LoadReading(102.0, 53.0, {1: 5.5, 2: 7.5}))]) == 1.0
    assert other_load([(start, LoadReading(102.0, 53.0, {1: 5.5, 2: 0.0}))]) == 1.25  # one that ended meanwhile
    assert other_load([(start, LoadReading(102.0, 53.0, ours)), (start, LoadReading(101.0, 50.0, ours))]) == 1.0
    assert other_load([(start, None)]) is None and other_load([]) is None
    assert not is_busy(0.1, 0.15, 2) and is_busy(0.5, 0.0, 2) and is_busy(0.0, 0.5, 2) and not is_busy(None, None, 2)
    assert describe_load(0.0, 0.1, 2).startswith("other processes kept 0.1 of 2 cores")
    assert describe_load(None, None, 2) == "this system does not say what other processes do"


def test_a_reading_is_of_this_system(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = LoadReading.now([os.getpid(), 2**30])
    assert reading is None or (reading.work > 0 and reading.own[os.getpid()] > 0 and reading.own[2**30] == 0)
    monkeypatch.setattr(load, "Path", lambda _: Path("/nowhere"))
    assert LoadReading.now([]) is None


def test_a_report_says_what_it_ran_on_and_whose_calls_are_of_two_kinds() -> None:
    environment = {
        "processor": "EPYC", "device": "cpu", "cores": 2, "threads": 2, "torch_threads_tried": "1 and 2", "rounds": 10,
        "versions": dict.fromkeys(("torch", "jax", "jaxlib", "flax", "numpy"), "1.2"), "python": "3.11",
        "date": "2026-11-30T12:00", "train": False, "members": 10, "network": "CNN",
        "inputs": ["float32[64, 1, 28, 28]"], "load": {"before": 0.0, "during": 1.1},
    }  # fmt: skip
    odd = dataclasses.replace(THEIRS_RAN, kinds=(0.01, 0.031, 0.4))
    report = dataclasses.replace(REPORT, variants=(odd, OURS_RAN), environment=environment)
    assert str(report).splitlines()[-5:] == [
        "loop: calls of two kinds, 10 ms and, 40% of them, 31 ms",
        "a prediction of 10 x CNN, inputs float32[64, 1, 28, 28]; 10 rounds",
        "on EPYC, 2 of 2 cores; PyTorch's threads: 1 and 2",
        "Python 3.11, torch 1.2, jax 1.2, jaxlib 1.2, flax 1.2, numpy 1.2; 2026-11-30",
        "BUSY: other processes kept 1.1 of 2 cores at work during the measurement, 0.0 before it",
    ]
    assert str(report).startswith("Time of one call, on a machine that was BUSY with others' work")
    idle = dataclasses.replace(report, environment=environment | {"load": {"before": None, "during": 0.1}})
    assert report.busy and not idle.busy and str(idle).splitlines()[0] == "Time of one call"


def test_a_way_with_one_thread_has_a_name_of_its_own() -> None:
    names = []
    for threads, cores in ((1, 2), (2, 2), (1, 1), (1, None)):
        job = Job("", "loop", "torch", "cpu", False, False, threads, 0.0, cores=cores)
        with contextlib.ExitStack() as stack:
            names.append(Process(job, stack).name)
    assert names == ["loop, 1 thread", "loop", "loop", "loop"]


class _Measured:
    """A process with made-up rounds, which takes part in all of them."""

    def __init__(self, job: Job, *rounds: float) -> None:
        self.job, self.name, self.pid, self.failure = job, job.variant, None, ""
        self.left, self.rounds, self.finished = list(rounds), [], 0

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def block(self) -> None:
        self.rounds.append(self.left.pop(0))

    def finish(self) -> None:
        self.finished += 1

    def variant(self) -> Variant:
        return _variant(self.name, self.job.framework, *self.rounds)


@pytest.mark.parametrize(("during", "text"), [(0.0, "more rounds may narrow it"), (1.5, "the machine was busy")])
def test_the_faster_count_of_threads_is_compared(during: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_prepare_all", lambda *args, **options: None)
    monkeypatch.setattr(run, "compare_outputs", lambda *args: None)
    monkeypatch.setattr(run, "sleep", lambda seconds: None)
    monkeypatch.setattr(run, "other_load", lambda spans: during if len(list(spans)) > 1 else 0.0)
    jobs = {
        name: Job("", name, "jax" if name in (OURS, PLAIN_JAX) else "torch", "cpu", False, False, 1, 0.0)
        for name in ("loop", "loop, 1 thread", "vmap", "slow", OURS, PLAIN_JAX)
    }
    noise = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0]
    runs = [
        _Measured(jobs["loop"], *[4.0] * 7), _Measured(jobs["loop, 1 thread"], *[2.0] * 7),
        _Measured(jobs["vmap"], *[3.0] * 7), _Measured(jobs["slow"], 9.0),
        _Measured(jobs[OURS], *[1.0] * 7), _Measured(jobs[OURS], *[1.0] * 7), _Measured(jobs[PLAIN_JAX], *noise),
    ]  # fmt: skip
    settings = {"together": False, "tf32": False, "rounds": 7}
    report = run._measure(runs, False, 1, settings, lambda text: None)  # type: ignore[arg-type]
    assert report.best is not None and (report.best.theirs, report.best.value) == ("loop, 1 thread", 2.0)
    assert report.plain is not None and report.plain.withheld and text in str(report.plain)
    assert report.environment["load"] == {"before": 0.0, "during": during}
    assert [one.finished for one in runs] == [1] * 7 and len(runs[3].rounds) == 1


def test_a_single_call_is_what_half_of_the_calls_took(tmp_path: Path) -> None:
    job = Job(str(tmp_path), "loop", "torch", "cpu", tf32=False, x64=False, threads=1, seconds=0.0)
    with contextlib.ExitStack() as stack:
        process = Process(job, stack)
        process.rounds, process.samples, process.ready = [2.5], [2.5], {"first": 3.0, "note": ""}
        assert process.variant().quartiles == (2.5, 2.5)


def test_a_ratio_is_no_surer_than_its_control() -> None:
    control = Ratio("a", "a", 0.97, 0.95, 0.99, 10)
    assert not Ratio("a", "b", 1.03, 1.01, 1.05, 10).widen(control).decided
    assert Ratio("a", "b", 1.2, 1.1, 1.3, 10).widen(control).decided


def test_arrays_keep_their_order_dtypes_and_bits(tmp_path: Path) -> None:
    arrays = [np.arange(12.0), np.array(3), jnp.arange(3, dtype=jnp.bfloat16) / 3, np.zeros((0, 2), bool)]
    save_arrays(tmp_path / "file.npz", [np.asarray(array) for array in arrays])
    for array, found in zip(arrays, load_arrays(tmp_path / "file.npz"), strict=True):
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


def test_arguments_are_checked() -> None:
    models, ensemble, x = _ported()
    with pytest.raises(InputError, match=r"(?s)`variants` must be some of .*got \['fast'\]"):
        torch_bridge.time(models, ensemble, x, variants=["fast"])
    with pytest.raises(InputError, match="`inputs` must have at least one row"):
        torch_bridge.time(models, ensemble, (x[0][:0],))
    with pytest.raises(InputError, match="`rounds` at least 1"):
        torch_bridge.time(models, ensemble, x, rounds=0)
    models[1].train()
    with pytest.raises(InputError, match=r"evaluation mode: call \.eval\(\)"):
        torch_bridge.time(models, ensemble, x)
