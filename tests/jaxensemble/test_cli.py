"""`jaxensemble inspect | verify | predict | source`: results, JSON, exit codes, and no PyTorch."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from jaxensemble import Ensemble, array_files, row_blocks, terminal
from jaxensemble.artifact import Artifact
from jaxensemble.cli import app
from jaxensemble.errors import InputError
from tests.helpers.artifacts import ROOT, SAVED, X, run_without_torch
from tests.helpers.hosts import free_port

ON_CPUS = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
"""The environment of processes with the command line."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name in ("net", "two", "wide"):
        shutil.copytree(SAVED / name, root / name)
    Ensemble.load(SAVED / "net")[:1].save(root / "unproven")
    np.save(root / "x.npy", X)
    np.savez(root / "x.npz", x=X)
    return root


@pytest.fixture(autouse=True)
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def damage() -> None:
    weights = Path("net/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_inspect_tells_what_is_there() -> None:
    result = run("inspect", "net")
    assert result.exit_code == 0, result.output
    for text in (
        "3 x Net, 73 parameters each",
        "inputs: x [N, 1, 3, 3]",
        "verified against PyTorch on",
        "the bytes of the weights were not read here: `jaxensemble verify net` compares them with those",
        "float32[3, 3]",
    ):
        assert text in result.stdout
    printed = json.loads(run("inspect", "net", "--json").stdout)
    assert printed["members"] == 3 and printed["verified"] is True and printed["arrays"]["bn.mean"]["shape"] == [3, 3]
    assert printed["weights_checked"] is False
    assert "NOT verified" in run("inspect", "unproven").stdout


def test_inspect_reads_headers_only() -> None:
    damage()
    assert run("inspect", "net").exit_code == 0


def test_verify_names_the_damaged_array() -> None:
    result = run("verify", "net")
    assert result.exit_code == 0 and "intact" in result.stdout
    assert json.loads(run("verify", "net", "--json").stdout)["intact"] is True
    damage()
    result = run("verify", "net")
    assert result.exit_code == 3 and "its bytes are not those that were saved" in result.stderr
    assert json.loads(run("verify", "net", "--json").stdout)["error"] == "InputError"


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_predict_gives_what_the_ensemble_gives(name: str) -> None:
    result = run("predict", "net", name, "--out", "y.npy")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("output: float32[3, 3, 4]\n") and result.stderr == ""
    np.testing.assert_array_equal(np.load("y.npy"), Ensemble.load("net")(X))
    values = json.loads(run("predict", "net", name, "--json").stdout)["outputs"]["output"]["values"]
    np.testing.assert_array_equal(np.float32(values), np.load("y.npy"))


def test_what_cannot_be_written_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "read_arrays", lambda path: pytest.fail("the inputs were read"))
    assert "must end in .npy or .npz, for the one array" in run("predict", "net", "x.npy", "-o", "y.txt").stderr
    result = run("predict", "net", "x.npy", "-o", "no/where/y.npy")
    assert result.exit_code == 6 and "No such directory: 'no/where'" in result.stderr


def test_compiled_programs_are_kept_where_that_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXENSEMBLE_CACHE", str(folder / "cache"))
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    try:
        assert run("predict", "net", "x.npy", "--keep-compiled").exit_code == 0
        assert (folder / "cache" / "programs").stat().st_mode & 0o777 == 0o700
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_predictions_that_were_never_verified_say_so() -> None:
    result = run("predict", "unproven", "x.npy")
    assert result.exit_code == 0 and "NOT verified" in result.stderr


def test_several_inputs_and_outputs() -> None:
    a, b = np.ones((2, 3), "float32"), np.arange(6, dtype="float32").reshape(2, 3)
    names = list(json.loads(run("inspect", "two", "--json").stdout)["inputs"])
    for arrays in (dict(zip(names, (a, b), strict=True)), {"arr_0": a, "arr_1": b}):
        np.savez("in.npz", **arrays)  # pyright: ignore[reportArgumentType]
        assert run("predict", "two", "in.npz", "-o", "y.npz").exit_code == 0
        with np.load("y.npz") as found:
            assert set(found) == {"output.sum", "output.half"} and found["output.half"].dtype == np.float32
            np.testing.assert_array_equal(found["output.sum"], (a + b)[None])
    assert "must end in .npz" in run("predict", "two", "in.npz", "-o", "y.npy").stderr
    result = run("predict", "two", "x.npy")
    assert result.exit_code == 3 and f"expected an array for each input: {', '.join(names)}" in result.stderr


