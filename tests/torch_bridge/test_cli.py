"""`torch-bridge`: results, JSON, and exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import jaxensemble
import jaxensemble.cli
from jaxensemble.network.weight_map import Rearrangement
from torch_bridge.cli import app

FACTORIES = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

def dropping():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

class Odd(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x)

class Deciding(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x

class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
    def forward(self, ids):
        return self.embed(ids)

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
    def forward(self, x, scale=1.0, mask=None, activation="relu"):
        x = getattr(torch, activation)(self.fc(x)) * scale
        return x if mask is None else x.masked_fill(mask, 0)

number = 3

def needs(width):
    return nn.Linear(4, width)

def no_module():
    return 3
"""


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "factories", raising=False)


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def test_port_says_that_it_agrees() -> None:
    result = run("port", "factories:mlp", "--input", "8,4", "--members", "3")
    assert result.exit_code == 0, result.output
    assert "3 x Sequential" in result.stdout and "agrees with PyTorch" in result.stdout


def test_port_saves_what_agrees() -> None:
    result = run("port", "factories:mlp", "-i", "8,4", "--out", "net")
    assert result.exit_code == 0, result.output
    assert "saved to net" in result.stdout and jaxensemble.verify("net").verified
    result = run("port", "factories:mlp", "-i", "8,4", "--out", "net")
    assert result.exit_code == 3 and "exists: force=True (--force) replaces it" in result.stderr
    result = run("port", "factories:mlp", "-i", "8,4", "--out", "net", "--force", "--no-check", "--members", "3")
    assert result.exit_code == 0 and "NOT compared with PyTorch" in result.stdout
    manifest = jaxensemble.verify("net")
    assert manifest.members == 3 and not manifest.verified


def test_what_does_not_agree_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda self, array: np.ascontiguousarray(array.reshape(self.shape)) + 1  # noqa: E731
    monkeypatch.setattr(Rearrangement, "apply", wrong)
    result = run("port", "factories:mlp", "-i", "8,4", "--out", "net")
    assert result.exit_code == 1, result.output
    assert not Path("net").exists()


