"""The checker: it passes what is right, fails what is wrong, and says where."""

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, InputError
from jaxensemble.errors import ParityError
from jaxensemble.modules.state import flatten, unflatten
from torch_bridge.parity import gradients, precision
from torch_bridge.parity.inputs import resize_inputs
from torch_bridge.parity.metrics import EXACT, normwise, rms_error


class Net(nn.Module):
    """Enough for most errors to show: square weights, a BatchNorm, padding, a flatten that is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, eps=1e-3)
        self.act = nn.GELU()
        self.pool = nn.AvgPool2d(2, padding=1)
        self.fc1 = nn.Linear(4 * 3 * 4, 6)
        self.fc2 = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def ported() -> tuple[list[nn.Module], Ensemble, Tensor]:
    torch.manual_seed(0)
    models: list[nn.Module] = []
    for _ in range(3):
        model = Net()
        model(torch.randn(8, 1, 4, 6))
        models.append(model.eval())
    x = torch.randn(5, 1, 4, 6)
    return models, torch_bridge.to_ensemble(models, (x,), check=False), x


def test_float64_hands_on_what_functions_are_given_and_no_copies() -> None:
    """Copying a model hands every tensor the memo of all copies so far: copied each time, that takes minutes."""
    tensor, memo = torch.ones(2), {}
    with precision.widened():
        copied = tensor.__deepcopy__(memo)
    assert memo[id(tensor)] is copied


@functools.lru_cache
def _waves(size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(size, dtype=dtype) * torch.pi


class Remembering(nn.Linear):
    """Its table is made once, by whoever calls it first: in float32, in float64 or without values."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.sin(_waves(input.shape[-1], torch.float32))


@pytest.mark.parametrize("called", [True, False], ids=["called before", "new"])
def test_tables_that_a_forward_remembers_are_those_of_the_precision_it_runs_in(called: bool) -> None:
    _waves.cache_clear()
    models: list[nn.Module] = [Remembering(4, 4).eval(), Remembering(4, 4).eval()]
    x = torch.randn(3, 4)
    if called:
        models[0](x)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert torch_bridge.check(models, ensemble, (x,)).passed
    assert ensemble.network is not None and not ensemble.network.evaluation_only
    assert _waves(4, torch.float32).dtype == torch.float32
    assert torch.equal(models[0](x), models[0](x))


def test_what_is_right_passes_every_stage(ported: Any) -> None:
    models, ensemble, x = ported
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed and report.diverged is None and not report.notes
    stages = {row.stage for row in report.rows}
    assert stages == {
        "weights",
        "float64, each its own",
        "float64, same for all",
        "float64, batch of 1",
        "float64, batch of 7",
        "float64, batch of 16",
        "float64, constants perturbed",
        "gradients, float64",
        "float64, training mode",
        "float32, same for all",
    }
    cases = {row.case for row in report.rows}
    assert {"loop", "torch.func.vmap", "every parameter", "outputs", "buffers after a call", "float64 truth"} <= cases


