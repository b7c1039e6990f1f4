"""Errors distinguished from rounding: NaN, infinities, masks, zeros, and outputs that are rounding alone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from torch_bridge.parity import gradients
from torch_bridge.parity.metrics import EXACT, normwise_error


def test_nan_positions_have_to_agree() -> None:
    values = np.array([[1.0, np.nan, np.inf]])
    assert normwise_error(values, values) == (0.0, 0)
    assert normwise_error(values, np.array([[1.0, np.nan, -np.inf]]))[0] == np.inf
    assert normwise_error(values, np.array([[np.nan, 1.0, np.inf]]))[0] == np.inf
    assert normwise_error(values + 1e-9, values)[0] == pytest.approx(1e-9)


def test_integers_have_to_be_equal_and_kinds_too() -> None:
    assert normwise_error(np.array([[1, 2]]), np.array([[1, 3]]))[0] == np.inf
    assert normwise_error(np.array([[1.0]]), np.array([[1]]))[0] == np.inf


def test_the_limit_tells_formulas_from_rounding() -> None:
    assert EXACT < 1e-3 * 4.5e-6  # an eps of 1e-6 for 1e-5


class Masked(nn.Module):
    """Fills masked entries with a value that dwarfs all others."""

    def __init__(self, fill: float | None) -> None:
        super().__init__()
        self.fc, self.norm, self.fill = nn.Linear(4, 6), nn.LayerNorm(6), fill
        self.register_buffer("keep", torch.tensor([True, True, False, True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x))
        return y.masked_fill(~self.get_buffer("keep"), torch.finfo(y.dtype).min if self.fill is None else self.fill)


@pytest.mark.thinned
@pytest.mark.parametrize("fill", [-1e9, -1e30, None])
def test_what_a_mask_fills_hides_no_error(fill: float | None) -> None:
    torch.manual_seed(0)
    models = [Masked(fill).eval() for _ in range(2)]
    x = torch.randn(64, 4)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    models[1].get_parameter("norm.bias").data += 1e-5
    report = torch_bridge.check(models, ensemble, (x,), thorough=False)
    failed = {row.stage for row in report.rows if not row.passed}
    assert {"float64, each its own", "float32, same for all"} <= failed


def test_what_overflows_in_both_frameworks_is_no_error() -> None:
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 300)

        def forward(self, x: Tensor) -> Tensor:
            return (60 + 60 * self.fc(x)).exp()

    models, x = [Exploding() for _ in range(2)], torch.randn(8, 4)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    outputs = np.asarray(ensemble(x))
    assert np.isinf(outputs).any() and np.isfinite(outputs).any()


@pytest.mark.thinned
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_zero_but_for_rounding_pass(seed: int) -> None:
    """The gradients of a bias before InstanceNorm cancel."""
    torch.manual_seed(seed)
    models = [
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8)
        )
        for _ in range(2)
    ]
    x = torch.randn(16, 1, 32, 32)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report


def test_a_zero_that_is_rounding_beside_what_is_handed_through_is_no_error() -> None:
    expected = np.array([[3.0, -0.5, 1e-17]])
    assert normwise_error(np.array([[3.0, -0.5, 2e-17]]), expected)[0] < EXACT


def test_gradients_are_zero_only_on_both_sides() -> None:
    zero, wrong = np.array([2e-15, -1e-15]), np.array([2e-12, 0.0])
    assert gradients._relative_error(-zero, zero, 1.0) == 0
    assert gradients._relative_error(wrong, zero, 1.0) > gradients.LIMIT


class Cancelling(nn.Module):
    """The mean of normalised numbers: zero, except for rounding."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.LayerNorm(6, eps=eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).mean(1) * 10


@pytest.mark.further
def test_outputs_that_are_nothing_but_rounding_pass_and_are_told() -> None:
    models, x = [Cancelling() for _ in range(2)], torch.randn(3, 8)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert any("PyTorch's own error in float32 is" in row.note for row in report.rows)
    assert any("mostly rounding" in note for note in report.notes)


@pytest.mark.further
def test_a_small_output_that_is_no_rounding_is_compared() -> None:
    """A product of many densities is far smaller than any rounding of its factors."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 30)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x).square() * 1e-3).exp().sub(0.9).prod(1)

    models, x = [Product() for _ in range(2)], torch.randn(3, 8)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    assert torch_bridge.check(models, ensemble, (x,)).passed
    assert np.abs(np.asarray(ensemble(x))).max() < 1e-20
    with torch.no_grad():
        models[1].linear.bias += 1e-5  # type: ignore[operator]
    report = torch_bridge.check(models, ensemble, (x,))
    outputs = [row for row in report.rows if row.stage.startswith("float64")]
    assert outputs and not any(row.passed for row in outputs)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_all_rounding_are_zero(seed: int) -> None:
    """A single number that is normalised is 1 or -1, whatever the weights are."""

    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.RMSNorm(3, eps=1e-5)

        def forward(self, x: Tensor) -> Tensor:
            mean = self.norm(self.linear(x)).mean(1, keepdim=True)
            return nn.functional.normalize(nn.functional.tanhshrink(mean), dim=1)

    torch.manual_seed(seed)
    models, x = [Sign() for _ in range(2)], torch.randn(3, 3)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report


@pytest.mark.further
def test_gradients_are_compared_where_a_mask_fills_outputs() -> None:
    """Values that a mask fills in are no measure of the gradients."""

    class Masked(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            self.linear, self.fill = nn.Linear(4, 6), fill

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh()
            return y.masked_fill(torch.arange(6) > 3, self.fill)

    x = torch.randn(5, 4)
    for fill in (-1e9, torch.finfo(torch.float32).min):
        models = [Masked(fill) for _ in range(2)]
        ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
        assert torch_bridge.check(models, ensemble, (x,)).passed
        with torch.no_grad():
            models[1].linear.weight[0] *= 1 + 1e-7  # type: ignore[operator]
        rows = torch_bridge.check(models, ensemble, (x,)).rows
        assert not any(row.passed for row in rows if row.stage.startswith("gradients"))


def test_what_is_rounding_for_one_row_is_compared_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y - y.mean(0, keepdim=True)

    models, x = [Centred() for _ in range(2)], torch.randn(5, 4)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert any(row.stage.startswith("float32") for row in report.rows)
