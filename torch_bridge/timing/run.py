"""`time`: every way of running an ensemble, each in a process of its own, measured in turn."""

import contextlib
import dataclasses
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.arrays import as_arrays
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.network.arguments import bind_arguments
from jaxensemble.running.device import cores
from torch_bridge.compat import pytree
from torch_bridge.graph.caches.tensors import clear_caches
from torch_bridge.graph.examples import Arguments
from torch_bridge.members.same_network import list_members
from torch_bridge.members.stack import check_ensemble
from torch_bridge.parity.inputs import batch_size, ensemble_inputs
from torch_bridge.report import environment
from torch_bridge.timing.exchange import save_arrays
from torch_bridge.timing.load import LoadReading, is_busy, other_load
from torch_bridge.timing.process import Process, compare_outputs
from torch_bridge.timing.result import Ratio, TimingReport
from torch_bridge.timing.variants import OURS, PLAIN_JAX, torch_variants
from torch_bridge.timing.worker import Job

try:
    import cloudpickle
except ImportError:  # plain pickle carries models whose classes the processes can import
    cloudpickle = pickle

_FINALISTS = 3
"""Number of PyTorch's ways that are measured in all rounds. Slower ways are measured in the first round only."""

_LOOK = 0.5
"""Seconds for which the load of other processes is measured before anything runs."""


def time(
    models: Sequence[nn.Module],
    ensemble: Ensemble,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    variants: Sequence[str] | None = None,
    rounds: int = 10,
    seconds: float = 0.2,
    tf32: bool = False,
    train: bool = False,
    threads: int | None = None,
    setup: Callable[[], object] | None = None,
    together: bool = False,
    patience: float = 1800.0,
    progress: Callable[[str], object] = lambda text: None,
) -> TimingReport:
    """Times a ported ensemble, compared with every way that PyTorch has of running or training the same members.

    Every variant has a process of its own. They are measured in turn, in an order that is drawn again in every round.
    Outputs are compared first, and every call is waited for. Ours is tuned (`Ensemble.tune`), and the ratio is against
    the fastest of PyTorch's ways. Both sides use the same device, cores and precision. On a CPU each of PyTorch's ways
    runs with one thread and with all threads, and the faster counts.

    The report says what it ran on, what other processes did meanwhile, and which variants have two kinds of calls. A
    ratio whose interval is wider than a factor of 1.5 is withheld.

    **Arguments:**

    - `models`, `ensemble`, `inputs`, `kwargs`: as for `check`. Modules reach the processes through `cloudpickle`
      or, without it, through `pickle`, which takes only modules of importable classes.
    - `variants`: names of PyTorch's ways to time, by default all: see `timing.variants.torch_variants`.
    - `rounds`, `seconds`: the number of blocks of calls for every variant, and the least length of a block.
    - `tf32`: whether both frameworks may round float32 products to TF32, on GPUs that have it.
    - `train`: whether a training step is timed instead of a prediction: the gradient of the outputs' mean square, and
      Adam. Ours runs ten steps as one program, as `fit` does. Networks that draw random numbers cannot be timed so,
      since their losses would differ.
    - `threads`: the number of cores, and of PyTorch's threads at most; by default all cores of this process.
    - `setup`: called in each of PyTorch's processes before modules are read, for example to declare custom operators.
    - `together`: whether PyTorch's ways are prepared at the same time, which saves minutes on many cores. The times of
      their first calls then say little.
    - `patience`: the seconds that a variant may take to answer. A slower variant fails, and the others go on.
    - `progress`: called with a text at each stage.

    **Raises:** `InputError` for arguments that cannot be timed, `ParityError` where outputs differ.

    >>> import torch_bridge
    >>> models = [nn.Linear(3, 2).eval() for _ in range(3)]
    >>> x = torch.randn(8, 3)
    >>> ensemble = torch_bridge.to_ensemble(models, (x,))
    >>> report = torch_bridge.time(models, ensemble, (x,), variants=["loop"], rounds=2, seconds=0.01)
    >>> report.best.theirs in ("loop", "loop, 1 thread")
    True
    """
    members, arguments = list_members(models), Arguments.of(inputs, kwargs, "inputs")
    if check_ensemble(ensemble).network is None:
        raise InputError("`ensemble` must be one that was ported from PyTorch: it is sent to another process")
    batch = batch_size(arguments, ensemble.origin.batch_axis)
    if batch == 0:
        raise InputError("`inputs` must have at least one row: an empty minibatch has no meaningful time")
    images = any(isinstance(x, Tensor) and x.ndim == 4 for x in pytree.tree_leaves(arguments))
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    known = torch_variants(device, images=images)
    names = known if variants is None else variants if isinstance(variants, list | tuple) else [variants]
    counted = isinstance(rounds, int) and rounds >= 1
    if not names or not counted or not all(name in known for name in names):
        raise InputError(
            f"`variants` must be some of PyTorch's ways, and `rounds` at least 1; got {names} and {rounds}. "
            f"The ways are {', '.join(known)}."
        )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _write_job_files(Path(folder), members, ensemble, arguments, setup)
        job = Job(
            folder,
            variant="",
            framework="torch",
            device=device,
            tf32=tf32,
            x64=jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
            threads=threads or cores(),
            seconds=seconds,
            train=train,
            cores=threads or cores(),
        )
        counts = sorted({1, job.threads}) if device == "cpu" else [job.threads]
        jobs = [dataclasses.replace(job, variant=name, threads=count) for name in names for count in counts]
        jobs += [dataclasses.replace(job, framework="jax", variant=name) for name in (OURS, OURS, PLAIN_JAX)]
        runs = [Process(one, stack, patience) for one in jobs]
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in members[0].parameters())
        settings = {
            "device": device, "tf32": tf32, "train": train, "threads": job.threads, "rounds": rounds,
            "seconds": seconds, "together": together, "torch_threads_tried": " and ".join(map(str, counts)),
            "members": len(members), "network": type(members[0]).__name__,
            "inputs": [_description(x) for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)],
        }  # fmt: skip
        return _measure(runs, half, len(members) * (batch or 1), settings, progress)


