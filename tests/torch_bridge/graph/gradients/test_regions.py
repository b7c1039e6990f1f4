"""Parts of a forward under `no_grad`, `enable_grad` and `autocast`: outputs, gradients, training mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_bridge
from jaxensemble.errors import UnsupportedError
from tests.helpers.abilities import can_map


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)


class NoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.a(x))
            g = h * 2
        return self.b(h) + g


class EnableGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = self.a(x)
        return self.b(h)


class Nested(Net):
    """Gradients flow through `k`, made within, but not through `h` and `m`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                k = self.b(h) + x
            m = k * 2
        return k + m


class Whole(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class NoAutocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.norm(self.a(x))
        return self.b(h)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False))


@pytest.mark.thinned
@pytest.mark.parametrize("model", [NoGrad, EnableGrad, Nested, Whole, NoAutocast, Checkpointed])
def test_regions_give_outputs_gradients_and_buffers_of_pytorch(model: type[Net]) -> None:
    models: list[nn.Module] = [model().eval(), model().eval()]
    x = torch.randn(4, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed, str(report)
    assert bool(report.notes) != can_map(models[0], x), report.notes  # PyTorch 2.11 cannot map checkpoints
    assert {"gradients, float64", "float64, training mode"} <= {row.stage for row in report.rows}


class DropoutInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.drop(self.a(x))
        return self.b(h)


class BranchInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.a(x)
            if self.training:
                h = h * 2
        return self.b(h)


class BranchOnGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training and torch.is_grad_enabled():
            h = F.dropout(h) * 2
        return self.b(h)


def test_training_mode_within_a_region_is_seen() -> None:
    x = torch.randn(4, 3)
    assert "self.drop(" in torch_bridge.to_ensemble([DropoutInside().eval()], (x,)).source()
    for model in (BranchInside, BranchOnGrad):
        assert "self.training" in torch_bridge.to_ensemble([model().eval()], (x,)).source()


def test_autocast_is_refused_by_name() -> None:
    class Autocast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.a(x)
            return self.b(h.float())

    with pytest.raises(UnsupportedError, match=r"under torch\.autocast\('cpu', dtype=torch\.bfloat16\)"):
        torch_bridge.to_ensemble([Autocast().eval()], (torch.randn(4, 3),))
