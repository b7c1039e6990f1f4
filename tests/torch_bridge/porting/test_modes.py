"""Training and evaluation mode: when they are exported, what depends on them, and members that differ in them."""

import copy
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    InputError,
    MemberError,
    StateError,
    TrainingModeWarning,
    UnsupportedError,
)
from jaxensemble.training import TrainState
from tests.helpers.porting import assert_close, assert_trains
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS


class Halved(nn.Linear):
    """A layer and a factor, which depends on the mode in a class below."""

    factor = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class BySwitch(Halved):
    def train(self, mode: bool = True) -> nn.Module:
        self.factor: float = 0.5 if mode else 1.0
        return super().train(mode)


class BySetting(Halved):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            super().__setattr__("factor", 0.5 if value else 1.0)  # type: ignore[arg-type]


class ByDict(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (0.5 if self.__dict__["training"] else 1.0)


class ByCopy(nn.Linear):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.drop = nn.Dropout()

    def forward(self, input: Tensor) -> Tensor:
        return copy.copy(self.drop)(super().forward(input))


def by_instance(before: int, after: int) -> nn.Module:
    model: Any = Halved(before, after)

    def train(mode: bool = True) -> nn.Module:
        model.factor = 0.5 if mode else 1.0
        return nn.Module.train(model, mode)

    model.train = train
    return model


@pytest.mark.parametrize(
    ("make", "exports", "training"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4)), 1, True),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.LayerNorm(4)), 2, True),
        (lambda: ByCopy(3, 4), 2, True),
        *((functools.partial(kind, 3, 4), 2, True) for kind in (BySwitch, BySetting, ByDict, by_instance)),
    ],
    ids=["no mode", "dropout", "copied", "by its class", "by setting", "by its dict", "by its instance"],
)
def test_a_forward_is_exported_once_where_no_mode_is_read(
    make: Any, exports: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, calls = torch.export.export, []
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: calls.append(1) or export(*args, **options))
    graph = capture(make().eval(), (torch.randn(2, 3),), OPERATIONS)
    assert len(calls) == exports
    assert (graph.evaluation_only is None) == training
    assert "training" not in vars(nn.Module)


def test_a_forward_that_returns_more_in_training_is_ported_for_evaluation_only() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return (y, x) if self.training else y

    model = Deep().eval()
    module = torch_bridge.to_flax(model, (torch.randn(2, 3),))
    assert_close(module(np.ones((2, 3), "float32")), model(torch.ones(2, 3)), 1e-6)
    with pytest.raises(Exception, match="training mode"):
        module.train()
    with pytest.raises(UnsupportedError, match=r"(?s)is in training mode.*\.eval\(\)"):
        torch_bridge.to_flax(model.train(), (torch.randn(2, 3),))


class Switched(nn.Module):
    """The modes differ in a tensor, or in the names of the outputs, but in no operation."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.what = what
        self.k, self.q = torch.ones(3), torch.full((3,), 2.0)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        match self.what:
            case "literal":
                return y * torch.tensor(0.5 if self.training else 1.0)
            case "attribute":
                return y * (self.k if self.training else self.q)
        return {"train": y} if self.training else {"eval": y}


@pytest.mark.parametrize("what", ["literal", "attribute"])
def test_tensors_that_depend_on_the_mode_are_seen(what: str) -> None:
    assert_trains(lambda: Switched(what), torch.randn(2, 3))


def test_outputs_of_other_names_in_training_are_for_evaluation_only() -> None:
    ensemble = torch_bridge.to_ensemble([Switched("names").eval()], (torch.randn(2, 3),))
    assert "returns something else in training mode" in ensemble.network.evaluation_only
    with pytest.raises(Exception, match="training mode"):
        ensemble.train()


def test_a_train_method_of_the_models_own_is_followed() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    model = Frozen().train()
    ensemble = torch_bridge.to_ensemble([model], (torch.randn(4, 3),))
    x = torch.randn(6, 3)
    assert_close(ensemble.train()(x)[0], model(x), 1e-6)


class Noisy(nn.Module):
    """A network that asks for its mode, with layers that have a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.still = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.still(self.bn(self.fc(x)))
        return x + torch.randn_like(x) if self.training else x