def test_the_report_prints_and_saves(ported: Any, tmp_path: Path) -> None:
    models, ensemble, x = ported
    report = torch_bridge.check(models, ensemble, (x,), thorough=False)
    assert "passed" in str(report) and "bit for bit" in str(report)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["passed"] is True
    assert len(saved["rows"]) == len(report.rows)
    assert saved["environment"]["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def with_param(ensemble: Ensemble, name: str, change: Callable[[Any], Any]) -> Ensemble:
    params = flatten(ensemble.params)
    return dataclasses.replace(ensemble, params=unflatten({**params, name: change(params[name])}))


WEIGHT_ERRORS = {
    "members swapped": ("fc2.kernel", lambda a: a[jnp.array([1, 0, 2])], "fc2"),
    "square weight transposed": ("fc2.kernel", lambda a: a.swapaxes(1, 2), "fc2"),
    "one bit": ("conv.bias", lambda a: a.at[2, 1].set(jnp.nextafter(a[2, 1], jnp.inf)), "conv"),
    "kernel flipped": ("conv.kernel", lambda a: a[:, ::-1], "conv"),
    "scale lost": ("norm.scale", lambda a: a * 1.01, "norm"),
    "no permutation after flatten": (
        "fc1.kernel",
        lambda a: a.reshape(3, 3, 4, 4, 6).transpose(0, 3, 1, 2, 4).reshape(3, 48, 6),
        "fc1",
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", WEIGHT_ERRORS)
def test_wrong_weights_are_caught_and_the_first_module_named(ported: Any, name: str) -> None:
    models, ensemble, x = ported
    leaf, change, module = WEIGHT_ERRORS[name]
    report = torch_bridge.check(models, with_param(ensemble, leaf, change), (x,), thorough=False)
    failed = {row.stage for row in report.rows if not row.passed}
    assert "weights" in failed and "float64, each its own" in failed
    assert report.diverged is not None and report.diverged.startswith(f"{module} ")


NETWORK_ERRORS: dict[str, Callable[[Any], None]] = {
    "gelu by tanh": lambda m: setattr(m, "act", nn.GELU("tanh")),
    "eps": lambda m: setattr(m.norm, "eps", 1e-5),
    "count_include_pad": lambda m: setattr(m.pool, "count_include_pad", False),
    "padding mode": lambda m: setattr(m.conv, "padding_mode", "circular"),
    "relu for gelu": lambda m: setattr(m, "act", nn.ReLU()),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", NETWORK_ERRORS)
def test_another_network_with_the_same_weights_is_caught(ported: Any, name: str) -> None:
    models, _, x = ported
    wrong = [copy.deepcopy(model) for model in models]
    for model in wrong:
        NETWORK_ERRORS[name](model)
    ensemble = torch_bridge.to_ensemble(wrong, (x,), check=False)
    report = torch_bridge.check(models, ensemble, (x,), thorough=False)
    assert all(row.passed for row in report.rows if row.stage == "weights")
    assert not report.passed


def test_permuted_members_are_caught(ported: Any) -> None:
    models, ensemble, x = ported
    assert not torch_bridge.check(models, ensemble[[1, 0, 2]], (x,), thorough=False).passed


def test_an_ensemble_of_hand_written_flax_modules_can_be_checked_too() -> None:
    class Twin(nnx.Module):
        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            self.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.fc.kernel[...] = jnp.asarray(weight.detach().numpy().T)
            assert self.fc.bias is not None
            self.fc.bias[...] = jnp.asarray(bias.detach().numpy())

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc(x)

    models = [nn.Linear(3, 2) for _ in range(2)]
    ensemble = Ensemble.from_modules([Twin(model.weight, model.bias) for model in models])
    report = torch_bridge.check(models, ensemble, (torch.randn(5, 3),))
    assert report.passed
    assert any("weights not compared" in note for note in report.notes)


def test_float_constants_are_those_of_float64() -> None:
    """A table that PyTorch computes in the model's own precision differs from float32's in a float64 model."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.sin(torch.arange(x.shape[1], dtype=x.dtype) / 3)
            return self.fc(x + table)

    models = [Positions(), Positions()]
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(4, 6),))
    assert torch_bridge.check(models, ensemble, (torch.randn(4, 6),)).passed


def test_nan_positions_have_to_agree() -> None:
    values = np.array([[1.0, np.nan, np.inf]])
    assert normwise(values, values) == (0.0, 0)
    assert normwise(values, np.array([[1.0, np.nan, -np.inf]]))[0] == np.inf
    assert normwise(values, np.array([[np.nan, 1.0, np.inf]]))[0] == np.inf
    assert normwise(values + 1e-9, values)[0] == pytest.approx(1e-9)


def test_integers_have_to_be_equal_and_kinds_too() -> None:
    assert normwise(np.array([[1, 2]]), np.array([[1, 3]]))[0] == np.inf
    assert normwise(np.array([[1.0]]), np.array([[1]]))[0] == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, e, x: (m[:2], e, (x,)), "equal members; got 2 and 3"),
        (lambda m, e, x: (m, e, x), "`inputs` must be a tuple"),
        (lambda m, e, x: ([], e, (x,)), "got none"),
    ],
    ids=["count", "inputs", "no models"],
)
def test_what_cannot_be_compared_is_refused(ported: Any, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        torch_bridge.check(*change(*ported))


def test_precision_is_set_within_a_scope_only() -> None:
    with jax.default_matmul_precision("default"):
        before = precision_settings()
        with precision.equal_precision():
            assert precision_settings() == (False, False, "highest")
        assert precision_settings() == before


def precision_settings() -> tuple[Any, ...]:
    config: Any = jax.config
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, config.jax_default_matmul_precision


def test_resized_batches_have_rows_of_their_own() -> None:
    x = torch.randn(3, 4)
    (resized,) = resize_inputs((x,), 7, 0).positional
    assert resized.shape == (7, 4)
    assert len({tuple(row.tolist()) for row in resized}) == 7
    (ids,) = resize_inputs((torch.tensor([1, 2, 3]),), 5, 0).positional
    assert ids.tolist() == [1, 2, 3, 1, 2]


def test_models_keep_their_mode_and_weights(ported: Any) -> None:
    models, ensemble, x = ported
    models = [copy.deepcopy(model).train() for model in models]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    torch_bridge.check(models, ensemble, (x,), thorough=False)
    for model, state in zip(models, states, strict=True):
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_limit_tells_formulas_from_rounding() -> None:
    assert EXACT < 1e-3 * 4.5e-6  # an eps of 1e-6 for 1e-5


class ZeroHead(nn.Module):
    """Gives zeros until it is trained, whatever leads to them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_what_a_head_of_zeros_hides_is_compared_with_other_weights() -> None:
    models: list[nn.Module] = [ZeroHead(), ZeroHead()]
    x = torch.randn(4, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert not torch_bridge.check(models, ensemble, (x,), thorough=False).notes
    relu = [ReluInstead(), ReluInstead()]
    for one, other in zip(relu, models, strict=True):
        one.load_state_dict(other.state_dict())
    report = torch_bridge.check(relu, ensemble, (x,), thorough=False)
    assert {row.stage for row in report.rows if not row.passed} == {"float64, constants perturbed"}


class ReluInstead(ZeroHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def test_outputs_that_stay_zero_are_told() -> None:
    class Nothing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 0

    models = [Nothing(3, 2), Nothing(3, 2)]
    x = torch.randn(4, 3)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,), thorough=False)
    assert any("output is zero" in note for note in report.notes)


def test_wrong_momentum_fails_in_training_mode_alone(ported: Any) -> None:
    models, ensemble, x = ported
    other = copy.deepcopy(models)
    for model in other:
        model.norm.momentum = 0.2
    report = torch_bridge.check(other, ensemble, (x,))
    failed = [row for row in report.rows if not row.passed]
    assert [(row.stage, row.case) for row in failed] == [("float64, training mode", "buffers after a call")]
    assert "norm.running_" in failed[0].note


def test_draws_within_a_recurrent_layer_are_a_note() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    models, x = [Tagger().eval() for _ in range(2)], torch.randn(4, 5, 3)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed and "training mode not compared: " in " ".join(report.notes)
    assert "stay within a layer" in " ".join(report.notes)


def test_dropout_is_compared_in_training_mode() -> None:
    models: list[nn.Module] = [nn.Sequential(nn.Linear(3, 2), nn.Dropout()).eval() for _ in range(2)]
    x = torch.randn(4, 3)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed and "float64, training mode" in {row.stage for row in report.rows}
    rates: list[nn.Module] = [nn.Sequential(model[0], nn.Dropout(0.4)).eval() for model in models]  # type: ignore[index]
    assert not torch_bridge.check(rates, torch_bridge.to_ensemble(models, (x,)), (x,)).passed


def test_gradients_that_pytorch_cannot_compute_are_a_note() -> None:
    class Overwrites(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input).sigmoid()
            z = y * 2
            y.add_(1)  # the sigmoid's gradient needs what was here
            return z + y

    models = [Overwrites(3, 2), Overwrites(3, 2)]
    x = torch.randn(4, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed and "gradients not compared" in " ".join(report.notes)
    failed = [row for row in torch_bridge.check(models, ensemble, (x,), train=True).rows if not row.passed]
    assert [row.stage for row in failed] == ["float64, training steps"]  # which were asked for
    assert "training not compared: one of the variables needed for gradient" in failed[0].note


def test_networks_of_integers_are_compared_in_float64_throughout() -> None:
    """`nnx.Embed` casts to the dtype that it was made with."""
    models: list[nn.Module] = [nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)) for _ in range(2)]
    x = torch.randint(0, 7, (3, 2))
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed, str(report)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.float() / 255)


class Timestep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(3).float())
        h = self.fc(torch.cat([angles.sin(), angles.cos()], 1)).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.softmax(self.scale * h.type_as(t), -1, dtype=torch.float32)


class Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 2, 4, 5], align_corners=False)
        return nn.functional.grid_sample(self.conv(x), grid.expand(x.shape[0], -1, -1, -1), align_corners=False)


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Bytes, torch.arange(24, dtype=torch.uint8).reshape(4, 6)),
        (Timestep, torch.rand(4)),
        (Resampled, torch.rand(3, 2, 6, 7)),
    ],
    ids=["bytes", "timestep", "resampled"],
)
def test_forwards_that_say_float_are_proved_in_float64(model: Callable[[], nn.Module], x: Tensor) -> None:
    models = [model(), model()]
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,))
    assert report.passed, str(report)
    assert torch.get_default_dtype() == torch.float32


