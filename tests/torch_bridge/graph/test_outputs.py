"""Outputs of every kind: dataclasses, named tuples, mappings with attributes, numbers and strings, dicts in order."""

import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, UnsupportedError
from torch_bridge.graph.outputs import arrays_of, constants_of

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Net(nn.Module):
    """Two linear layers, and a forward that takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)


def made(forward: Callable[..., Any]) -> list[nn.Module]:
    torch.manual_seed(0)
    kind = type("Net", (Net,), {"forward": forward})
    return [kind().eval() for _ in range(2)]


@dataclasses.dataclass
class Result:
    logits: Tensor
    features: Tensor | None = None
    count: int = 3


class Gaussian(NamedTuple):
    mean: Tensor
    variance: Any


class ModelOutput(OrderedDict):
    """An output like Hugging Face's: items are attributes and have positions, and fields that are None are no items."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]


@dataclasses.dataclass
class ClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


pytree.register_pytree_node(  # as transformers does
    ClassifierOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: ClassifierOutput(**dict(zip(keys, values, strict=True))),
)


class Attributes(dict):
    """A dict with its items as attributes, of the kind that many have written."""

    __getattr__ = dict.__getitem__


def recursive(self: Any, x: Tensor, depth: int = 2) -> Any:
    """A forward that calls itself: only what the outer call returns is the network's output."""
    inner = {"y": self.first(x), "depth": 0} if depth == 0 else self(x * 2, depth - 1)
    return {"y": inner["y"] + 1, "depth": depth}


CASES: dict[str, Callable[..., Any]] = {
    "a dataclass": lambda self, x: Result(self.first(x), self.second(x)),
    "a dataclass with None": lambda self, x: Result(logits=self.first(x), count=5),
    "a named tuple": lambda self, x: Gaussian(self.first(x), self.second(x).exp()),
    "a named tuple with a number": lambda self, x: Gaussian(self.first(x), 0.5),
    "a mapping with attributes": lambda self, x: ClassifierOutput(logits=self.first(x), hidden_states=(x, x * 2)),
    "a dict with attributes": lambda self, x: Attributes(one=self.first(x), two=self.second(x)),
    "records within records": lambda self, x: Result(self.first(x), Gaussian(x, [Result(self.second(x)), None])),  # type: ignore[arg-type]
    "a list of records": lambda self, x: [Gaussian(self.first(x), None), Gaussian(self.second(x), x)],
    "numbers, flags, strings and None": lambda self, x: (self.first(x), 2, 2.5, True, "text", None, 1j, 2**40),
    "a dict in its own order": lambda self, x: {"z": self.first(x), "a": self.second(x), "m": {"y": x, "b": "text"}},
    "an ordered dict": lambda self, x: OrderedDict(z=self.first(x), a=self.second(x)),
    "of a forward that calls itself": recursive,
}


def assert_alike(actual: Any, expected: Any, member: int | None) -> None:
    """Checks names of classes, the order of fields, and values, for one `member` of the ensemble's outputs."""
    if isinstance(expected, Tensor):
        own = actual if member is None else actual[member]
        np.testing.assert_allclose(own, expected.detach(), rtol=1e-5, atol=1e-6)
        return
    if dataclasses.is_dataclass(expected) or isinstance(expected, Gaussian | Attributes):
        assert type(actual).__name__ == type(expected).__name__
        names = list(expected) if isinstance(expected, Attributes) else list(inspect_fields(expected))
        for name in names:
            assert_alike(getattr(actual, name), getattr(expected, name), member)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_alike(actual[key], expected[key], member)
    elif isinstance(expected, tuple | list):
        assert isinstance(actual, tuple if isinstance(expected, tuple) else list)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_alike(ours, theirs, member)
    elif not dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected)
        assert actual == expected


def inspect_fields(value: Any) -> list[str]:
    return list(getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)])


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, tmp_path: Path) -> None:
    models = made(CASES[case])
    ensemble = torch_bridge.to_ensemble(models, (X,))  # proves the float64 outputs
    outputs = ensemble(X)
    for member, model in enumerate(models):
        assert_alike(outputs, model(X), member)
    assert_alike(torch_bridge.to_flax(models[0], (X,))(X.numpy()), models[0](X), None)
    ensemble.save(tmp_path / "saved")
    loaded = Ensemble.load(tmp_path / "saved")
    assert loaded.network == ensemble.network
    assert_alike(loaded.each(torch.stack([X, X])), models[1](X), 1)
    assert_alike(loaded.update(X)[0], models[0](X), 0)
    again = pickle.loads(pickle.dumps(outputs)), copy.deepcopy(outputs)
    for other in again:
        assert type(other) is type(outputs)
        assert jax.tree.structure(other) == jax.tree.structure(outputs)