def test_predict_tells_of_each_row_what_the_ensemble_predicts() -> None:
    prediction = Ensemble.load("net").predict(X)
    result = run("predict", "net", "x.npy", "--probabilities", "p.npy")
    lines = result.stdout.splitlines()
    assert lines[0] == "output: float32[3, 3, 4]" and lines[1].split() == ["row", "class", "confidence", "entropy"]
    for row, line in enumerate(lines[2:]):
        figures = (prediction.soft_vote, prediction.confidence, prediction.predictive_entropy)
        np.testing.assert_allclose([float(text) for text in line.split()], [row, *(x[row] for x in figures)], rtol=1e-3)
    assert len(lines) == 5
    np.testing.assert_allclose(np.load("p.npy"), prediction.mean, rtol=1e-6)
    printed = json.loads(run("predict", "net", "x.npy", "--json").stdout)["prediction"]
    assert printed["class"] == prediction.soft_vote.tolist() and set(printed) == {"class", "confidence", "entropy"}


def test_rows_that_are_nan_have_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = jnp.zeros((3, 4, 5)).at[1, 2].set(jnp.nan).at[:, 0, 3].set(9.0)
    monkeypatch.setattr(Ensemble, "__call__", lambda self, x, key=None: logits)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("predict", "net", "x.npy")
    assert result.exit_code == 0, result.exception
    assert result.stderr.startswith("jaxensemble: member 1 gives NaN for 1 of 4 rows (2): what is predicted of these")
    rows = [line.split() for line in result.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["3", "0", "nan", "0"] and rows[2][2:] == ["nan", "nan"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        printed = json.loads(run("predict", "net", "x.npy", "--json").stdout)["prediction"]
        assert printed["class"] == [3, 0, "nan", 0] and printed["entropy"][2] == "nan"
        pixels = jnp.stack([logits] * 2, -1)
        monkeypatch.setattr(Ensemble, "__call__", lambda self, x, key=None: pixels)
        result = run("predict", "net", "x.npy", "--task", "classification", "--class-axis", "1")
    assert "['nan' 'nan']" in result.stdout and "[3 3]" in result.stdout, result.output


def test_predict_reads_outputs_as_it_is_told() -> None:
    result = run("predict", "net", "x.npy", "--task", "regression")
    assert result.stdout.splitlines()[1].split() == ["row", "mean", "std"]
    raw = run("predict", "net", "x.npy", "--task", "outputs").stdout
    assert raw == f"output: float32[3, 3, 4]\n{np.asarray(Ensemble.load('net')(X))}\n"
    for args in (("--task", "outputs", "--probabilities", "p.npy"), ("--probabilities", "p.npz")):
        result = run("predict", "net", "x.npy", *args)
        assert result.exit_code == 3 and not Path("p.npy").exists()
    np.save("many.npy", np.repeat(X, 5, 0))
    assert "... and 5 more rows" in run("predict", "net", "many.npy").stdout


def test_predict_reads_classes_along_another_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 6))  # [M, N, C, H, W]
    monkeypatch.setattr(Ensemble, "__call__", lambda self, x, key=None: logits)
    predict = ("predict", "net", "x.npy", "--task", "classification")
    assert "`class_axis` has to be" in run(*predict).stderr
    result = run(*predict, "--class-axis", "1", "--probabilities", "p.npy")
    assert result.exit_code == 0 and "[4, 6]" in result.stdout, result.output
    np.testing.assert_allclose(np.load("p.npy"), jax.nn.softmax(logits, 2).mean(0), rtol=1e-5)
    assert run(*predict[:3], "--class-axis", "1").stdout == result.stdout
    refused = run(*predict[:4], "regression", "--class-axis", "1")
    assert refused.exit_code == 3 and "--class-axis needs --task classification" in refused.stderr


