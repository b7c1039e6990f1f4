"""Ensembles from checkpoint files: files that are read, files that are refused, and no file runs code."""

import pickle
import re
import struct
import warnings
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import torch_bridge.checkpoints.load as load
from jaxensemble.errors import EqualMembersWarning, InputError, MemberError, ParityError
from tests.helpers.attacks import damage
from tests.helpers.attacks.checkpoints import HOSTILE, Payload
from tests.helpers.porting import assert_close, randomised
from torch_bridge.checkpoints import Expected, load_ensemble, load_members, member_files, read_state_dict
from torch_bridge.members.stack import Stack, to_torch
from torch_bridge.porting.port import to_ensemble

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Net(nn.Module):
    """A buffer that is saved and one that is not, infinities that belong there, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        self.register_buffer("shift", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.tied(self.out(self.bn(self.fc(x)).relu() + self.shift)) + self.mask).softmax(-1)


def net() -> nn.Module:
    return Net().eval()


def states(factory: Callable[[], nn.Module] = net, members: int = 3) -> list[dict[str, Tensor]]:
    return [dict(factory().state_dict()) for _ in range(members)]


def randomised_states(members: int = 3) -> list[dict[str, Tensor]]:
    result = []
    for seed in range(members):
        model = randomised(Net(), seed).float()
        model.get_buffer("mask").copy_(Net().get_buffer("mask"))
        result.append(dict(model.state_dict()))
    return result


def saved(folder: Path, objects: list[Any], suffix: str = ".pt", **options: Any) -> list[Path]:
    paths = [folder / f"member{k}{suffix}" for k in range(len(objects))]
    for path, value in zip(paths, objects, strict=True):
        torch.save(value, path, **options)
    return paths


def saved_safely(folder: Path, members: list[dict[str, Tensor]]) -> list[Path]:
    """Saves a state dict as safetensors, which stores no tensor twice."""
    paths = [folder / f"member{k}.safetensors" for k in range(len(members))]
    for path, state in zip(paths, members, strict=True):
        safetensors.torch.save_file({key: value for key, value in state.items() if key != "tied.weight"}, path)
    return paths


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FORMATS: dict[str, Callable[[Path, list[dict[str, Tensor]]], list[Path]]] = {
    "pt": saved,
    "pth": lambda folder, members: saved(folder, members, ".pth"),
    "bin": lambda folder, members: saved(folder, members, ".bin"),
    "legacy": lambda folder, members: saved(folder, members, _use_new_zipfile_serialization=False),
    "safetensors": saved_safely,
    "lightning": lambda folder, members: saved(
        folder,
        [{"state_dict": prefixed(m, "model."), "epoch": 3, "optimizer_states": [{}]} for m in members],
        ".ckpt",
    ),
    "model": lambda folder, members: saved(folder, [{"model": m, "ema": m} for m in members]),
    "model_state_dict": lambda folder, members: saved(folder, [{"model_state_dict": m} for m in members]),
    "parallel": lambda folder, members: saved(folder, [prefixed(m, "module.") for m in members]),
    "compiled": lambda folder, members: saved(folder, [prefixed(m, "_orig_mod.") for m in members]),
    "all": lambda folder, members: saved(
        folder, [{"state_dict": prefixed(m, "model._orig_mod.module.")} for m in members]
    ),
    "parameters": lambda folder, members: saved(
        folder, [{k: nn.Parameter(v) if v.is_floating_point() else v for k, v in m.items()} for m in members]
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ensemble(name: str, tmp_path: Path) -> None:
    members = randomised_states()
    ensemble = load_ensemble(net, FORMATS[name](tmp_path, members), (X,), check=name == "pt")
    assert len(ensemble) == 3
    for state, ported in zip(members, to_torch(ensemble), strict=True):
        assert state.keys() == ported.keys()
        for key in state:
            assert state[key].dtype == ported[key].dtype
            assert torch.equal(state[key], ported[key]), key


def test_outputs_are_those_of_the_members(tmp_path: Path) -> None:
    class Plain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 2 * 4, 5))

    models = [randomised(Plain(), seed).eval() for seed in range(3)]
    paths = saved(tmp_path, [model.state_dict() for model in models])
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    factory = lambda: Plain().double().eval()  # noqa: E731
    with jax.enable_x64(True), torch.no_grad():
        ensemble = load_ensemble(factory, paths, (x,))
        expected = torch.stack([model(x) for model in models])
        assert_close(ensemble(x), expected)
        assert_close(load_ensemble(factory, paths, (x,), input_layout="NHWC")(x.movedim(1, -1)), expected)
    loaded = load_members(factory, paths)
    with torch.no_grad():
        assert torch.equal(torch.stack([model(x) for model in loaded]), expected)


def test_a_note_says_what_was_left_out_and_renamed(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    (path,) = saved(tmp_path, [{"state_dict": prefixed(dict(state), "model.module."), "epoch": 1}])
    found, taken = read_state_dict(path, Expected.of(nn.Linear(3, 2)))
    assert list(found) == list(state)
    assert str(taken) == "taken from `state_dict`; prefix `model.module.` removed; left out: `epoch`"
    assert list(read_state_dict(path)[0]) == ["model.module.weight", "model.module.bias"]


def test_a_prefix_that_the_model_has_itself_stays(tmp_path: Path) -> None:
    factory = lambda: nn.ModuleDict({"model": nn.Linear(3, 2)})  # noqa: E731
    (path,) = saved(tmp_path, [factory().state_dict()])
    assert list(read_state_dict(path, Expected.of(factory()))[0]) == ["model.weight", "model.bias"]


# Streaming


def test_one_member_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    models: list[weakref.ref[nn.Module]] = []
    beside: list[int] = []
    read, put = member_files.read_state_dict, Stack.put

    def counted_read(*args: Any) -> Any:
        assert not any(tensor() is not None for tensor in alive), "the tensors of another file are still held"
        tensors, note = read(*args)
        alive.extend(map(weakref.ref, tensors.values()))
        return tensors, note

    def counted_put(self: Stack, member: int, tensors: Any) -> None:
        beside.append(sum(model() is not None for model in models))
        put(self, member, tensors)

    def factory() -> nn.Module:
        models.append(weakref.ref(model := net()))
        return model

    monkeypatch.setattr(member_files, "read_state_dict", counted_read)
    monkeypatch.setattr(Stack, "put", counted_put)
    load_ensemble(factory, saved(tmp_path, states()), (X,), check=False)
    assert beside == [0, 0, 0]
    assert len(alive) == (1 + 2 * 3) * len(net().state_dict())


def test_proof_holds_as_many_members_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    check = load.parity.check

    def counted(models: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(models))
        return check(models, *args, **options)

    factory = lambda: nn.Linear(3, 2)  # noqa: E731
    paths = saved(tmp_path, states(factory, 3))
    monkeypatch.setattr(load.parity, "check", counted)
    monkeypatch.setattr(load, "_PROVEN_TOGETHER", 2 * 8 * 4)
    load_ensemble(factory, paths, (X,))
    monkeypatch.setattr(load, "_PROVEN_TOGETHER", 0)
    load_ensemble(factory, paths, (X,))
    assert sizes == [2, 1, 1, 1, 1]


def test_proof_finds_exchanged_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Stack.put
    monkeypatch.setattr(Stack, "put", lambda self, k, tensors: put(self, (2, 1, 0)[k], tensors))
    paths = saved(tmp_path, states(lambda: nn.Linear(3, 2)))
    with pytest.raises(ParityError, match=r"members 0 \(member0.pt\), 1 \(member1.pt\), 2 \(member2.pt\)"):
        load_ensemble(lambda: nn.Linear(3, 2), paths, (X,))


# Files that are honest and do not fit


def test_all_that_does_not_fit_in_any_file_is_one_error(tmp_path: Path) -> None:
    members = states(members=5)
    del members[1]["fc.bias"]
    members[2]["fc.weight"] = torch.zeros(4, 5)
    members[3]["head.weight"] = torch.zeros(2)
    members[3] = {key: value.half() if value.is_floating_point() else value for key, value in members[3].items()}
    members[4] = prefixed(members[4], "module.") | {"module.tied.weight": torch.zeros(4, 4)}
    del members[4]["module.fc.bias"]
    with pytest.raises(MemberError) as caught:
        load_ensemble(net, saved(tmp_path, members), (X,))
    text = caught.value.details
    for line in (
        "`fc.bias`: missing, expected float32[4], in members 1 (member1.pt), 4 (member4.pt)",
        "`fc.weight`: expected float32[4, 3], got float32[4, 5], in member 2 (member2.pt)",
        "`head.weight`: unexpected, float16[2], in member 3 (member3.pt)",
        "`bn.running_mean`: expected float32[4], got float16[4], in member 3 (member3.pt)",
        "`tied.weight`: tied to `out.weight` in the model, expected the same values, in member 4 (member4.pt)",
    ):
        assert f"\n  {line}\n" in text
    assert ".half()" in text


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    members = randomised_states()
    members[1]["fc.weight"][2, 1] = torch.nan
    members[1]["fc.weight"][3, 0] = torch.inf
    members[2]["mask"][1] = torch.nan
    paths = saved(tmp_path, members)
    with pytest.raises(InputError) as caught:
        load_ensemble(net, paths, (X,))
    assert "member 1 (member1.pt), `fc.weight`: 2 of 12 values, the first at (2, 1): nan" in str(caught.value)
    assert "member 2 (member2.pt), `mask`: 1 of 4 values, the first at (1,): nan" in str(caught.value)
    assert "member 0" not in str(caught.value)
    ensemble = load_ensemble(net, paths, (X,), allow_nonfinite=True, check=False)
    for state, ported in zip(members, to_torch(ensemble), strict=True):
        np.testing.assert_array_equal(state["fc.weight"], ported["fc.weight"])


def test_members_of_equal_weights_are_told(tmp_path: Path) -> None:
    members = states()
    paths = saved(tmp_path, members)
    torch.save(members[0], tmp_path / "other_name.pt")  # PyTorch writes the name into the file
    with pytest.warns(EqualMembersWarning, match=r"members 0 \(member0\.pt\), 3 \(other_name\.pt\) have equal weights"):
        load_ensemble(net, [*paths, tmp_path / "other_name.pt"], (X,), check=False)
    torch.save(members, tmp_path / "all.pt")
    with pytest.warns(EqualMembersWarning, match=r"members 0 \(all\.pt\), 1 \(all\.pt\) have equal weights"):
        load_ensemble(net, [tmp_path / "all.pt"] * 2, (X,), key="0", check=False)
    first, second = nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3).eval()
    second.get_buffer("num_batches_tracked").fill_(1)
    with pytest.warns(EqualMembersWarning) as warned:
        to_ensemble([second, first, second, first, first], (X,), check=False)
    assert [str(entry.message).partition(" have")[0] for entry in warned] == ["members 0, 2", "members 1, 3, 4"]
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_ensemble(net, paths, (X,), check=False)
        to_ensemble([first, second], (X,), check=False)
        to_ensemble([nn.Tanh(), nn.Tanh()], (X,), check=False)


def test_a_model_whose_state_dict_is_its_own_business_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

    with pytest.raises(InputError, match=r"these names differ: _extra_state\. Load the members yourself"):
        load_ensemble(lambda: Extra(3, 2), saved(tmp_path, [{"weight": torch.zeros(2, 3)}]), (X,))


@pytest.mark.parametrize(
    ("factory", "paths", "text"),
    [
        (net, "member0.pt", "must be a sequence of files"),
        (net, [], "at least one file"),
        (net, [3], "named by a str or a Path; got int"),
        (net, ["nowhere.pt", "nothing.pt"], r"no file `nowhere.pt`\n  there is no file `nothing.pt`"),
        (net, ["member*.pt"], r"Patterns are not expanded here: pass sorted\(glob.glob\('member\*.pt'\)\)"),
        (net, ["."], r"is a directory; name its files: sorted\(Path\('.'\)"),
        (net, [__file__], r"must be a checkpoint of PyTorch \(.pt, .*got a .py file"),
        (Net(), [__file__], "must be a checkpoint"),
    ],
)
def test_arguments_are_checked(factory: Any, paths: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_ensemble(factory, paths, (X,))


def test_the_factory_is_checked(tmp_path: Path) -> None:
    paths = saved(tmp_path, states())
    with pytest.raises(InputError, match="`factory` must be a function that makes the network; got Net"):
        load_ensemble(Net(), paths, (X,))
    with pytest.raises(InputError, match=r"`factory` must return a torch\.nn\.Module; got NoneType"):
        load_ensemble(lambda: None, paths, (X,))  # type: ignore[arg-type, return-value]


CONTENTS: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.zeros(2, 3), r"must hold a state dict; got a tensor of shape \(2, 3\)"),
    "a list": ([torch.zeros(2)], "must hold a state dict; got a list"),
    "nothing": ({}, "must hold a state dict; got a dict with 0 keys"),
    "other things": (
        {"state_dict": {"layers": 3}, "step": 3},
        "got a dict with 2 keys, which are\n  'state_dict': a dict with 1 keys,\n  'step': a int",
    ),
    "two models": (
        {"model": {"weight": torch.zeros(1)}, "state_dict": {"weight": torch.zeros(1)}},
        "holds more than one set of weights",
    ),
    "a sparse tensor": ({"weight": torch.zeros(2, 3).to_sparse()}, "plain dense tensors; got\n  weight: .*sparse"),
    "a tensor out of nothing": (
        {"weight": torch.zeros(1).expand(10**12)},
        r"weight: \(1000000000000,\) values out of 4 bytes",
    ),
}


# PyTorch's own, of sparse tensors in files: 2.11 and 2.15
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_no_state_dict_is_named(name: str, legacy: bool, tmp_path: Path) -> None:
    value, text = CONTENTS[name]
    (path,) = saved(tmp_path, [value], _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=text):
        read_state_dict(path)


# Files that are hostile or damaged


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # PyTorch's own, of pickles it did not write
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_file_runs_code(
    make: Callable[[Path, Path], None], variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    make(path, marker)
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match=HOSTILE[make]):
        load_ensemble(lambda: nn.Linear(3, 2), [path], (X,))
    assert not marker.exists()


def test_the_payload_works_where_it_may(tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_all_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    paths = saved(tmp_path, [nn.Linear(3, 2).state_dict(), torch.zeros(1), [3]])
    with pytest.raises(InputError, match=r"member 1 \(.*a tensor of shape \(1,\)(.|\n)*member 2 \(.*got a list"):
        load_ensemble(lambda: nn.Linear(3, 2), paths, (X,))


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, [nn.Linear(3, 2).state_dict()])
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{path.stem}/data/0")
    content = bytearray(path.read_bytes())
    name_length, extra_length = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
    content[info.header_offset + 30 + name_length + extra_length + 5] ^= 1
    path.write_bytes(content)
    for read in (load_members, lambda factory, paths: load_ensemble(factory, paths, (X,))):
        with pytest.raises(InputError, match=r"is damaged: Bad CRC-32 for file 'member0/data/0'"):
            read(lambda: nn.Linear(3, 2), [path])


def test_files_saved_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        paths = saved(tmp_path, states(lambda: nn.Linear(3, 2)))
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(load_ensemble(lambda: nn.Linear(3, 2), paths, (X,), check=False)) == 3


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_damaged_files_are_refused_or_read(suffix: str, count: int, tmp_path: Path) -> None:
    """Files that are cut short or changed give an `InputError`, or tensors. `.bin` has the old format here."""
    state = {"weight": torch.arange(15_000.0).reshape(3, 5000), "bias": torch.zeros(2)}
    path = tmp_path / f"member{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    content = path.read_bytes()
    for version in damage.cut(content, 4096):
        path.write_bytes(version)
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_state_dict(path)
    refused = 0
    for version in damage.changed(content, count):
        path.write_bytes(version)
        try:
            found, _ = read_state_dict(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert all(type(value) is Tensor for value in found.values())
    assert refused > count / 10


def test_damaged_safetensors_are_told_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "member.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(InputError, match=r"is not a readable safetensors file: .*[Hh]eader"):
        read_state_dict(path)