def test_records_are_trees_with_fields_attributes_and_positions() -> None:
    models = made(CASES["a mapping with attributes"])
    ensemble = torch_bridge.to_ensemble(models, (X,), check=False)
    output = ensemble(X)
    assert (output.loss, list(output), isinstance(output, dict)) == (None, ["logits", "hidden_states"], True)
    assert output["logits"] is output.logits is output[0] is output.to_tuple()[0]
    with pytest.raises(AttributeError, match="has no field 'attentions'; it has loss, logits, hidden_states"):
        _ = output.attentions
    mean = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf.mean(0), ensemble(x)))(X.numpy())
    assert type(mean) is type(output)
    np.testing.assert_allclose(mean.logits, output.logits.mean(0), rtol=1e-6)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(output)]
    assert paths == [".logits", ".hidden_states[0]", ".hidden_states[1]"]
    assert "logits=" in repr(output)
    np.testing.assert_allclose(ensemble.predict(X).mean.sum(-1), 1, rtol=1e-5)


def test_a_thorough_check_understands_records() -> None:
    models = made(CASES["records within records"])
    ensemble = torch_bridge.to_ensemble(models, (X,))
    report = torch_bridge.check(models, ensemble, (X,))
    assert report.passed
    assert any(row.case.startswith("torch.func.vmap") for row in report.rows)
    assert not torch_bridge.check(models[::-1], ensemble, (X,), thorough=False).passed


@pytest.mark.parametrize("train", [False, True])
def test_a_constant_that_differs_fails(train: bool) -> None:
    """A number among the outputs is compared, too."""
    models = made(lambda self, x: (self.first(x), self.number))
    for model in models:
        vars(model)["number"] = 1
    ensemble = torch_bridge.to_ensemble(models, (X,))
    assert ensemble(X)[1] == 1
    for model in models:
        vars(model)["number"] = 2
    report = torch_bridge.check(models, ensemble, (X,), thorough=train)
    assert [row.case for row in report.rows if not row.passed][:1] == ["numbers and strings"]


def test_a_forward_that_returns_something_else_in_training_is_for_evaluation() -> None:
    models = made(lambda self, x: {"y": self.first(x), "mode": "training" if self.training else "evaluation"})
    ensemble = torch_bridge.to_ensemble(models, (X,))
    assert ensemble(X)["mode"] == "evaluation"
    assert "returns something else in training mode" in ensemble.network.evaluation_only


class Recording(nn.Module):
    """A model like those of transformers 5: hooks collect outputs of layers in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor, hidden: bool = False) -> ClassifierOutput:
        if not getattr(self, "_has_hooks", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, output: _FOUND.append(output))
            self._has_hooks = True
        _FOUND.clear()
        for layer in self.layers:
            x = layer(x).relu()
        return ClassifierOutput(logits=x, hidden_states=tuple(_FOUND) if hidden else None)


_FOUND: list[Any] = []


@pytest.mark.parametrize("have_run", [False, True])
def test_hooks_of_a_first_call_are_there_once(have_run: bool) -> None:
    torch.manual_seed(0)
    models = [Recording().eval() for _ in range(2)]
    if have_run:
        for model in models:
            model(X)
    ensemble = torch_bridge.to_ensemble(models, (X,), {"hidden": True})
    assert torch_bridge.check(models, ensemble, (X,), {"hidden": True}, thorough=False).passed
    assert {len(found.hidden_states) for found in (ensemble(X), *(model(X, hidden=True) for model in models))} == {2}
    assert torch_bridge.to_ensemble(models, (X,)).network.outputs.fields["hidden_states"] is None


def test_other_objects_are_refused() -> None:
    for returned, match in [(object(), "returns an object of builtins.object"), ({1: X}, "strings for keys")]:
        with pytest.raises(UnsupportedError, match=match):
            torch_bridge.to_flax(made(lambda self, x, returned=returned: (self.first(x), returned))[0], (X,))


def test_the_exporter_knows_no_more_classes_than_before() -> None:
    torch_bridge.to_flax(made(CASES["a dataclass"])[0], (X,))
    assert Result not in pytree.SUPPORTED_NODES


def test_places_are_those_of_both_frameworks() -> None:
    output = Result(torch.ones(1), Gaussian(torch.zeros(1), "text"))  # type: ignore[arg-type]
    assert list(arrays_of(output)) == ["['features']['mean']", "['logits']"]
    assert constants_of(output) == {"['count']": "3", "['features']['variance']": "'text'"}