def _description(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _measure(
    runs: list[Process], half: bool, rows: int, settings: dict[str, Any], progress: Callable[[str], object]
) -> TimingReport:
    start = LoadReading.now(())
    sleep(_LOOK)
    before = other_load([(start, LoadReading.now(()))])
    _prepare_all(runs, progress, together=settings["together"])
    precision = "half" if half else "tf32" if settings["tf32"] else "float32"
    compare_outputs([run for run in runs if not run.failure], precision)
    ours, again, plain = runs[-3:]
    order, taking_part, rounds = random.Random(0), runs, settings["rounds"]
    spans = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        pids = [os.getpid(), *(run.pid for run in taking_part if run.pid is not None)]
        start = LoadReading.now(pids)
        for run in order.sample(taking_part, len(taking_part)):
            run.block()
        spans.append((start, LoadReading.now(pids)))
        if number == 0:
            taking_part = _choose_finalists(runs)
    for run in taking_part:
        run.finish()
    found = {id(run): run.variant() for run in runs}
    theirs = [found[id(run)] for run in taking_part if run.job.framework == "torch"]
    torch_best = min(theirs, key=lambda variant: variant.median, default=found[id(runs[0])])
    mine, twin, mapped = (found[id(run)] for run in (ours, again, plain))
    control = Ratio.of(mine, twin) if mine.rounds and twin.rounds else None
    load = {"before": before, "during": other_load(spans)}
    busy = "the machine was busy" if is_busy(load["before"], load["during"], cores()) else ""
    return TimingReport(
        tuple(found[id(run)] for run in runs if run is not again),
        best=Ratio.of(mine, torch_best).widen(control, busy) if mine.rounds and torch_best.rounds else None,
        plain=Ratio.of(mine, mapped).widen(control, busy) if mine.rounds and mapped.rounds else None,
        control=control,
        rows=rows,
        environment=environment() | settings | {"load": load},
    )


def _prepare_all(runs: list[Process], progress: Callable[[str], object], *, together: bool) -> None:
    """Prepares all variants. Ours is prepared alone even when `together`, since it measures plans."""
    if together:
        for run in runs:
            run.launch()
    theirs = [run for run in runs if run.job.framework == "torch"]
    for group in [theirs, *([run] for run in runs if run not in theirs)] if together else [[run] for run in runs]:
        progress(f"preparing {', '.join(run.name for run in group)}")
        for run in group:
            run.begin()
        for run in group:
            run.get_ready()


def _choose_finalists(runs: list[Process]) -> list[Process]:
    """Returns ours and the fastest of PyTorch's ways so far, and ends all others."""
    theirs = [run for run in runs if run.job.framework == "torch" and run.rounds]
    fastest = sorted(theirs, key=lambda run: run.median)[:_FINALISTS]
    staying = [run for run in runs if run in fastest or run.job.framework == "jax"]
    for run in runs:
        if run not in staying:
            run.finish()
    return staying


def _write_job_files(
    folder: Path,
    members: list[nn.Module],
    ensemble: Ensemble,
    arguments: Arguments,
    setup: Callable[[], object] | None,
) -> None:
    if any(module.training for member in members for module in member.modules()):
        raise InputError("`models` must be in evaluation mode: call .eval() on each")
    ensemble.eval().save(folder / "ensemble")
    with clear_caches(members, arguments):
        (folder / "models.pkl").write_bytes(cloudpickle.dumps(setup) + cloudpickle.dumps((members, arguments)))
    inputs = ensemble_inputs(arguments, ensemble.origin.input_layout)
    arrays = as_arrays(bind_arguments(ensemble.network, inputs), "inputs")
    save_arrays(folder / "inputs.npz", [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)])