@pytest.mark.parametrize(
    ("given", "ported", "cast", "expected"),
    [
        ("complex128", "complex64", True, "complex64"),
        ("float64", "bfloat16", True, "bfloat16"),
        ("float64", "int32", True, ": --x64 computes in 64 bits"),
        ("complex128", "float32", True, ": --x64 computes in 64 bits"),
        ("complex128", "complex64", False, ": --cast rounds the array, --x64 computes in 64 bits"),
    ],
)
def test_arrays_are_cast_within_their_kind(given: str, ported: str, cast: bool, expected: str) -> None:
    network = Artifact.open("net").network
    network = dataclasses.replace(network, input_dtypes={"x": ported})
    arrays = {"x": X.astype(given)}
    if expected.startswith(":"):
        with pytest.raises(InputError, match=f"was {ported} when the network was ported{expected}"):
            array_files.arguments_from_arrays(network, arrays, cast=cast)
    else:
        assert array_files.arguments_from_arrays(network, arrays, cast=cast)[0].dtype == expected


def test_a_file_of_another_precision_is_cast_where_that_is_asked_for() -> None:
    np.save("x64.npy", X.astype("float64"))
    result = run("predict", "net", "x64.npy")
    assert result.exit_code == 3 and "--cast" in result.stderr
    assert run("predict", "net", "x64.npy", "--cast", "--out", "y.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("y.npy"), Ensemble.load("net")(X))


def test_a_network_that_draws_is_given_a_seed() -> None:
    Ensemble.load("net").train().save("drawing")
    network = Ensemble.load("drawing")
    Path("text.csv").write_text("1,2")
    assert "without arrays of objects" in run("predict", "net", "text.csv").stderr
    for seed in ("0", "1"):  # this network draws nothing in evaluation mode
        assert run("predict", "drawing", "x.npy", "--seed", seed, "-o", "y.npy").exit_code == 0
        np.testing.assert_array_equal(np.load("y.npy"), network.eval()(X))


def test_float64_needs_x64() -> None:
    np.save("wide.npy", np.ones((1, 3)))
    result = run("predict", "wide", "wide.npy")
    assert result.exit_code == 3 and "enable 64-bit types" in result.stderr
    assert run("predict", "wide", "wide.npy", "--x64").exit_code == 0


def test_source_is_what_runs() -> None:
    assert run("source", "net").stdout == Ensemble.load("net").source()
    assert json.loads(run("source", "net", "--json").stdout)["source"] == Ensemble.load("net").source()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("inspect", "nothing"), 3, "there is no such directory"),
        (("verify", "x.npy"), 3, "it is no directory"),
        (("predict", "net", "nothing.npy"), 6, "No such file"),
        (("predict", "net", "net/source.py"), 3, "no NumPy arrays"),
        (("predict", "net", "objects.npy"), 3, "no NumPy arrays"),
        (("predict", "net", "small.npy"), 3, "expected [N, 1, 3, 3], got [2, 1, 2, 2]"),
        (("predict", "net", "x.npy", "-o", "y.txt"), 3, "must end in .npy or .npz"),
        (("predict", "net", "x.npy", "-o", "no/y.npy"), 6, "No such directory"),
        (("predict", "net"), 2, "INPUT"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(args: tuple[str, ...], code: int, message: str) -> None:
    np.save("objects.npy", np.array([print]), allow_pickle=True)
    np.save("small.npy", np.ones((2, 1, 2, 2), "float32"))
    result = run(*args)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_debug_shows_the_error_itself() -> None:
    assert isinstance(run("verify", "nothing", "--debug").exception, ValueError)


def test_names_in_a_file_do_not_steer_the_terminal() -> None:
    assert terminal.escape_controls("a\x1b[2J\u202eb\n") == "a\\x1b[2J\\u202eb\n"


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "verify", interrupted)
    result = run("verify", "net")
    assert result.exit_code == 130 and "interrupted" in result.stderr


def test_the_command_needs_no_torch(folder: Path) -> None:
    done = run_without_torch("from jaxensemble.cli import main\nmain()", "predict", "net", "x.npy", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("output: float32[3, 3, 4]")


@pytest.fixture
def many() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(23, *X.shape[1:])).astype("float32")
    np.save("many.npy", x)
    return x


