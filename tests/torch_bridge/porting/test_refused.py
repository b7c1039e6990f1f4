"""Modules that are refused, with the place and the reason."""

import copy
import re

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    InputError,
    MemberError,
    NarrowIntegerWarning,
    ParityError,
    UnsupportedError,
)
from tests.helpers.porting import assert_close


def test_everything_without_a_rule_is_listed_at_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_y0(x) + torch.special.airy_ai(self.inner(x))

    with pytest.raises(UnsupportedError) as caught:
        torch_bridge.to_ensemble([Odd()], (torch.randn(4, 4),), batch_axis=None)
    text = str(caught.value)
    assert "special_bessel_y0" in text and "special_airy_ai" in text
    assert "test_refused.py" in text and "torch_bridge.register" in text


def test_control_flow_on_values_is_refused_with_torchs_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        UnsupportedError, match=r"(?s)cannot follow Branch\.forward, which decides by values .*x.sum\(\) > 0"
    ):
        torch_bridge.to_flax(Branch(), (torch.randn(2, 2),))


def test_a_forward_that_leaves_pytorch_is_refused_with_its_line() -> None:
    class Leaves(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            scale = input.numpy().mean()
            return super().forward(input) * float(scale)

    with pytest.raises(UnsupportedError, match=r"test_refused\.py:\d+: scale = input\.numpy\(\)\.mean\(\)"):
        torch_bridge.to_flax(Leaves(3, 2), (torch.randn(2, 3),))


def test_objects_that_a_forward_returns_beside_arrays_are_refused_by_name() -> None:
    class Cache:
        pass

    class Caching(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Cache]:  # type: ignore[override]
            return super().forward(input), Cache()

    with pytest.raises(UnsupportedError, match=r"(?s)Caching\.forward returns an object of \S*Cache;.*use_cache=False"):
        torch_bridge.to_flax(Caching(3, 2), (torch.randn(2, 3),))


class _Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("trouble of its own")


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        (
            nn.Linear(3, 4),
            (torch.ones(2, 5),),
            r"Linear on the example inputs \(float32 \[2, 5\]\): .*cannot be multiplied",
        ),
        (nn.Bilinear(3, 3, 2), (torch.ones(2, 3),), "missing 1 required positional argument: 'input2'"),
        (nn.Linear(3, 4), (torch.ones(2, 3), torch.ones(2, 3)), "takes 2 positional arguments but 3 were given"),
        (_Raises(), (torch.ones(2, 3),), "ValueError: trouble of its own"),
    ],
    ids=["size", "too few", "too many", "raises"],
)
def test_what_pytorch_itself_refuses_is_told_in_its_words(
    model: nn.Module, inputs: tuple[Tensor, ...], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=text):
        torch_bridge.to_flax(model, inputs)
    assert capfd.readouterr() == ("", "")


def test_a_value_taken_as_a_number_is_told_as_such() -> None:
    class Item(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * input.mean().item()

    with pytest.raises(UnsupportedError, match=r"value as a number \(\.item\(\)\)"):
        torch_bridge.to_flax(Item(3, 2), (torch.ones(2, 3),))


def test_one_module_is_no_ensemble() -> None:
    with pytest.raises(InputError, match=r"got one Sequential\. Pass \[model\]"):
        torch_bridge.to_ensemble(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.ones(2, 3),))  # pyright: ignore


def test_mutated_buffers_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(UnsupportedError, match="writes into calls"):
        torch_bridge.to_flax(Counting(), (torch.randn(2, 2),))


def test_lazy_and_meta_modules_are_refused() -> None:
    with pytest.raises(InputError, match="uninitialised"):
        torch_bridge.to_ensemble([nn.LazyLinear(3)], (torch.ones(2, 3),))
    with pytest.raises(InputError, match="meta"):
        torch_bridge.to_ensemble([nn.Linear(3, 3, device="meta")], (torch.ones(2, 3),))


def test_a_failed_proof_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxensemble.network.weight_map import Rearrangement

    wrong = lambda self, array: np.ascontiguousarray(array.reshape(self.shape))  # noqa: E731
    monkeypatch.setattr(Rearrangement, "apply", wrong)
    with pytest.raises(ParityError, match=r"(?s)float64, each its own, loop: .*First difference: 0 ") as caught:
        torch_bridge.to_ensemble([nn.Sequential(nn.Linear(4, 4))], (torch.randn(3, 4),))
    assert "FAIL" in caught.value.details


def test_members_that_differ_are_refused_before_anything_is_built() -> None:
    with pytest.raises(MemberError, match=r"p: 0\.2 in member 1, 0\.1 in member 0"):
        torch_bridge.to_ensemble([nn.Dropout(0.1), nn.Dropout(0.2)], (torch.ones(2, 3),))


