"""Worker process of one variant, which prepares the variant, runs it on command, and answers with times.

Standard input has the commands, standard output the answers, both as lines of JSON.
"""

import dataclasses
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jaxensemble import Ensemble
from jaxensemble.network.arguments import insert_fixed
from jaxensemble.network.inputs import input_structure
from torch_bridge.arrays import to_numpy
from torch_bridge.compat import count_compiled_graphs, pytree
from torch_bridge.graph.outputs import arrays_of
from torch_bridge.parity import precision
from torch_bridge.parity.metrics import stack_outputs
from torch_bridge.timing.exchange import load_arrays, save_arrays
from torch_bridge.timing.training import STEPS_PER_CALL, jax_step, torch_step
from torch_bridge.timing.variants import OURS, is_loop, jax_call, torch_call

WARM_UPS = 3
LEAST_CALLS = 5  # in a block,
LONG = 2.0  # unless it has taken so many seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """Job of a worker; `folder` holds the files that `run.time` wrote.

    `threads` are PyTorch's threads, at most as many as the `cores` of the process; `cores` is None for the same number.
    """

    folder: str
    variant: str
    framework: str
    device: str
    tf32: bool
    x64: bool
    threads: int
    seconds: float
    train: bool = False
    cores: int | None = None


class Worker:
    """Variant that is ready to run."""

    def __init__(self, job: Job):
        self.job = job
        self.before = _peak_memory()
        self.way = (_torch_way if job.framework == "torch" else _jax_way)(job)

    def prepare(self) -> dict[str, Any]:
        """Makes the first call, which compiles, and writes its outputs into a file for comparison."""
        start = time.perf_counter()
        outputs = self.way.wait(self.way.call())
        first = time.perf_counter() - start
        path = Path(self.job.folder) / f"outputs-{os.getpid()}.npz"
        save_arrays(path, self.way.arrays(outputs))
        start = time.perf_counter()
        for _ in range(WARM_UPS):
            self.way.wait(self.way.call())
            if time.perf_counter() - start > LONG:
                break
        return {"first": first, "outputs": str(path), "note": self.way.note}

    def block(self) -> dict[str, Any]:
        """Returns the seconds of every call, or training step, in a block, and whether anything was compiled."""
        compiled, samples = self.way.compilations(), []
        while sum(samples) < (self.job.seconds if len(samples) >= LEAST_CALLS else LONG):
            start = time.perf_counter()
            self.way.wait(self.way.call())
            samples.append(time.perf_counter() - start)
        if self.job.train:
            samples = [seconds / STEPS_PER_CALL for seconds in samples]
        return {"samples": samples, "compiled": self.way.compilations() != compiled}

    def finish(self) -> dict[str, Any]:
        """Returns the peak of memory, and the seconds of moving inputs to the device and outputs from it."""
        outputs, moved = self.way.wait(self.way.call()), []
        for _ in range(LEAST_CALLS):
            start = time.perf_counter()
            self.way.move(outputs)
            moved.append(time.perf_counter() - start)
        peak = self.way.device_peak()
        return {"transfer": sorted(moved)[len(moved) // 2], "peak": self._growth() if peak is None else peak}

    def _growth(self) -> int | None:
        """Returns the growth of this process up to its peak, in bytes; None where the system does not say."""
        now = _peak_memory()
        return None if now is None or self.before is None else now - self.before


@dataclasses.dataclass(frozen=True)
class Way:
    """Functions that run and measure a variant.

    - `call` runs all members once, `wait` waits for the outputs, `arrays` gives them as NumPy arrays.
    - `compilations` counts compilations so far. `move` moves inputs to the device, and the given outputs from it.
    - `device_peak` gives the peak memory of a GPU, in bytes; None on a CPU.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], list[Any]]
    compilations: Callable[[], int]
    move: Callable[[Any], object]
    device_peak: Callable[[], int | None]
    note: str = ""