class Masked(nn.Module):
    """Fills what is masked with a value that dwarfs all else."""

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


def test_complex_outputs_are_compared_in_both_parts() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.fc(x).tanh())

    models, x = [Spectrum() for _ in range(2)], torch.randn(8, 4)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert torch_bridge.check(models, ensemble, (x,)).passed
    report = torch_bridge.check(models[::-1], ensemble, (x,))
    assert {"gradients, float64", "complex64, same for all"} <= {row.stage for row in report.rows if not row.passed}
    assert rms_error(np.array([1 + 5j]), np.array([1 + 0j])) == 5


def test_a_network_of_buffers_alone_is_compared_in_working_precision() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.get_buffer("w"))

    models, x = [Fixed() for _ in range(2)], torch.randn(8, 4)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,), thorough=False)
    assert "float32, same for all" in {row.stage for row in report.rows}


def test_weights_alone_are_no_proof() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rrelu(self.fc(x), training=True)  # whose draws stay within a layer

    models, x = [Drawing().eval() for _ in range(2)], torch.randn(8, 4)
    assert torch_bridge.to_ensemble(models, (x,)).proof is None


@pytest.mark.thinned
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_zero_but_for_rounding_pass(seed: int) -> None:
    """As those of a bias before InstanceNorm, whose terms cancel."""
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
    assert normwise(np.array([[3.0, -0.5, 2e-17]]), expected)[0] < EXACT


