"""Process of one variant, as the measuring process sees it."""

import contextlib
import dataclasses
import json
import math
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxensemble.errors import ParityError
from torch_bridge.timing.exchange import load_arrays
from torch_bridge.timing.result import Variant
from torch_bridge.timing.statistics import middle_half, two_kinds
from torch_bridge.timing.worker import Job

_AGREE = {"float32": 1e-3, "tf32": 0.02, "half": 0.1}
"""Largest difference of outputs, relative to the largest. It shows that the work is the same; `check` proves it."""

PATIENCE = 1800.0
"""Seconds that a worker may take to answer: compiling large networks takes minutes."""

_ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    "cuda": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # all processes share the GPU
}


class Process:
    """Worker process, and its answers."""

    def __init__(self, job: Job, stack: contextlib.ExitStack, patience: float = PATIENCE):
        self.job = job
        self.patience = patience
        self.rounds: list[float] = []
        self.samples: list[float] = []
        self.ready: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.failure = ""
        self._stack = stack
        self._process: subprocess.Popen[str] | None = None
        self._log = Path(job.folder) / f"log-{id(self)}.txt"
        self._deadline = math.inf

    @property
    def name(self) -> str:
        """The name of the variant, with its one thread where other processes have more."""
        return f"{self.job.variant}, 1 thread" if self.job.threads < (self.job.cores or 1) else self.job.variant

    @property
    def pid(self) -> int | None:
        """The number of the process while it runs; otherwise None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def median(self) -> float:
        """The median seconds of a call, over all rounds so far."""
        return statistics.median(self.rounds)

    def start(self) -> None:
        """Starts the worker and waits until its first call is done."""
        self.begin()
        self.get_ready()

    def launch(self) -> None:
        """Starts the worker, which imports its modules and then waits for its job."""
        command = [sys.executable, "-m", "torch_bridge.timing.worker"]
        paths = os.pathsep.join(path for path in sys.path if path)
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{self._log}-inductor"}  # nothing that another process compiled is used
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": paths, **cache, **_ENVIRONMENT[self.job.device]},
            )  # fmt: skip
        self._stack.callback(self._end, self._process)

    def begin(self) -> None:
        """Gives the worker its job."""
        if self._process is None:
            self.launch()
        self._send(dataclasses.asdict(self.job))

    def get_ready(self) -> None:
        """Waits until the worker's first call is done."""
        self.ready = self._receive()

    def block(self) -> None:
        """Measures one block of calls. A block in which something was compiled is measured again, once."""
        answer = self._ask({"do": "block"})
        if answer.get("compiled"):
            answer = self._ask({"do": "block"})
        if answer.get("compiled"):
            self.failure = "compiles again at every call"
        if not self.failure:
            self.rounds.append(statistics.median(answer["samples"]))
            self.samples += answer["samples"]

    def finish(self) -> None:
        """Asks for memory and transfers, and ends the worker."""
        failure = self.failure
        self.end = self._ask({"do": "finish"})
        self.failure = failure  # keeps what was measured
        if self._process:
            self._end(self._process)

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # the process is gone, and unsent messages with it
                if pipe:
                    pipe.close()

    def variant(self) -> Variant:
        """Returns the figures of the variant."""
        name, framework = self.name, self.job.framework
        if self.failure or not self.rounds:
            return Variant(name, framework, failure=self.failure or "was not measured")
        return Variant(
            name,
            framework,
            tuple(self.rounds),
            middle_half(self.rounds if len(self.rounds) > 1 else self.samples),
            self.ready["first"],
            self.end.get("transfer", math.nan),
            math.nan if (peak := self.end.get("peak")) is None else peak,
            note=self.ready["note"],
            kinds=two_kinds(self.samples),
        )

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._send(message)
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        self._deadline = time.monotonic() + self.patience
        if not self.failure and process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):  # reading the answer reports a process that has ended
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        process = self._process
        if self.failure or process is None or process.stdout is None:
            return {}
        try:
            ready = _has_output(process.stdout, max(0.0, self._deadline - time.monotonic()))
            if not ready:
                process.kill()  # or it would run while other variants are measured
            line = process.stdout.readline() if ready else json.dumps({"error": f"no answer in {self.patience:g} s"})
            answer = json.loads(line)
        except (OSError, ValueError):  # ValueError: an incomplete line, or none
            process.kill()
            last = " ".join(self._log.read_text(errors="replace").splitlines()[-3:])
            answer = {"error": f"the process ended with exit status {process.wait()}: {last}"[:500]}
        self.failure = answer.get("error", "")
        return answer


def _has_output(pipe: IO[str], seconds: float) -> bool:
    """Waits for something to read, and returns whether there is. On Windows, reading itself waits, without a limit."""
    return sys.platform == "win32" or bool(select.select([pipe], [], [], seconds)[0])


def compare_outputs(processes: Sequence[Process], precision: str = "float32") -> None:
    """Checks that all outputs equal the first variant's. A PyTorch way with other outputs fails.

    **Raises:** `ParityError` for other outputs of JAX.
    """
    outputs = [load_arrays(Path(process.ready["outputs"])) for process in processes]
    wrong = []
    for process, found in zip(processes, outputs, strict=True):
        error = _difference(found, outputs[0])
        if error <= _AGREE[precision]:
            continue
        if process.job.framework == "torch" and process is not processes[0]:
            process.failure = f"its outputs are not those of {processes[0].name}: {error:.1e} of the largest"
        else:
            wrong.append(f"{process.name}: {error:.1e}")
    if wrong:
        rows = "; ".join(dict.fromkeys(wrong))  # ours runs in two processes
        raise ParityError(
            f"nothing is timed: outputs are not those of {processes[0].name}: relative to the largest, {rows}"
        )


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    return max((_normwise_difference(x, y) for x, y in zip(found, expected, strict=True)), default=0.0)


def _normwise_difference(x: np.ndarray, y: np.ndarray) -> float:
    if not x.size:
        return 0.0
    wide = complex if np.iscomplexobj(y) else float
    x, y = x.astype(wide), y.astype(wide)
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    scale = float(np.abs(y[finite]).max(initial=0.0))
    return float(np.abs(x - y)[finite].max(initial=0.0)) / (scale or 1.0)
