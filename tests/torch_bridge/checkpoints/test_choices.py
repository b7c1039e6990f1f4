"""Choices between a checkpoint's weights: known shapes, several sets of weights, names, and other objects."""

import argparse
import collections
import copy
import datetime
import json
import pickle
import re
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import torch_bridge
from jaxensemble import Ensemble
from jaxensemble.errors import InputError, MemberError
from jaxensemble.network.sources import Selection
from tests.helpers.attacks.checkpoints import Calling, Covered, Payload, covered
from tests.helpers.refusing import refusal
from torch_bridge import parity
from torch_bridge.checkpoints import Choice, Expected, hyperparameters, load_ensemble, load_members, read_state_dict

X = torch.linspace(-1, 1, 6).reshape(2, 3)
State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(collections.OrderedDict(fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), head=nn.Linear(4, 2))).eval()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))


class Lit(nn.Module):
    """A module that holds the model as a LightningModule does, with other modules next to it."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)
        self.criterion = Critic()


def saved(folder: Path, content: Any, name: str = "member.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def read(path: Path, **choice: Any) -> tuple[State, Selection]:
    return read_state_dict(path, Expected.of(net()), Choice(**choice))


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def trained() -> tuple[State, dict[str, Any]]:
    """Returns a state dict, and the state of its optimizer after a step."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


RAW, EMA, OPTIMIZER = dict(net().state_dict()), dict(net().state_dict()), trained()[1]
AVERAGED = dict(AveragedModel(net()).state_dict())
PLAIN = {name.removeprefix("module."): tensor for name, tensor in AVERAGED.items() if name != "n_averaged"}
ARGUMENTS = argparse.Namespace(lr=0.1, layers=[3, 4])


# One way to read a file


