"""Modules that keep tensors from one call to the next: tensors that follow from weights are ported, others refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import JaxEnsembleError, MemberError, UnsupportedError
from tests.helpers.caching import (
    CACHING,
    BufferOfNone,
    ByDevice,
    ByMode,
    CachedMethod,
    GrowingBuffer,
    N,
    Rotary,
    Tuples,
)
from torch_bridge.graph.caches.objects import Snapshot, cache_attributes, cache_owners, indexed_leaves
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.members.same_network import find_differences
from torch_bridge.parity.precision import double_copies

L = 5


def ran(*models: nn.Module, training: bool = False, no_grad: bool = False) -> None:
    """Calls every model, on sequences of another length for each."""
    for k, model in enumerate(models):
        before = model.training
        with torch.set_grad_enabled(not no_grad):
            model.train(training)(torch.randn(2, L + 2 * k, N))
        model.train(before)


HISTORIES: dict[str, Callable[..., object]] = {
    "fresh": lambda *models: None,
    "after a forward": lambda *models: ran(*models, no_grad=True),
    "after a forward with gradients": lambda *models: ran(*models),
    "after a forward in training mode": lambda *models: ran(*models, training=True),
    "after both, of one member": lambda first, *others: (ran(first), ran(first, training=True)),
}


class Everything(nn.Sequential):
    """Modules of all kinds, one after another."""

    def __init__(self) -> None:
        super().__init__(*(kind() for kind in CACHING))


def tensors_in(model: nn.Module) -> Iterator[Tensor]:
    for _, owner in cache_owners(model):
        for value in cache_attributes(owner).values():
            yield from (leaf for _, leaf in indexed_leaves(value) if isinstance(leaf, Tensor))


@pytest.mark.thinned
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", CACHING)
def test_members_are_alike_and_compute_the_same_while_their_caches_are_cleared(kind: Any, history: str) -> None:
    models = [kind().eval() for _ in range(2)]
    x = torch.randn(2, L, N)
    expected = [copy.deepcopy(model)(x) for model in models]
    HISTORIES[history](*models)
    kept = [Snapshot(model) for model in models]
    with keep_caches_empty(models, (x,)):
        assert not list(find_differences(*models))
        doubles = double_copies(models)
        for model, double, output in zip(models, doubles, expected, strict=True):
            assert torch.equal(model(x), output)
            assert (double(x.double()) - output).abs().max() < 1e-5
            assert not list(find_differences(double, doubles[0])) and torch.equal(
                double(x.double()), double(x.double())
            )
    assert not any(before.changed() for before in kept)


@pytest.mark.thinned
@pytest.mark.parametrize("history", ["after a forward", "fresh", "after a forward in training mode"])
def test_all_kinds_port_and_models_stay_as_they_were(history: str) -> None:
    models = [Everything().eval() for _ in range(2)]
    x = torch.randn(2, L, N)
    expected = torch.stack([copy.deepcopy(model)(x) for model in models]).detach().numpy()
    HISTORIES[history](*models)
    kept = [Snapshot(model) for model in models]
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert ensemble.network is not None and ensemble.network.evaluation_only is None
    assert not any(before.changed() for before in kept)
    assert {type(tensor) for model in models for tensor in tensors_in(model)} <= {Tensor}
    assert np.abs(ensemble(x) - expected).max() < 1e-5 * np.abs(expected).max()
    ran(*models)
    assert torch_bridge.check(models, ensemble, (x,), thorough=False).passed


@pytest.mark.parametrize("kind", [BufferOfNone, GrowingBuffer])
def test_the_model_itself_may_assign_buffers(kind: Any) -> None:
    models, x = [kind().eval() for _ in range(2)], torch.randn(2, L, N)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    ran(*models)
    assert torch_bridge.check(models, ensemble, (x,), thorough=False).passed


class Stateful(nn.Linear):
    """Adds up its earlier outputs."""

    total: Any = None

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        self.total = y if self.total is None else self.total + y
        return self.total


class CentredInTraining(nn.Linear):
    """Keeps a moving average of its outputs, in training mode."""

    centre: Any = 0.0

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * y.mean()
            y = y - self.centre
        return y


def stale(kind: Any) -> nn.Module:
    """A model whose weights have changed since its caches were filled."""
    model = kind().eval()
    ran(model, no_grad=True)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.5
    return model


def by_hand(model: nn.Module, name: str, value: Any) -> nn.Module:
    ran(model.eval(), no_grad=True)
    setattr(model, name, value)
    return model


REFUSED = {
    "a dict": (lambda: stale(ByDevice), "`cache['cpu']`"),
    "attributes": (lambda: stale(Rotary), "`_cos_cached`, `_sin_cached`"),
    "a tuple": (lambda: stale(Tuples), "`kept[1][0]`"),
    "by hand": (lambda: by_hand(ByDevice(), "cache", {"cpu": torch.ones(2, N)}), "`cache['cpu']`"),
    "a method": (lambda: stale(CachedMethod), "its outputs in evaluation mode"),
    "training alone": (lambda: in_training(ByMode()), "`tables[True]`"),
}


def in_training(model: nn.Module) -> nn.Module:
    """Stale for training mode, and never run in evaluation mode."""
    ran(model, training=True)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model.eval()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_from_the_weights_is_refused(case: str) -> None:
    make, places = REFUSED[case]
    model, x = make(), torch.randn(2, L, N)
    kept = Snapshot(model)
    with pytest.raises(UnsupportedError) as alone:
        torch_bridge.to_flax(model, (x,))
    with pytest.raises(UnsupportedError) as second:
        torch_bridge.to_ensemble([type(model)().eval(), make()], (x,))
    for place in places.split(", "):
        assert place in str(alone.value) and f"member 1, {place}" in str(second.value)
    assert not kept.changed()


def test_check_refuses_it_too() -> None:
    models, x = [ByDevice().eval() for _ in range(2)], torch.randn(2, L, N)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    ran(*models, no_grad=True)
    models[1].cache["cpu"].mul_(2)
    with pytest.raises(UnsupportedError, match=r"member 1, `cache\['cpu'\]`"):
        torch_bridge.check(models, ensemble, (x,))


def test_state_of_a_forward_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Stateful.forward changes what its next call computes with: `total`"):
        torch_bridge.to_flax(Stateful(N, N), (torch.randn(2, N),))
    network = torch_bridge.to_ensemble([CentredInTraining(N, N).eval()], (torch.randn(2, N),)).network
    assert network is not None and "`centre`" in (network.evaluation_only or "")


class Table(nn.Module):
    """Tensors that only the module's maker sets."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.tables = {"a": factor * torch.arange(float(N))}
        self.row = factor * torch.ones(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.tables["a"] + self.row


def test_tables_that_no_forward_makes_are_constants_and_alike() -> None:
    models, x = [Table().eval() for _ in range(2)], torch.randn(2, N)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert np.abs(ensemble(x)[1] - models[1](x).detach().numpy()).max() < 1e-5
    with pytest.raises(MemberError, match="tables") as caught:
        torch_bridge.to_ensemble([Table(), Table(2.0)], (x,))
    assert "row" in str(caught.value)


def test_inputs_that_pytorch_cannot_run_are_told_of() -> None:
    models = [ByDevice().eval() for _ in range(2)]
    ran(*models, no_grad=True)
    with pytest.raises(JaxEnsembleError, match="PyTorch itself cannot run ByDevice on the example inputs"):
        torch_bridge.to_ensemble(models, (torch.randn(2, N + 3),))