def test_members_whose_submodules_are_in_another_order_differ() -> None:
    def keyed(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    with pytest.raises(MemberError, match="order of modules"):
        torch_bridge.to_ensemble([keyed("a", "b"), keyed("b", "a")], (torch.randn(2, 2),))


class _Hash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table((ids * 1000003) % 1000)


class _Offsets(nn.Module):
    """Integers that stay small whatever comes in: none of this is worth a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids.ne(1).long()
        positions = torch.cumsum(mask, dim=1) * mask + 2
        rolled = torch.cat([mask[:, 1:], mask[:, :1]], 1)
        return (
            self.table(positions % 1000) + self.table(ids % 10 * 7 + 1) + self.table(ids + 1 - 1) + self.table(rolled)
        )


def test_integers_that_may_not_fit_into_32_bits_are_warned_of() -> None:
    with pytest.warns(NarrowIntegerWarning, match=r"aten\.mul\.Tensor \(test_refused\.py:\d+: .*1000003"):
        torch_bridge.to_flax(_Hash(), (torch.zeros(2, 3, dtype=torch.int64),))
    torch_bridge.to_flax(_Offsets(), (torch.zeros(2, 3, dtype=torch.int64),))
    ids = torch.randint(2000, 50000, (8, 3))
    with jax.enable_x64(True):
        model = _Hash().double()
        module = torch_bridge.to_flax(model, (ids,))
        assert_close(module(ids.numpy()), model(ids))


class _Counts(nn.Module):
    """Counts its calls; `factor` says whether it computes with the count."""

    def __init__(self, factor: bool):
        super().__init__()
        self.fc, self.calls, self.factor = nn.Linear(3, 3), 0, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.width = 3  # remembered, but the same at every call
        return self.fc(x) * (self.calls if self.factor else self.width)


def test_a_forward_that_computes_with_what_it_counts_is_refused() -> None:
    model = _Counts(factor=True).eval()
    with pytest.raises(UnsupportedError, match=r"changes what its next call computes with: `calls` from 0 to 1\."):
        torch_bridge.to_flax(model, (torch.ones(2, 3),))
    assert model.calls == 0, "porting leaves models as they are"


def test_a_count_that_nothing_depends_on_is_no_reason_to_refuse() -> None:
    model, x = _Counts(factor=False).eval(), torch.ones(2, 3)
    flax = torch_bridge.to_flax(model, (x,))
    np.testing.assert_allclose(flax(x.numpy()), model(x).detach().numpy(), atol=1e-6)
    assert model.calls == 1


def test_what_is_no_module_in_python_or_no_ensemble_is_named() -> None:
    models, x = [nn.Linear(3, 2) for _ in range(2)], torch.randn(4, 3)
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = [models[0], torch.jit.script(nn.Linear(3, 2))]
    with pytest.raises(InputError, match=r"not TorchScript's; got such for member 1\. Pass the modules that were"):
        torch_bridge.to_ensemble(scripted, (x,))
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got a list"):
        torch_bridge.to_torch(models)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got a list"):
        torch_bridge.check(models, models, (x,))  # type: ignore[arg-type]


def test_every_place_that_cannot_be_ported_is_named() -> None:
    class Many(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            chosen = y[y > 0].sum()
            gammas = torch.distributions.Gamma(torch.ones(3), torch.ones(3)).sample()
            counts = torch.bincount(torch.zeros(3, dtype=torch.int64)).sum()
            return torch.linalg.eig(y[:, None] * y[:, :, None])[1].real + chosen + gammas + counts

    with pytest.raises(
        UnsupportedError, match="Many uses operations that have no rule, or cannot be carried exactly"
    ) as error:
        torch_bridge.to_ensemble([Many(3, 3).eval() for _ in range(2)], (torch.randn(4, 3),))
    for name, line in {
        "index.Tensor": "y[y > 0]",
        "_standard_gamma.default": "Gamma",
        "bincount.default": "bincount",
        "linalg_eig.default": "linalg.eig",
    }.items():
        (listed,) = (listed for listed in error.value.details.splitlines() if listed.startswith(f"  aten.{name} in "))
        assert re.fullmatch(rf".* in the root module \(\w+\.py:\d+: .*{re.escape(line)}.*\)(: .*)?", listed), listed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_modules_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedError, match=r"Sequential is quantised \(0, .* Port the network as it was before"):
        torch_bridge.to_ensemble([model.eval(), copy.deepcopy(model).eval()], (torch.randn(4, 3),))


class Holder(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x)


def test_a_graph_of_torch_fx_is_ported_in_a_module_that_holds_it() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh())).eval()
    with pytest.raises(UnsupportedError, match="hold it in a module whose forward calls it"):
        torch_bridge.to_ensemble([graph], (torch.ones(2, 3),))
    assert len(torch_bridge.to_ensemble([Holder(graph)], (torch.ones(2, 3),))) == 1