KNOWN: dict[str, tuple[Any, State, str]] = {
    "itself": (RAW, RAW, ""),
    "timm": (
        {
            "epoch": 3,
            "arch": "net",
            "state_dict": RAW,
            "optimizer": OPTIMIZER,
            "args": ARGUMENTS,
            "metric": np.float64(1),
        },
        RAW,
        "taken from `state_dict`; left out: `epoch`, `arch`, `optimizer`, `args`, `metric`",
    ),
    "any key": ({"ema_weights": RAW}, RAW, "taken from `ema_weights`"),
    "averaged": (AVERAGED, PLAIN, "prefix `module.` removed; left out: `n_averaged`"),
    "averaged in a dict": (
        {"model_ema": AVERAGED},
        PLAIN,
        "taken from `model_ema`; prefix `module.` removed; left out: `n_averaged`",
    ),
    "lightning": (
        {
            "state_dict": Lit(model=nn.DataParallel(net())).state_dict() | prefixed(RAW, "model.module."),
            "callbacks": {"ModelCheckpoint{'monitor': 'val.loss'}": {"best": torch.tensor(0.25)}},
            "optimizer_states": [OPTIMIZER],
            "hyper_parameters": {"args": ARGUMENTS},
        },
        RAW,
        "taken from `state_dict`; prefix `model.module.` removed; left out: `callbacks`, `optimizer_states`, "
        "`hyper_parameters`, `criterion.*`",
    ),
    "compiled": (prefixed(RAW, "_orig_mod."), RAW, "prefix `_orig_mod.` removed"),
    "net": (prefixed(RAW, "net."), RAW, "prefix `net.` removed"),
    "average alone": (
        prefixed(EMA, "ema_model.") | {"initted": torch.ones(1), "step": torch.ones(1)},
        EMA,
        "prefix `ema_model.` removed; left out: `initted`, `step`",
    ),
    "other networks": (
        {"generator": RAW, "critic": Critic().state_dict(), "steps": 5},
        RAW,
        "taken from `generator`; left out: `critic`, `steps`",
    ),
    "a number beside the weights": (RAW | {"epoch": 3}, RAW, "left out: `epoch`"),
    "one object twice": ({"model": RAW, "ema": RAW}, RAW, "taken from `model`; left out: `ema`"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_file_that_can_be_read_in_one_way_needs_no_argument(name: str, tmp_path: Path) -> None:
    content, state, text = KNOWN[name]
    found, taken = read(saved(tmp_path, content))
    assert same(found, state) and str(taken) == text


# Several sets of weights


class Mangled(nn.Module):
    """Returns an average whose names have no dots, as buffers of one module."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", ""), tensor)


BY_SHAPE = "(by shapes: its names are not the model's)"
SEVERAL: dict[str, tuple[Any, dict[str, State]]] = {
    "model and model_ema": (
        {"model": RAW, "model_ema": AVERAGED, "optimizer": OPTIMIZER},
        {'key="model"': RAW, 'key="model_ema"': PLAIN},
    ),
    "state_dict and state_dict_ema": (
        {"state_dict": RAW, "state_dict_ema": EMA, "args": ARGUMENTS},
        {'key="state_dict"': RAW, 'key="state_dict_ema"': EMA},
    ),
    "params and params_ema": ({"params": RAW, "params_ema": EMA}, {'key="params"': RAW, 'key="params_ema"': EMA}),
    "a callback": (
        {"state_dict": prefixed(RAW, "model."), "callbacks": {"EMA": {"ema_state_dict": prefixed(EMA, "model.")}}},
        {'key="state_dict"': RAW, 'key="callbacks.EMA.ema_state_dict"': EMA},
    ),
    "one state dict": (
        {
            "state_dict": Lit(model=net(), ema_model=net()).state_dict()
            | prefixed(RAW, "model.")
            | prefixed(EMA, "ema_model.")
        },
        {
            'prefix="model.", ignore=["ema_model.*", "criterion.*"]': RAW,
            'prefix="ema_model.", ignore=["model.*", "criterion.*"]': EMA,
        },
    ),
    "an average of two": (
        {"model": RAW, "ema": prefixed(RAW, "online_model.") | prefixed(EMA, "ema_model.") | {"step": torch.ones(1)}},
        {
            'key="model"': RAW,
            'key="ema", prefix="online_model.", ignore=["ema_model.*", "step"]': RAW,
            'key="ema", prefix="ema_model.", ignore=["online_model.*", "step"]': EMA,
        },
    ),
    "the file itself": (
        RAW | {"ema": EMA, "average": EMA | {"more": torch.ones(1)}},
        {'key=""': RAW, 'key="ema"': EMA},
    ),
    "beside the model's own names": (
        RAW | prefixed(EMA, "ema."),
        {'prefix="", ignore=["ema.*"]': RAW, 'prefix="ema.", ignore=["fc.*", "bn.*", "head.*"]': EMA},
    ),
    "a list without names": (
        {"model": RAW, "ema": {"decay": 0.9, "shadow_params": [*net().parameters()]}},
        {'key="model"': RAW, f'key="ema.shadow_params" {BY_SHAPE}': {}},
    ),
    "names without dots": (
        {"state_dict": prefixed(RAW, "model.") | prefixed(dict(Mangled(EMA).state_dict()), "model_ema.")},
        {'prefix="model.", ignore=["model_ema.*"]': RAW, f"model_ema.* {BY_SHAPE}": {}},
    ),
    "a list of lists": (
        {"model": RAW, "ema": [[parameter] for parameter in net().parameters()], "steps": torch.ones(1)},
        {'key="model"': RAW, f'key="ema" {BY_SHAPE}': {}},
    ),
    "an average in two dicts": (
        {"model": RAW, "ema_body": {"a": RAW["fc.weight"], "b": RAW["fc.bias"]}, "ema_rest": [*RAW.values()][2:]},
        {'key="model"': RAW, f"all else in the file {BY_SHAPE}": {}},
    ),
    "an average in two dicts below the weights": (
        {"a": {"model": RAW | {"ema": [[*RAW.values()][:3], [*RAW.values()][3:]]}}},
        {'key="a.model"': RAW, f'key="a.model.ema" {BY_SHAPE}': {}},
    ),
    "names without any dot": (
        {"state_dict": prefixed(RAW, "model.") | {f"ema_{name.replace('.', '_')}": t for name, t in EMA.items()}},
        {
            'prefix="model.", ignore=[' + ", ".join(f'"ema_{name.replace(".", "_")}"' for name in EMA) + "]": RAW,
            f"names without `model.` {BY_SHAPE}": {},
        },
    ),
    "several ensembles' members": ([RAW, EMA], {'key="0"': RAW, 'key="1"': EMA}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_sets_of_weights_one_has_to_be_named(name: str, tmp_path: Path) -> None:
    """Each file is read with the arguments that its error suggests."""
    content, ways = SEVERAL[name]
    path = saved(tmp_path, content)
    with pytest.raises(InputError, match="holds more than one set of weights") as caught:
        read(path)
    rows = re.findall(r"^  (?:or )?(.*?)[,.]$", caught.value.details, re.MULTILINE)
    assert rows == [*ways] or name == "the file itself"
    for row, state in ways.items():
        assert row in rows
        if BY_SHAPE not in row:
            found, taken = read(path, **eval(f"dict({row})"))
            assert same(found, state)
            assert (
                taken.key == (re.findall(r'key="(.*?)"', row) or ["state_dict" if "state_dict" in content else ""])[0]
            )


def test_of_members_in_one_file_the_error_says_how_all_are_read(tmp_path: Path) -> None:
    advice = "load each in a call of its own, and join them with Ensemble.concatenate"
    assert advice in str(refusal(lambda: read(saved(tmp_path, {f"member{k}": dict(RAW) for k in range(12)}))))
    assert advice not in str(refusal(lambda: read(saved(tmp_path, {"model": RAW, "ema": EMA}))))


def test_several_sets_of_weights_in_several_files_are_one_error(tmp_path: Path) -> None:
    paths = [saved(tmp_path, {"model": RAW, "ema": EMA}, f"{k}.pt") for k in range(2)]
    paths += [saved(tmp_path, {"params": RAW, "params_ema": EMA}, "2.pt"), saved(tmp_path, RAW, "3.pt")]
    error = refusal(lambda: load_ensemble(net, paths, (X,)))
    assert "members 0 (0.pt), 1 (1.pt): holds more than one set of weights" in str(error)
    assert re.search(r'member 2 \(2.pt\): .* key="params", or key="params_ema"\.', str(error))
    assert "3.pt" not in error.details


def test_weights_of_one_place_in_one_file_and_of_another_in_the_next_are_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path, {"model": RAW}, "0.pt"), saved(tmp_path, {"model_ema": AVERAGED}, "1.pt")]
    for load in (lambda: load_ensemble(net, paths, (X,)), lambda: load_members(net, paths)):
        error = refusal(load)
        assert 'member 0 (0.pt): key="model", prefix=""\n  member 1 (1.pt): key="model_ema", prefix="module."' in str(
            error
        )
    paths = [saved(tmp_path, {"ema": {f"weights{k}": RAW}}, f"{k}.pt") for k in range(2)]
    assert "not all read in the same way" in str(refusal(lambda: load_members(net, paths, key="ema")))
    paths = [saved(tmp_path, {"model": RAW}, "0.pt"), saved(tmp_path, {"model": RAW, "model_ema": EMA}, "1.pt")]
    assert len(load_members(net, paths, key="model")) == 2


def test_a_model_whose_parameters_are_all_frozen_has_rivals_too(tmp_path: Path) -> None:
    expected = Expected.of(net().requires_grad_(False))
    path = saved(tmp_path, {"model": RAW, "ema": [*EMA.values()]})
    error = refusal(lambda: read_state_dict(path, expected))
    assert f'key="ema" {BY_SHAPE}' in str(error)
    partly = net()
    partly.get_submodule("fc").requires_grad_(False)
    assert Expected.of(partly).trained == collections.Counter({(4,): 2, (2, 4): 1, (2,): 1})


def test_the_empty_key_is_the_file_itself(tmp_path: Path) -> None:
    error = refusal(lambda: read(saved(tmp_path, {"model": RAW}), key=""))
    assert 'key="", and has no weights there; it has key="model"' in str(error)
    assert same(read(saved(tmp_path, RAW | {"ema": EMA}), key="")[0], RAW)


@pytest.mark.parametrize("content", [{0: RAW, "0": EMA}, {"a": [{"True": RAW, True: EMA}]}])
def test_keys_that_are_written_alike_are_refused(content: Any, tmp_path: Path) -> None:
    assert "two keys that are both written" in str(refusal(lambda: read(saved(tmp_path, content))))


def test_attributes_of_dicts_and_tensors_are_not_looked_at(tmp_path: Path) -> None:
    state = Covered({name: covered(tensor.clone()) for name, tensor in RAW.items()})
    path = saved(tmp_path, {"model": state, "more": [state["fc.weight"]]})
    with hyperparameters.allow_stand_ins():
        loaded = torch.load(path, weights_only=True)
    assert loaded["model"].items == loaded["model"]["fc.weight"].detach == 3
    found, _ = read(path)
    assert same(found, RAW) and not found["fc.weight"].__dict__


def test_a_key_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": RAW, "ema": {"weights": EMA, "decay": 0.9}, "epoch": 1})
    assert same(read(path, key="ema")[0], EMA)  # the only one in there
    for key, text in {
        "emma": 'key="emma", and has no such key; it has key="model", key="ema.weights"',
        "epoch": 'key="epoch", and has no weights there; it has key="model"',
        "ema.decay.x": "has no such key",
    }.items():
        assert text in str(refusal(lambda key=key: read(path, key=key)))
    twice = saved(tmp_path, {"a.b": RAW, "a": {"b": EMA}})
    assert 'has two places for key="a.b"' in str(refusal(lambda: read(twice, key="a.b")))


# Names


def test_counters_that_a_file_lacks_are_as_pytorch_has_them(tmp_path: Path) -> None:
    def counting() -> nn.Module:
        model = net()
        model.get_submodule("bn").num_batches_tracked.fill_(7)  # pyright: ignore[reportCallIssue]
        return model

    old = {name: tensor for name, tensor in RAW.items() if name != "bn.num_batches_tracked"}
    paths = [
        saved(tmp_path, content, f"{k}.pt") for k, content in enumerate((old, {"model": prefixed(old, "module.")}))
    ]
    model = counting()
    model.load_state_dict(old)
    for path in paths:
        ensemble = load_ensemble(counting, [path], (X,))
        assert same(torch_bridge.to_torch(ensemble)[0], model.state_dict())
        assert ensemble.sources is not None and ensemble.sources[0].taken.not_held == ("bn.num_batches_tracked",)
    text = "prefix `module.` removed; not in the file, and as the factory makes it: `bn.num_batches_tracked`"
    assert text in str(read(paths[1])[1])
    assert "key=" in str(refusal(lambda: read(saved(tmp_path, {"a": RAW, "b": old}))))
    del old["bn.running_mean"]
    with pytest.raises(MemberError, match=r"`bn\.running_mean`: missing") as caught:
        load_ensemble(net, [saved(tmp_path, old)], (X,))
    assert "num_batches_tracked" not in caught.value.details


def test_what_fits_no_name_in_any_file_is_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path, content, f"{k}.pt") for k, content in enumerate((RAW | {"queue": torch.ones(1)}, EMA))]
    load_ensemble(net, paths, (X,), ignore=["queue"], rename={"head.": "head"}, check=False)
    with pytest.raises(
        InputError, match=r'^rename=\{"hed": "head"\}, ignore=\["quue"\]: no name in any of these'
    ) as caught:
        load_ensemble(net, paths, (X,), ignore=["queue", "quue"], rename={"hed": "head", "fc": "fc"})
    assert '"queue"' not in str(caught.value)


def test_prefix_rename_and_ignore(tmp_path: Path) -> None:
    names = prefixed({name.replace("fc.", "first.").replace("head", "last"): t for name, t in RAW.items()}, "encoder.")
    path = saved(tmp_path, names | {"queue": torch.ones(5), "projector.0.weight": torch.ones(2, 2)})
    rename, ignore = {"first": "fc", "last.": "head."}, ["queue", "projector.*"]
    found, taken = read(path, prefix="encoder.", rename=rename, ignore=ignore)
    assert same(found, RAW)
    assert taken == Selection("", "encoder.", {"first": "fc", "last": "head"}, ("queue", "projector.*"))
    assert same(read(saved(tmp_path, prefixed(RAW, "a.b.")), rename={"a.b": ""})[0], RAW)
    assert same(read(saved(tmp_path, RAW | {"head.extra": torch.ones(2)}), ignore=["*.extra"])[0], RAW)


OFFERED: dict[str, tuple[State, dict[str, Any], str]] = {
    "another prefix": (prefixed(RAW, "encoder."), {}, 'prefix="encoder."'),
    "and other names": (
        prefixed(RAW, "encoder.body.") | {"encoder.pool": torch.ones(1), "queue[0]": torch.ones(1)},
        {},
        'prefix="encoder.body.", ignore=["encoder.pool", "queue[[]0]"]',
    ),
    "no prefix": (RAW, {"prefix": "net."}, 'prefix=""'),
    "a prefix without its dot": (prefixed(RAW, "net."), {"prefix": "net"}, 'prefix="net."'),
    "names that lack it": (
        prefixed(RAW, "net.") | {"loss.a": torch.ones(1), "step": torch.ones(1)},
        {"prefix": "net.", "ignore": ["other"]},
        'ignore=["other", "loss.*", "step"]',
    ),
    "a prefix of the model": ({name.removeprefix("fc."): t for name, t in RAW.items()}, {}, ""),
}


@pytest.mark.parametrize("name", [name for name, row in OFFERED.items() if row[2]])
def test_where_names_differ_by_a_prefix_the_argument_is_offered(name: str, tmp_path: Path) -> None:
    state, given, text = OFFERED[name]
    path = saved(tmp_path, state)
    error = refusal(lambda: read(path, **given))
    assert text in str(error)
    assert same(read(path, **given | eval(f"dict({text})"))[0], RAW)
    assert "missing" not in error.details


def test_where_the_model_has_a_prefix_more_the_renaming_is_offered(tmp_path: Path) -> None:
    factory = lambda: nn.ModuleDict({"backbone": net()})  # noqa: E731
    path, expected = saved(tmp_path, RAW), Expected.of(factory())
    error = refusal(lambda: read_state_dict(path, expected))
    assert 'rename={"": "backbone"}' in str(error)
    found, taken = read_state_dict(path, expected, Choice(rename={"": "backbone"}))
    assert same(found, prefixed(RAW, "backbone.")) and str(taken) == "`backbone.` put before every name"


def test_where_a_part_was_wrapped_the_renaming_is_offered(tmp_path: Path) -> None:
    wrapped = net()
    for name, times in {"fc": 1, "head": 2}.items():
        for _ in range(times):
            setattr(wrapped, name, nn.DataParallel(wrapped.get_submodule(name)))
    path = saved(tmp_path, {"model": prefixed(dict(wrapped.state_dict()), "net.")})
    error = refusal(lambda: read(path))
    rename = {"fc.module": "fc", "head.module": "head", "head.module.module": "head"}
    assert f"rename={json.dumps(rename)}" in str(error)
    assert same(read(path, rename=rename)[0], {n.replace(".module", ""): t for n, t in wrapped.state_dict().items()})


def test_a_prefix_is_offered_where_some_names_are_missing(tmp_path: Path) -> None:
    state = prefixed(RAW, "encoder.")
    del state["encoder.head.bias"]
    paths = [saved(tmp_path, state)]
    error = refusal(lambda: load_ensemble(net, paths, (X,)))
    assert "has 8 of the 9 names of the model" in str(error) and 'prefix="encoder."' in str(error)
    with pytest.raises(MemberError, match=r"`head.bias`: missing, expected float32\[2\], in member 0"):
        load_ensemble(net, paths, (X,), prefix="encoder.")


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, RAW | prefixed({"bias": torch.ones(2)}, "old."))
    error = refusal(lambda: read(path, rename={"old": "head"}))
    assert "head.bias and old.bias both become head.bias" in str(error)
    assert same(read(path, rename={"old": "head"}, ignore=["head.bias"])[0], RAW | {"head.bias": torch.ones(2)})


def test_what_no_set_of_weights_fits_is_told_of_the_nearest(tmp_path: Path) -> None:
    wrong = RAW | {"head.weight": torch.ones(3, 4)}
    far = saved(tmp_path, {"state_dict": prefixed(wrong, "model."), "teacher": {"a": torch.ones(1)}})
    with pytest.raises(MemberError, match=r"`head.weight`: expected float32\[2, 4\], got float32\[3, 4\]"):
        load_ensemble(net, [far], (X,))
    error = refusal(lambda: read(saved(tmp_path, {"model": wrong, "ema": wrong | {"head.bias": torch.ones(3)}})))
    assert "none has all names and shapes of the model" in str(error) and 'key="ema" (9 tensors)' in str(error)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"key": 3}, "`key` must be a str or None; got 3"),
        ({"prefix": ["net."]}, "`prefix` must be a str or None"),
        ({"rename": ["a=b"]}, "`rename` must be a dict of new names by old ones"),
        ({"rename": {"a": 3}}, "`rename` must be a dict"),
        ({"ignore": "head.*"}, r"`ignore` must be a list of patterns of names, \['head.\*'\]; got 'head.\*'"),
        ({"ignore": [3]}, "`ignore` must be a list"),
    ],
)
def test_arguments_are_checked(choice: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = saved(tmp_path, RAW)
    for call in (lambda: load_ensemble(net, [path], (X,), **choice), lambda: load_members(net, [path], **choice)):
        assert re.search(text, str(refusal(call)))


# Sources that the ensemble keeps


def test_the_ensemble_and_its_manifest_say_what_was_taken(tmp_path: Path) -> None:
    paths = [saved(tmp_path, {"model": RAW, "ema": prefixed(EMA, "module."), "epoch": k}, f"{k}.pt") for k in range(2)]
    ensemble = load_ensemble(net, paths, (X,), key="ema", check=False)
    taken = Selection("ema", "module.", {}, ("model", "epoch"))
    assert ensemble.sources is not None
    assert [(source.file, source.taken) for source in ensemble.sources] == [("0.pt", taken), ("1.pt", taken)]
    ensemble.save(tmp_path / "ensemble")
    (first, _) = json.loads((tmp_path / "ensemble/manifest.json").read_text())["sources"]
    assert first["file"] == "0.pt" and first["taken"]["key"] == "ema" and len(first["sha256"]) == 64
    assert Ensemble.load(tmp_path / "ensemble").sources == ensemble.sources
    first, second = ensemble.sources
    assert ensemble[1:].sources == (second,) and ensemble[[1, 0]].sources == (second, first)
    assert ensemble.train().sources == (first, second) and ensemble.train().proof is None
    assert pickle.loads(pickle.dumps(ensemble)).sources == copy.copy(ensemble).sources == (first, second)
    assert Ensemble.concatenate([ensemble, ensemble[:1]]).sources == (first, second, first)
    other = jax.tree.map(lambda leaf: leaf + 0, ensemble)
    assert other.sources is None and Ensemble.concatenate([ensemble, other]).sources is None
    members = load_members(net, paths, key="ema")
    assert all(same(dict(member.state_dict()), EMA) for member in members)
    report = parity.check(members, ensemble, (X,), thorough=False)
    assert f"weights of members 0 (0.pt), 1 (1.pt): {taken}" in report.notes


# Next to the weights


HARMLESS: dict[str, Any] = {
    "arguments": ARGUMENTS,
    "a namespace": types.SimpleNamespace(lr=0.1),
    "numpy": [
        np.float64(1.5),
        np.int64(3),
        np.bool_(True),
        np.ones(3),
        np.array(["a", None]),
        np.dtype("int8"),
        np.float32,
    ],
    "random states": np.random.RandomState(0).get_state(),
    "paths": [Path("a"), Path("a").absolute()],
    "dates": [datetime.datetime.now(tz=datetime.UTC), datetime.date(2026, 1, 1), datetime.timedelta(3)],
    "dicts": [collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.OrderedDict(a=1)],
    "versions": torch.__version__,
    "containers": [{1, 2}, frozenset({3}), slice(1, 2), complex(1, 2), b"bytes", int],
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_hyperparameters_beside_the_weights_are_read_as_nothing(name: str, legacy: bool, tmp_path: Path) -> None:
    torch.save({"weights": RAW, "more": HARMLESS[name]}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found, taken = read(tmp_path / "a.pt")
    assert same(found, RAW) and taken.left_out == ("more",)


def test_what_is_read_as_nothing_runs_nothing(tmp_path: Path) -> None:
    """Not a pickle within the pickle, as the bytes of a numpy scalar of objects, nor arguments that set their class."""
    marker = tmp_path / "marker"
    scalar: Any = np.float64(1).__reduce__()[0]
    within = Calling(scalar, (np.dtype("O"), pickle.dumps(Payload(marker), protocol=2)))
    odd = argparse.Namespace(a=within)
    odd.__dict__["__class__"] = int
    path = saved(tmp_path, {"weights": RAW, "more": [within, odd]})
    assert same(read(path)[0], RAW) and not marker.exists()
    with pytest.raises(InputError, match=r"would run code: (posix|nt|os)\.mkdir\."):
        read(saved(tmp_path, {"weights": RAW, "args": argparse.Namespace(a=Payload(marker))}))
    assert not marker.exists()


def test_what_is_allowed_otherwise_stays_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weights": RAW, "args": ARGUMENTS})
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read(path)
        assert set(torch.serialization.get_safe_globals()) == before
        with hyperparameters.allow_stand_ins():
            assert torch.load(path, weights_only=True)["args"] != ARGUMENTS
        assert torch.load(path, weights_only=True)["args"] == ARGUMENTS
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


def test_what_another_thread_loads_meanwhile_is_not_read_as_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as other, hyperparameters.allow_stand_ins():
        for name, value in {"a": ARGUMENTS, "b": collections.defaultdict(list)}.items():
            path = saved(tmp_path, {"weights": RAW, name: value})
            with pytest.raises(pickle.UnpicklingError, match="in another thread"):
                other.submit(torch.load, path, weights_only=True).result()
            torch.load(path, weights_only=True)


def test_what_is_read_as_nothing_is_no_weight(tmp_path: Path) -> None:
    path = saved(tmp_path, {name: tensor.numpy() for name, tensor in RAW.items()})
    with pytest.raises(
        InputError, match=r"must hold a state dict; got a dict with 9 keys, which are\n  'fc.weight': a ndarray,"
    ):
        read(path)


STRANGERS: dict[str, tuple[bytes, str]] = {
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"an HTML page, such as .* logged in"),
    "bare html": (b"\xef\xbb\xbf<html lang='en'>" + b"x" * 9000, "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"XML, .* begins .*AccessDenied|XML"),
    "json": (b'{"error": "not found"}', r"""JSON, .* begins '\{"error": "not found"\}'; download the file again"""),
    "a list": (b"[1, 2]", "JSON"),
    "text": (b"Entry not found", "text, and begins 'Entry not found'; download the file again"),
    "braces": (b"{not json", "text, and begins '{not json'"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        r"a Git LFS pointer, .*: git lfs pull",
    ),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive; unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(20), "a numpy array"),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(name: str, suffix: str, tmp_path: Path) -> None:
    content, text = STRANGERS[name]
    path = tmp_path / f"member{suffix}"
    path.write_bytes(content)
    error = refusal(lambda: load_ensemble(net, [path], (X,)))
    assert re.search(f"is no checkpoint. It is {text}", error.details)


def test_a_file_of_torch_save_by_the_other_name_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, RAW, "member.safetensors")
    assert "a zip archive, which torch.save writes, not a safetensors file: name it .pt" in str(
        refusal(lambda: read(path))
    )


def test_a_layer_that_fits_in_many_places_and_names_of_dots_end(tmp_path: Path) -> None:
    expected = Expected.of(nn.Linear(3, 2))
    layers = {f"layers.{k}.{name}": tensor for k in range(300) for name, tensor in nn.Linear(3, 2).state_dict().items()}
    error = refusal(lambda: read_state_dict(saved(tmp_path, layers), expected))
    assert "or one of 290 more" in error.details and 'prefix="layers.0."' in error.details
    dots = {"." * 100_000 + "weight": torch.ones(2, 3), "bias": torch.ones(2)}
    assert read_state_dict(saved(tmp_path, dots), expected, Choice(rename={"a": "b"}))[0].keys() == dots.keys()


def test_cycles_and_depths_end(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {"weights": RAW}
    cycle["self"] = cycle
    deep: Any = {"a": torch.ones(1)}
    for _ in range(50):
        deep = {"a": deep, "b": deep}
    found, taken = read(saved(tmp_path, cycle | {"deep": deep}))
    assert same(found, RAW) and taken.key == "weights"