def _torch_way(job: Job) -> Way:
    cuda = job.device != "cpu"
    torch.set_num_threads(job.threads)
    # The caller's own modules, in a temporary directory that only the caller can write to.
    with (Path(job.folder) / "models.pkl").open("rb") as file:
        setup = pickle.load(file)
        if setup is not None:
            setup()
        models, inputs = pickle.load(file)
    models = [model.to(job.device) for model in models]
    call = (torch_step if job.train else torch_call)(job.variant, models, pytree.tree_map(_mover(job.device), inputs))

    def wait(outputs: Any) -> Any:
        if cuda:
            torch.cuda.synchronize()
        return outputs

    def arrays(outputs: Any) -> list[Any]:
        if is_loop(job.variant):
            outputs = [pytree.tree_map(_plain_numbers, arrays_of(output)) for output in outputs]
            return [array for _, array in sorted(stack_outputs(outputs).items())]
        by_place = outputs if isinstance(outputs, dict) else arrays_of(outputs)  # losses are a tensor
        return [to_numpy(_plain_numbers(by_place[place])) for place in sorted(by_place)]

    def compilations() -> int:
        return count_compiled_graphs() if "compile(" in job.variant else 0

    def move(outputs: Any) -> None:
        wait(pytree.tree_map(_mover(job.device), inputs))
        pytree.tree_map(_mover("cpu"), arrays_of(outputs))

    peak = (lambda: torch.cuda.max_memory_allocated()) if cuda else (lambda: None)
    return Way(call, wait, arrays, compilations, move, peak)


def _plain_numbers(x: Any) -> Any:
    if not hasattr(x, "cpu"):
        return x
    return x.cpu().float() if str(x.dtype) in ("torch.bfloat16", "torch.float16") else x.cpu()


def _mover(device: str) -> Callable[[Any], Any]:
    return lambda x: x.to(device) if hasattr(x, "to") else x


def _jax_way(job: Job) -> Way:
    compiled = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    ensemble = Ensemble.load(Path(job.folder) / "ensemble")
    inputs = jax.tree.unflatten(input_structure(ensemble.network), load_arrays(Path(job.folder) / "inputs.npz"))
    call = (jax_step if job.train else jax_call)(job.variant, ensemble, inputs)
    plan = ensemble.explain(*insert_fixed(ensemble.network, inputs)) if job.variant == OURS and not job.train else ""
    note = plan.splitlines()[1] if plan else ""
    jax.clear_caches()  # of the plans that were measured, so that the first call compiles as in other variants

    def arrays(outputs: Any) -> list[Any]:
        narrow = (jax.numpy.bfloat16, jax.numpy.float16)
        found = sorted(arrays_of(outputs).items())
        return [np.asarray(x.astype("float32") if x.dtype in narrow else x) for _, x in found]

    def move(outputs: Any) -> None:
        jax.block_until_ready(jax.device_put(inputs))
        jax.tree.map(lambda x: np.array(x.copy()), arrays_of(outputs))  # copies, since an array keeps its fetched value

    def device_peak() -> int | None:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return Way(call, jax.block_until_ready, arrays, lambda: len(compiled), move, device_peak, note)


def _peak_memory() -> int | None:
    """Returns the peak memory of this process, in bytes; None on Windows, without `/proc` and `resource`.

    `/proc` is read first, since the value of `getrusage` includes the size of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return _largest_memory() if found is None else found


def _largest_memory() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS; Linux has `/proc`


def main() -> None:
    """Reads a job, then commands, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    job = Job(**json.loads(next(sys.stdin)))
    if hasattr(os, "sched_setaffinity"):  # JAX takes all available cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores or job.threads])
    torch.backends.cudnn.benchmark = True  # XLA tries its convolutions, too
    with precision.equal_precision(tf32=job.tf32), jax.enable_x64(job.x64):
        try:
            worker = Worker(job)
            answer(worker.prepare())
            for line in sys.stdin:
                answer(getattr(worker, json.loads(line)["do"])())
        except Exception as error:  # reported as the variant's failure, so that others go on
            answer({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    main()