def test_port_of_checkpoints_by_glob() -> None:
    import factories  # pyright: ignore[reportMissingImports]

    for k in range(3):
        torch.save(factories.mlp().state_dict(), f"member{k}.pt")
    result = run("port", "factories:mlp", "-i", "8,4", "-c", "member*.pt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["members"] == 3
    written_out = run("port", "factories:mlp", "-i", "8,4", "-c", "member0.pt", "member1.pt", "member2.pt", "--json")
    assert written_out.exit_code == 0, written_out.output
    assert json.loads(written_out.stdout)["members"] == 3
    result = run("port", "factories:mlp", "member1.pt", "-i", "8,4")
    assert result.exit_code == 2 and "--checkpoints has to come before" in result.stderr


def test_of_a_folder_the_error_says_which_files_to_name() -> None:
    for file in ("runs/a.ckpt", "runs/b.ckpt", "runs/c.pt", "nested/0/last.safetensors"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    result = run("port", "factories:mlp", "-i", "8,4", "-c", "runs", "nested")
    assert result.exit_code == 3
    assert "--checkpoints 'runs/*.ckpt' 'nested/*/*.safetensors'" in result.stderr


def test_a_mode_is_evaluation_unless_another_one_is_asked_for() -> None:
    import factories  # pyright: ignore[reportMissingImports]

    torch.save(factories.dropping().state_dict(), "member.pt")
    for files in ((), ("-c", "member.pt")):
        for mode, printed in (((), ""), (("--mode", "train"), "in training mode: 1"), (("--mode", "as_is"), "mode: 1")):
            result = run("port", "factories:dropping", "-i", "8,4", "--no-check", *files, *mode)
            assert result.exit_code == 0, result.output
            assert printed in result.stdout and (bool(printed) == ("training" in result.stdout))


def test_which_weights_of_checkpoints_are_meant() -> None:
    import factories  # pyright: ignore[reportMissingImports]

    for k in range(2):
        first, second = (factories.mlp().state_dict() for _ in range(2))
        renamed = {f"encoder.{key.replace('0.', 'first.')}": value for key, value in second.items()}
        torch.save({"model": first, "ema": {"weights": renamed | {"queue": torch.ones(1)}}}, f"member{k}.pt")
    files = ("port", "factories:mlp", "-i", "8,4", "-c", "member*.pt")
    chosen = ("--key", "ema", "--prefix", "encoder.", "--rename", "first=0", "--ignore", "q*")
    result = run(*files, *chosen, "--out", "net")
    assert result.exit_code == 0, result.output
    taken = "taken from `ema.weights`; prefix `encoder.` removed; `first` renamed `0`; left out: `model`, `q*`"
    assert f"members 0 (member0.pt), 1 (member1.pt): {taken}" in result.stdout
    shown = CliRunner().invoke(jaxensemble.cli.app, ["inspect", "net"]).stdout
    assert f"weights of members 0 (member0.pt), 1 (member1.pt): {taken}" in shown
    printed = json.loads(CliRunner().invoke(jaxensemble.cli.app, ["inspect", "net", "--json"]).stdout)
    assert printed["sources"][1]["taken"]["renamed"] == {"first": "0"}
    manifest = json.loads(run(*files, "--key", "model", "--json", "--no-check").stdout)
    assert [source["taken"]["key"] for source in manifest["sources"]] == ["model", "model"]
    assert run("check", *files[1:], *chosen).exit_code == 0
    sets = run("port", "factories:mlp", "-i", "8,4", "-c", "member*.pt", "--key", "none")
    assert sets.exit_code == 3 and 'it has key="model", key="ema.weights"' in sets.stderr


def test_check_prints_the_table_or_json_and_saves_it() -> None:
    result = run("check", "factories:mlp", "-i", "8,4", "--save", "report.json")
    assert result.exit_code == 0, result.output
    assert "bit for bit" in result.stdout
    assert json.loads(Path("report.json").read_text())["passed"] is True
    assert json.loads(run("check", "factories:mlp", "-i", "8,4", "--json").stdout)["passed"] is True


def test_source_is_printed() -> None:
    result = run("source", "factories:mlp", "-i", "8,4")
    assert result.exit_code == 0, result.output
    assert "nnx.Linear(4, 3" in result.stdout
    compile(result.stdout, "<source>", "exec")


def test_sizes_that_stay_open() -> None:
    port = ["port", "factories:Ids", "-i", "int64:2,6:5", "--dynamic", "ids:1=length", "-o", "lengths"]
    assert run(*port).exit_code == 0
    np.save("ids.npy", np.zeros((3, 9), np.int64))
    printed = CliRunner().invoke(jaxensemble.cli.app, ["inspect", "lengths"])
    assert "inputs: ids [N, length]\nlength: at least 1" in printed.output
    assert CliRunner().invoke(jaxensemble.cli.app, ["predict", "lengths", "ids.npy"]).exit_code == 0
    wrong = run(*port[:-3], "ids=length")
    assert wrong.exit_code == 2
    assert "expected x:2=height,3=width; got 'ids=length'" in " ".join(wrong.output.split())


def test_integer_and_float64_inputs() -> None:
    assert run("port", "factories:Ids", "-i", "int64:6:5").exit_code == 0


def test_inputs_by_name_and_of_every_kind() -> None:
    inputs = ("-i", "6,4", "-i", "value:0.5", "-i", "mask=bool:6,3", "-i", "activation=value:tanh")
    result = run("source", "factories:Masked", *inputs)
    assert result.exit_code == 0, result.output
    assert "def __call__(self, x, mask):" in result.stdout
    assert "Fixed when it was ported: scale=0.5, activation='tanh'." in result.stdout
    result = run("port", "factories:Masked", *inputs, "--out", "masked")
    assert result.exit_code == 0, result.output
    np.savez("inputs.npz", x=np.ones((2, 4), np.float32), mask=np.ones((2, 3), bool))
    for command in (("inspect", "masked"), ("predict", "masked", "inputs.npz", "--out", "outputs.npy")):
        result = CliRunner().invoke(jaxensemble.cli.app, list(command))
        assert result.exit_code == 0, result.output
    assert not np.load("outputs.npy").any()
    assert (
        run("check", "factories:Masked", "-i", "x=6,4", "-i", "mask=value:None", "-i", "scale=value:2").exit_code == 0
    )


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("port", "factories:Odd", "-i", "4"), 4, "special_airy_ai"),
        (("port", "factories:nothing", "-i", "4"), 3, "no function or class 'nothing'"),
        (("port", "factories:number", "-i", "4"), 3, "no function or class 'number'"),
        (("port", "no_such_module:f", "-i", "4"), 3, "no module 'no_such_module'"),
        (("port", "factories", "-i", "4"), 2, "package.module:factory"),
        (("port", "factories.py:mlp", "-i", "4"), 2, "without .py: factories:mlp"),
        (("port", "./factories.py:mlp", "-i", "4"), 2, "without .py: factories:mlp"),
        (("port", "factories:mlp", "-i", "4,x"), 2, "expected a shape"),
        (("port", "factories:mlp", "-i", "int32000:4"), 2, "expected a shape"),
        (("port", "factories:mlp", "-i", "8,5"), 3, "PyTorch itself cannot run Sequential"),
        (("port", "factories:mlp", "-i", "int64:8,4"), 3, "inputs (int64 [8, 4]): RuntimeError: mat1 and mat2 must"),
        (("port", "factories:mlp", "-i", "8,4", "-c", "none*.pt"), 6, "no file matches 'none*.pt'"),
        (("port", "factories:mlp", "-i", "8,4", "-c", "f*.pt", "--members", "5"), 2, "--members"),
        (("check", "factories:mlp", "-i", "8,4", "-c", "f*.pt", "--members", "2"), 2, "--members"),
        (("bench", "factories:mlp", "-i", "8,4", "-c", "f*.pt", "--members", "10"), 2, "--members"),
        (("port", "factories:mlp", "-i", "8,4", "--key", "model"), 2, "--key"),
        (("port", "factories:mlp", "-i", "8,4", "-c", "f*.py", "--rename", "a"), 2, "expected old=new; got a"),
        (("port", "factories:mlp"), 2, "--input"),
        (("port", "factories:Masked", "-i", "x=4,y"), 2, "expected a shape"),
        (("port", "factories:Masked", "-i", "8,4", "-i", "scale=value:{1}"), 3, "set in `scale`"),
        (("port", "factories:Masked", "-i", "8,4", "-i", "other=value:1"), 3, "PyTorch itself cannot run Masked"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(args: tuple[str, ...], code: int, message: str) -> None:
    result = run(*args)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_errors_as_json() -> None:
    result = run("port", "factories:Odd", "-i", "4", "--json")
    assert result.exit_code == 4
    printed = json.loads(result.stdout)
    assert printed["error"] == "UnsupportedError" and printed["details"].splitlines()[0] in printed["message"]


def test_all_of_an_error_is_shown_where_it_is_asked_for() -> None:
    args = ("port", "factories:Deciding", "-i", "4,3")
    short, whole = run(*args).stderr, run(*args, "--debug").stderr
    assert short.endswith("All of it: --debug\n") and "GuardOnDataDependentSymNode" not in short
    assert "GuardOnDataDependentSymNode" in whole
    assert "GuardOnDataDependentSymNode" in json.loads(run(*args, "--json").stdout)["details"]


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("factories:needs", "factories:needs cannot be called without arguments: TypeError"),
        ("factories:no_module", "factories:no_module must return a torch.nn.Module; got int"),
        ("broken:mlp", "module 'broken' cannot be imported: SyntaxError"),
    ],
)
def test_a_factory_that_cannot_be_used_is_told_in_one_message(factory: str, reason: str) -> None:
    Path("broken.py").write_text("def mlp(:\n")
    result = run("check", factory, "-i", "8,4")
    assert result.exit_code == 3 and reason in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--save", "nowhere/times.json"], 6, "there is no directory nowhere"),
        (["--plot", "times.txt"], 2, "expected a file ending in"),
        (["--dtype", "int32"], 2, "expected a floating-point dtype"),
    ],
)
def test_what_could_not_be_written_is_said_before_anything_is_timed(
    options: list[str], code: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_bridge.porting.port.to_ensemble", lambda *_, **__: pytest.fail("ported"))
    result = run("bench", "factories:mlp", "-i", "8,4", *options)
    assert result.exit_code == code and reason in result.stderr