def test_training_mode_is_told_unless_it_is_meant() -> None:
    models, x = [Noisy() for _ in range(2)], torch.randn(4, 3)
    with pytest.warns(TrainingModeWarning, match=r"Noisy was ported in training mode \(bn, itself\): mode='eval'"):
        ported = torch_bridge.to_ensemble(models, (x,), check=False)
    assert repr(ported).endswith("; in training mode: bn, itself)")
    with pytest.warns(TrainingModeWarning, match=r"Noisy predicts in training mode \(bn\)"):
        ported.predict(x, key=jax.random.key(0))
    with pytest.warns(TrainingModeWarning, match=r"\(bn, itself\)"):
        torch_bridge.to_flax(models[0], (x,))
    for mode in ("eval", "train", "as_is"):
        layers = () if mode == "eval" else ("bn", "itself")
        assert torch_bridge.to_ensemble(models, (x,), mode=mode, check=False).graphdef.training_layers() == layers
    assert all(module.training for model in models for module in model.modules())
    report = torch_bridge.check(models, ported, (x,), thorough=False)
    assert report.passed
    assert report.notes[0] == "in training mode, and compared in evaluation mode: bn, itself"


def test_members_may_differ_in_a_mode_that_is_said() -> None:
    models, x = [Noisy(), Noisy().eval()], torch.randn(4, 3)
    models[0].bn.eval()
    with pytest.raises(MemberError, match=r"(?s)mode: evaluation in member 1.*pass mode='eval'"):
        torch_bridge.to_ensemble(models, (x,))
    ensemble = torch_bridge.to_ensemble(models, (x,), mode="eval")
    assert not ensemble.graphdef.training_layers()
    assert [model.training for model in models] == [True, False]
    assert not models[0].bn.training
    with pytest.raises(InputError, match="`mode` must be 'eval', 'train' or 'as_is'; got 'evaluation'"):
        torch_bridge.to_ensemble(models, (x,), mode="evaluation")  # type: ignore[arg-type]


def test_members_may_differ_in_rates_of_dropout_in_evaluation_mode() -> None:
    def members() -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(3, 3), nn.Dropout(rate), nn.Linear(3, 2)) for rate in (0.1, 0.5)]

    x = torch.randn(4, 3)
    models = [model.eval() for model in members()]
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert_close(ensemble(x), torch.stack([model(x) for model in models]), 1e-6)
    assert torch_bridge.check(models, ensemble, (x,)).passed
    assert ensemble.network.evaluation_only.startswith("members have different rates of dropout (1, p): to train them")
    with pytest.raises(StateError, match="ported for evaluation only, because members have different rates"):
        ensemble.train()
    with pytest.raises(StateError, match=r"ported for evaluation only, because members have different rates"):
        TrainState.create(ensemble, optax.sgd(0.1), key=jax.random.key(0))
    for changed in (members(), [model.train() for model in members()]):
        with pytest.raises(MemberError, match=r"p: 0\.5 in member 1, 0\.1 in member 0"):
            torch_bridge.to_ensemble(changed, (x,), mode="as_is")
    with pytest.raises(MemberError, match=r"p: 0\.5 in member 1"):
        torch_bridge.to_ensemble(models, (x,), check=False)


def test_a_rate_of_dropout_that_a_forward_reads_is_no_member_s_own() -> None:
    class Reading(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(3, 3), nn.Dropout(rate)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.where(x > 100, y * self.drop.p, y)

    with pytest.raises(MemberError, match=r"the forward of 1 computes with it in evaluation mode"):
        torch_bridge.to_ensemble([Reading(rate).eval() for rate in (0.1, 0.9)], (torch.randn(4, 3),))


def test_a_train_method_of_ones_own_is_asked() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[1].eval()
            return self

    ensemble = torch_bridge.to_ensemble(
        [Frozen(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(2)], (torch.randn(4, 3),), mode="train"
    )
    assert ensemble.graphdef.training_layers() == ("2",)