def test_gradients_are_zero_only_on_both_sides() -> None:
    zero, wrong = np.array([2e-15, -1e-15]), np.array([2e-12, 0.0])
    assert gradients._relative(-zero, zero, 1.0) == 0
    assert gradients._relative(wrong, zero, 1.0) > gradients.LIMIT


# What rounding leaves


class Cancelling(nn.Module):
    """The mean of what was normalised: zero, but for rounding."""

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
    assert any("little but rounding" in note for note in report.notes)


@pytest.mark.further
def test_a_small_output_that_is_no_rounding_is_compared() -> None:
    """A product of many densities is far smaller than any rounding of what it is made of."""

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


def test_a_batch_that_pytorch_refuses_is_not_compared() -> None:
    models, x = [nn.GroupNorm(3, 3) for _ in range(2)], torch.randn(4, 3, 1, 1)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert any("not compared for a batch of 1" in note for note in report.notes)


def test_a_forward_that_writes_into_its_input_spoils_no_later_stage() -> None:
    """Dropout hands its input on in evaluation mode, so that this one halves what it was given at every call."""

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = nn.Dropout(0.3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x)
            y[:, :2] *= 0.5
            return self.linear(y)

    models, x = [Halving().eval() for _ in range(2)], torch.randn(5, 4)
    before = x.clone()
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert torch.equal(x, before)


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
    """What it fills in is no measure of the gradients."""

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


@pytest.mark.further
def test_legacy_weight_norm_is_compared_in_every_stage() -> None:
    """It leaves a weight behind at every call, which cannot be copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).eval() for _ in range(2)]
    x = torch.randn(5, 4)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report


def test_outputs_without_a_finite_number_prove_nothing() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    with pytest.raises(ParityError, match="PyTorch's outputs have no finite number to compare"):
        torch_bridge.to_ensemble(models, (torch.full((4, 3), torch.nan),))