def test_many_rows_run_in_blocks(many: np.ndarray) -> None:
    wanted = run("predict", "net", "many.npy", "-o", "y.npy", "--probabilities", "p.npy")
    found = run("predict", "net", "many.npy", "-o", "blocks.npy", "--probabilities", "blocks_p.npy", "--rows", "5")
    assert found.exit_code == 0, found.output
    assert found.stdout == wanted.stdout.replace("y.npy", "blocks.npy") and "... and 13 more rows" in found.stdout
    for one, other in (("y.npy", "blocks.npy"), ("p.npy", "blocks_p.npy")):
        np.testing.assert_allclose(np.load(other), np.load(one), rtol=1e-5, atol=1e-6)
    assert not list(Path().glob(".*"))
    printed = json.loads(run("predict", "net", "many.npy", "--rows", "5", "--json").stdout)
    np.testing.assert_allclose(printed["outputs"]["output"]["values"], np.load("y.npy"), rtol=1e-5, atol=1e-6)
    assert printed["prediction"]["class"] == Ensemble.load("net").predict(many).soft_vote.tolist()
    assert run("predict", "net", "many.npy", "-o", "y.npz", "--rows", "5").exit_code == 0
    np.testing.assert_allclose(np.load("y.npz")["output"], np.load("y.npy"), rtol=1e-5, atol=1e-6)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ends the next run as Ctrl-C would, when so many blocks are noted."""
    noted = row_blocks.Progress.done
    count = iter(range(1, 100))

    def done(self: row_blocks.Progress, rows: int) -> None:
        noted(self, rows)
        if next(count) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(row_blocks.Progress, "done", done)


def test_an_interrupted_run_goes_on(many: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("predict", "net", "many.npy", "-o", "y.npy", "--rows", "5")
    monkeypatch.setattr(row_blocks, "INTERVAL", 0.0)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        stopped = run(*command)
        assert stopped.exit_code == 130 and "after 15 of 23 rows: the same command with --resume" in stopped.stderr
    assert not Path("y.npy").exists() and Path(".y.npy.partial").exists()
    other = run("predict", "net", "many.npy", "-o", "y.npy", "--rows", "6", "--resume")
    assert other.exit_code == 3 and "is of another run" in other.stderr
    with monkeypatch.context() as patch:
        seen: list[tuple[int, int]] = []
        read = row_blocks.RowFile.rows
        noted = lambda self, *given: seen.append(given[:2]) or read(self, *given)  # noqa: E731
        patch.setattr(row_blocks.RowFile, "rows", noted)
        result = run(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert seen[1:] == [(15, 20), (20, 23)]  # the first is read to find out where the rows are
    np.testing.assert_allclose(np.load("y.npy"), Ensemble.load("net")(many), rtol=1e-5, atol=1e-6)
    assert not list(Path().glob(".*"))


def test_a_run_from_the_first_row_leaves_no_note_of_an_earlier_one(
    many: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that ends before its own first note would go on from there, with rows that nobody wrote."""
    command = ("predict", "net", "many.npy", "-o", "y.npy", "--rows", "5")
    monkeypatch.setattr(row_blocks, "INTERVAL", 0.0)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        assert run(*command).exit_code == 130
    with monkeypatch.context() as patch:

        def stop(self: row_blocks.Progress, rows: int) -> None:
            raise KeyboardInterrupt

        patch.setattr(row_blocks.Progress, "done", stop)
        assert run(*command).exit_code == 130
    assert not Path(".y.npy.progress").exists()
    assert run(*command, "--resume").exit_code == 0
    np.testing.assert_allclose(np.load("y.npy"), Ensemble.load("net")(many), rtol=1e-5, atol=1e-6)


def test_one_file_for_two_things_is_refused() -> None:
    result = run("predict", "net", "x.npy", "-o", "y.npy", "--probabilities", "./y.npy")
    assert result.exit_code == 3 and "must be two files" in result.stderr


