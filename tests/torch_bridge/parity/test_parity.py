"""The checker: it passes right ensembles, fails wrong ones, and says where."""

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, InputError
from jaxensemble.errors import ParityError, StateError
from jaxensemble.modules.state import flatten, unflatten
from torch_bridge.parity.inputs import resize_inputs


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


def test_a_prepared_program_is_compared_as_well(ported: Any) -> None:
    models, ensemble, x = ported
    run = ensemble.prepare(x)
    report = torch_bridge.check(models, run, (x,), thorough=False)
    assert report.passed and "float32, prepared" in {row.stage for row in report.rows}
    run.arrays = [array * 1.01 for array in run.arrays]
    wrong = torch_bridge.check(models, run, (x,), thorough=False)
    assert {row.stage for row in wrong.rows if not row.passed} == {"float32, prepared"}
    with pytest.raises(InputError, match="was prepared for inputs"):
        torch_bridge.check(models, run, (x[:2],))
    mine = jax.tree.map(jnp.copy, ensemble)
    with pytest.raises(StateError, match="gave its arrays away"):
        torch_bridge.check(models, mine.prepare(x, donate=True), (x,))


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


class ZeroHead(nn.Module):
    """Gives zeros until it is trained, whatever its other weights are."""

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
            y.add_(1)  # the sigmoid's gradient needs the old values
            return z + y

    models = [Overwrites(3, 2), Overwrites(3, 2)]
    x = torch.randn(4, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed and "gradients not compared" in " ".join(report.notes)
    failed = [row for row in torch_bridge.check(models, ensemble, (x,), train=True).rows if not row.passed]
    assert [row.stage for row in failed] == ["float64, training steps"]  # on request
    assert "training not compared: one of the variables needed for gradient" in failed[0].note


def test_weights_alone_are_no_proof() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rrelu(self.fc(x), training=True)  # its draws stay within a layer

    models, x = [Drawing().eval() for _ in range(2)], torch.randn(8, 4)
    assert torch_bridge.to_ensemble(models, (x,)).proof is None


def test_a_batch_that_pytorch_refuses_is_not_compared() -> None:
    models, x = [nn.GroupNorm(3, 3) for _ in range(2)], torch.randn(4, 3, 1, 1)
    report = torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,), check=False), (x,))
    assert report.passed, report
    assert any("not compared for a batch of 1" in note for note in report.notes)


def test_a_forward_that_writes_into_its_input_spoils_no_later_stage() -> None:
    """Dropout hands its input on in evaluation mode, so this network halves its input at every call."""

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
