"""Several processes on this machine, each with two CPU devices, as hosts that run one ensemble together.

`python -m tests.helpers.hosts SETTINGS` is one of them.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxensemble import Ensemble, TrainState, fit, train_step
from tests.helpers.artifacts import ROOT, X
from tests.helpers.training import MLP, data, mean_square, state_of

DEVICES = 2
"""The devices of a process."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count: int, **settings: Any) -> list[subprocess.Popen[str]]:
    """Starts processes that do some work together; `settings` say which."""
    port = free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    given = [json.dumps(settings | {"count": count, "port": port, "process": k}) for k in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.hosts", text],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for text in given
    ]


def wait(processes: list[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[int, str]]:
    """Returns how each process ended, and its standard error. Kills those that take longer."""
    ends = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=seconds)
            ends.append((process.returncode, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return ends


def run(count: int, work: str, folder: Path, **settings: Any) -> list[dict[str, np.ndarray]]:
    """Returns the arrays that each of some processes found, by name."""
    for code, errors in wait(start(count, work=work, folder=str(folder), **settings)):
        assert code == 0, errors
    return [dict(np.load(folder / f"{work}-{count}-{process}.npz")) for process in range(count)]


def mesh_of_all() -> Any:
    return jax.make_mesh((jax.device_count(),), ("members",))


def mlps(members: int, rate: float = 0.0) -> Ensemble:
    mode: Any = "as_is" if rate else "eval"
    return Ensemble.from_modules([MLP(rate, rngs=nnx.Rngs(seed)) for seed in range(members)], mode=mode)


def flat(name: str, tree: Any) -> dict[str, np.ndarray]:
    """Arrays of a tree as NumPy's, by names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}


def predict(mesh: Any, folder: Path, members: int) -> dict[str, np.ndarray]:
    """Outputs and predictions of an ensemble, over a mesh or without one."""
    ensemble = mlps(members).over(mesh) if mesh is not None else mlps(members)
    x = data(8)[0]
    xs = np.stack([x + k for k in range(members)])
    found: dict[str, np.ndarray] = {}
    for name, outputs in {
        "call": ensemble(x),
        "each": ensemble.each(xs),
        "prepared": ensemble.prepare(x)(x),
        "prepared each": ensemble.prepare(xs, each=True)(xs),
        "padded": ensemble.padded()(x[:5]),
        "padded program": ensemble.prepare(x, pad=True)(x[:5]),
    }.items():
        found |= own_parts(name, outputs, members)
    for task in ("classification", "regression"):
        prediction: Any = ensemble.predict(x, task=task)
        names = ["mean", "variance", "std"]
        if task == "classification":
            names += ["votes", "hard_vote", "soft_vote", "predictive_entropy", "expected_entropy"]
            names += ["mutual_information", "disagreement", "confidence"]
        found |= {f"{task} {name}": np.asarray(getattr(prediction, name)) for name in names}
    for k, prediction in enumerate(ensemble.predict_batches([x, x[:3]], task="classification")):
        found |= flat(f"batch {k}", prediction)
    return found


def own_parts(name: str, outputs: Any, members: int) -> dict[str, np.ndarray]:
    """The parts of an array `[M, ...]` that this process has, by the name and the member."""
    found = {}
    for shard in outputs.addressable_shards:
        slots = range(*shard.index[0].indices(outputs.shape[0]))
        found |= {f"{name}/{slot}": np.asarray(row) for slot, row in zip(slots, shard.data, strict=True)}
    return {key: value for key, value in found.items() if int(key.rsplit("/")[-1]) < members}


def state_parts(name: str, state: TrainState) -> dict[str, np.ndarray]:
    members, found = len(state.ensemble), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.ensemble.params, state.opt_state)):
        found |= own_parts(f"{name}{jax.tree_util.keystr(path)}", leaf, members)
    return found


def train(mesh: Any, folder: Path, members: int) -> dict[str, np.ndarray]:
    """20 steps, and a run of `fit`."""
    state = state_of(mlps(members, 0.2), optax.adam(0.05))
    state = state if mesh is None else state.over(mesh)
    x, y = data(12)
    losses = []
    for _ in range(20):
        state, loss = train_step(state, x, y, loss=mean_square)
        losses.append(own_parts("loss", loss, members))
    found = {f"{name}/{k}": value for k, step in enumerate(losses) for name, value in step.items()}
    return found | state_parts("state", state) | fitted(mesh, members, epochs=5)


def fitted(mesh: Any, members: int, **options: Any) -> dict[str, np.ndarray]:
    state = state_of(mlps(members, 0.2), optax.adam(0.05))
    state = state if mesh is None else state.over(mesh)
    options = {"patience": 3, **options}
    x, y = data(30)
    state, history = fit(
        state, x, y, loss=mean_square, batch=8, validation=data(20, 1), progress=False, **options,
    )  # fmt: skip
    found = {"history loss": history.loss, "history validation": history.validation["loss"]}
    return found | state_parts("fitted", state)


def load(mesh: Any, folder: Path, members: int) -> dict[str, np.ndarray]:
    """Reads an artifact, runs it, and saves it again."""
    path = folder / f"net-{members}"
    ensemble = Ensemble.load(path, mesh) if mesh is not None else Ensemble.load(path)
    ensemble.save(folder / f"again-{members}-{jax.process_count()}", force=True)
    prediction: Any = ensemble.predict(X, task="classification")
    return own_parts("loaded", ensemble(X), members) | {"classification loaded": np.asarray(prediction.mean)}


def everything(mesh: Any, folder: Path, members: int) -> dict[str, np.ndarray]:
    return {name: array for work in (predict, train, load) for name, array in work(mesh, folder, members).items()}


def resume(mesh: Any, folder: Path, members: int, epochs: int, end: list[Any] | None = None) -> dict[str, np.ndarray]:
    """A run with checkpoints. `end`: the process, the epoch and the signal by which it ends there."""

    def callback(epoch: int, state: Any, history: Any) -> None:
        if end is not None and (jax.process_index(), epoch) == (end[0], end[1]):
            os.kill(os.getpid(), end[2])

    callbacks = [] if end is None else [callback]
    return fitted(mesh, members, epochs=epochs, patience=20, checkpoints=folder / f"run-{members}", callbacks=callbacks)


WORK: dict[str, Any] = {function.__name__: function for function in (everything, resume)}


def run_cases(work: str, mesh: Any, folder: Path, cases: Sequence[int], **settings: Any) -> dict[str, np.ndarray]:
    """The arrays that some work gives, for each of some numbers of members."""
    parts = {members: WORK[work](mesh, folder, members, **settings) for members in cases}
    return {f"{members} {name}": array for members, part in parts.items() for name, array in part.items()}


def main(count: int, port: int, process: int, work: str, folder: str, **settings: Any) -> None:
    jax.config.update("jax_num_cpu_devices", settings.pop("devices", DEVICES))
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=f"127.0.0.1:{port}",
            num_processes=count,
            process_id=process,
            heartbeat_timeout_seconds=settings.pop("heartbeat", 100),
        )
    mesh = mesh_of_all() if settings.pop("mesh", True) else None
    found = run_cases(work, mesh, Path(folder), **settings)
    np.savez(Path(folder) / f"{work}-{count}-{process}.npz", **found)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main(**json.loads(sys.argv[1]))