def test_nothing_stays_of_a_run_that_fails(many: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(self: row_blocks.Progress, rows: int) -> None:
        raise InputError("no more")

    monkeypatch.setattr(row_blocks.Progress, "done", done)
    assert run("predict", "net", "many.npy", "-o", "y.npy", "--rows", "5").exit_code == 3
    assert not list(Path().glob(".*")) and not Path("y.npy").exists()


def test_a_full_disk_is_an_error(many: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    result = run("predict", "net", "many.npy", "-o", "y.npy", "--rows", "5")
    assert result.exit_code == 6 and "No space left" in result.stderr
    assert not list(Path().glob(".*")) and not Path("y.npy").exists()


def test_what_cannot_go_on_is_refused(many: np.ndarray) -> None:
    assert "--resume is for files of more rows" in run("predict", "net", "x.npy", "-o", "y.npy", "--resume").stderr
    for args in ((), ("--out", "y.npz"), ("--out", "y.npy", "--json")):
        result = run("predict", "net", "many.npy", "--rows", "5", "--resume", *args)
        assert result.exit_code == 3 and "--resume needs --out or --probabilities" in result.stderr


def test_rows_with_nan_are_counted_through_all_blocks(many: np.ndarray) -> None:
    many[[3, 17]] = np.nan
    np.save("many.npy", many)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("predict", "net", "many.npy", "--rows", "5")
    assert "give NaN for 2 of 23 rows (3, 17)" in result.stderr, result.stderr


MEASURED = """
import sys
from pathlib import Path
from jaxensemble.cli import app
app(["predict", "net", sys.argv[1], "-o", "y.npy", "--rows", "8192"], standalone_mode=False)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory that a process had is read as Linux tells it")
def test_memory_does_not_grow_with_the_rows() -> None:
    """The larger file has 72 MB, and the outputs for it 96 MB."""
    peaks = []
    for rows in (20_000, 2_000_000):
        x = np.lib.format.open_memmap("rows.npy", "w+", np.float32, (rows, *X.shape[1:]))
        x[:] = 1
        x.flush()
        del x
        done = run_without_torch(MEASURED, "rows.npy")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        assert np.load("y.npy", mmap_mode="r").shape == (3, rows, 4)
    assert peaks[1] - peaks[0] < 20, peaks


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices; the tests' settings make four CPUs")
@pytest.mark.parametrize("name", ["net", "again"])
def test_predict_over_devices(name: str) -> None:
    Ensemble.load("net").save("again")  # with a hash for each member
    assert run("predict", name, "x.npy", "--out", "one.npy").exit_code == 0
    result = run("predict", name, "x.npy", "--out", "four.npy", "--probabilities", "p.npy", "--devices", "4")
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load("four.npy"), np.load("one.npy"), rtol=2e-5, atol=2e-6)
    blocks = run("predict", name, "x.npy", "--out", "blocks.npy", "--devices", "2", "--rows", "2")
    assert blocks.exit_code == 0, blocks.output
    np.testing.assert_allclose(np.load("blocks.npy"), np.load("one.npy"), rtol=2e-5, atol=2e-6)


def test_devices_that_there_are_not() -> None:
    result = run("predict", "net", "x.npy", "--devices", "1000")
    assert result.exit_code == 3 and "--devices must be at most" in result.stderr
    result = run("predict", "net", "x.npy", "--devices", "2", "--distributed")
    assert result.exit_code == 3 and "exclude each other" in result.stderr
    assert run("predict", "net", "x.npy", "--devices", "0").exit_code == 2


def test_distributed_is_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    result = run("predict", "net", "x.npy", "--distributed")
    assert result.exit_code == 3
    assert "--distributed is for processes that a cluster such as Slurm or Open MPI has started" in result.stderr


def test_a_new_process_splits_the_cpu() -> None:
    command = [sys.executable, "-m", "jaxensemble", "predict", "net", "x.npy", "--out", "y.npy", "--devices", "3"]
    done = subprocess.run(command, env=os.environ | ON_CPUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load("y.npy"), Ensemble.load("net")(X), rtol=2e-5, atol=2e-6)


def test_the_first_of_several_processes_prints_and_writes() -> None:
    Ensemble.load("unproven").save("again")
    # As Open MPI starts them.
    common = ON_CPUS | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "jaxensemble", "predict", "again", "x.npy", "--distributed", "--rows", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--out", f"{k}.npy", "--probabilities", f"p{k}.npy"],
            env=os.environ | common | {"OMPI_COMM_WORLD_RANK": str(k), "OMPI_COMM_WORLD_LOCAL_RANK": str(k)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for k in range(2)
    ]
    ends = [(*process.communicate(timeout=200), process.returncode) for process in processes]
    assert [code for _, _, code in ends] == [0, 0], ends
    (printed, errors, _), (others_printed, others_errors, _) = ends
    assert "output: float32[1, 3, 4]" in printed and "NOT verified" in errors
    assert "output:" not in others_printed and "NOT verified" not in others_errors
    np.testing.assert_allclose(np.load("0.npy"), Ensemble.load("again")(X), rtol=2e-5, atol=2e-6)
    assert np.load("p0.npy").shape == (3, 4)
    assert not list(Path().glob("*1.npy*")) and not list(Path().glob(".*1.npy*"))
