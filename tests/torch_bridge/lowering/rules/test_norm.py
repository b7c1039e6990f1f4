"""Normalisation against PyTorch's: layers with running statistics in both modes, and those over features."""

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torch_bridge
from jaxensemble import layers
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.modules.state import flatten, split
from tests.helpers.porting import Fn, assert_close, assert_ports, assert_trains, randomised
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS, Lowered, lower
from torch_bridge.porting.port import to_flax


def lowered(model: nn.Module, *inputs: Tensor) -> Lowered:
    return lower(capture(model, inputs, OPERATIONS))


# Evaluation, every option

CASES = {
    "BatchNorm1d of vectors": (lambda: nn.BatchNorm1d(5), (4, 5)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(5, eps=1e-3), (4, 5, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, momentum=None), (2, 4, 3, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 4, 2)),
    "BatchNorm of one channel": (lambda: nn.BatchNorm2d(1), (2, 1, 3, 4)),
    "BatchNorm without affine": (lambda: nn.BatchNorm2d(3, affine=False), (2, 3, 3, 4)),
    "BatchNorm without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 3, 4)),
    "BatchNorm without either": (lambda: nn.BatchNorm1d(3, affine=False, track_running_stats=False), (3, 3)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (2, 3, 3, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, eps=1e-3, bias=False), (2, 6)),
    "LayerNorm without affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)),
    "LayerNorm of a feature map": (lambda: nn.LayerNorm([4, 3, 4]), (2, 4, 3, 4)),
    "LayerNorm with a size of one": (lambda: nn.LayerNorm([3, 1, 4]), (2, 3, 1, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 4)),
    "GroupNorm of vectors": (lambda: nn.GroupNorm(3, 6, eps=1e-3), (2, 6)),
    "GroupNorm of sequences": (lambda: nn.GroupNorm(1, 4), (2, 4, 5)),
    "GroupNorm of volumes": (lambda: nn.GroupNorm(4, 4), (2, 4, 2, 3, 2)),
    "GroupNorm in 32 groups": (lambda: nn.GroupNorm(32, 64), (2, 64, 2)),
    "GroupNorm without affine": (lambda: nn.GroupNorm(2, 6, affine=False), (2, 6, 3, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), (2, 4, 5)),
    "InstanceNorm2d with affine": (lambda: nn.InstanceNorm2d(4, affine=True, eps=1e-3), (2, 4, 3, 4)),
    "InstanceNorm2d with statistics": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (2, 4, 3, 4)),
    "InstanceNorm3d with both": (
        lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
        (2, 4, 2, 3, 2),
    ),
    "RMSNorm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "RMSNorm with eps": (lambda: nn.RMSNorm([3, 6], eps=1e-3), (2, 3, 6)),
    "RMSNorm without affine": (lambda: nn.RMSNorm(6, elementwise_affine=False), (2, 3, 6)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", CASES)
def test_evaluation(name: str) -> None:
    """Small inputs, so that a wrong epsilon shows."""
    make, shape = CASES[name]
    assert_ports(make(), torch.randn(shape) * 1e-2, batches=(3,))


def test_unbatched_instance_norm() -> None:
    assert_ports(nn.InstanceNorm1d(4), torch.randn(4, 5), batch_axis=None)


class Within(nn.Module):
    """A norm between a convolution and a flatten, or behind it."""

    def __init__(self, inner: nn.Module, outer: nn.Module):
        super().__init__()
        self.conv, self.inner, self.outer, self.fc = nn.Conv2d(2, 3, 3), inner, outer, nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.outer(self.inner(self.conv(x)).flatten(1)))


WITHIN = {
    "BatchNorm": (nn.BatchNorm2d(3), nn.BatchNorm1d(24)),
    "LayerNorm": (nn.LayerNorm([3, 4, 2]), nn.LayerNorm(24)),
    "GroupNorm": (nn.GroupNorm(3, 3), nn.RMSNorm(24)),
    "InstanceNorm": (nn.InstanceNorm2d(3, affine=True), nn.Identity()),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", WITHIN)
def test_nothing_is_transposed_within_a_network(name: str) -> None:
    """Feature maps stay channels-last, through a flatten too: it is the weights that are stored in another order."""
    model, x = Within(*WITHIN[name]), torch.randn(3, 2, 6, 4)
    assert_ports(model, x, batches=(2,))
    targets = [call.target for call in lowered(model, x).network.calls]
    assert targets.count("jnp.transpose") == 1  # the input


def test_layer_norm_of_one_feature() -> None:
    """Nothing is left but the bias: PyTorch's gradient is rounding, and not compared."""
    assert_ports(nn.LayerNorm(1), torch.randn(2, 3, 1), gradients=False)


def test_layer_norm_over_the_stored_middle() -> None:
    """Channels-last, the last dimension is not the last axis."""
    assert_ports(nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm(4)), torch.randn(2, 2, 6, 6), batches=())


def test_options_are_written_as_a_flax_programmer_would() -> None:
    def options(model: nn.Module, *shape: int) -> dict[str, Any]:
        (layer,) = lowered(nn.Sequential(model), torch.randn(shape)).network.layers
        return dict(layer.options)

    assert options(nn.BatchNorm1d(4), 2, 4) == {"num_features": 4}
    assert options(nn.BatchNorm1d(4, momentum=0.3), 2, 4) == {"num_features": 4, "momentum": 0.7}
    assert options(nn.BatchNorm1d(4, momentum=None), 2, 4) == {"num_features": 4, "momentum": None}
    assert options(nn.LayerNorm(4, eps=1e-6), 2, 4) == {"num_features": 4, "use_fast_variance": False}


def test_far_from_zero() -> None:
    """The variance of 1e4 plus noise: a one-pass formula in float32 is off by more than one."""
    x = (1e4 + torch.randn(64, 4, 8)).float()
    for model in (nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)):
        truth = copy.deepcopy(model).double()(x.double()).detach().numpy()
        rounding = 1e4 * np.finfo("float32").eps  # of the mean; the standard deviation is one
        assert np.abs(np.asarray(to_flax(model, (x,), mode="as_is")(x.numpy())) - truth).max() < 4 * rounding


# Training

TRAINED = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (4, 3, 2, 5)),
    "cumulative average": (lambda: nn.BatchNorm1d(3, momentum=None), (4, 3)),
    "no affine": (lambda: nn.BatchNorm1d(3, affine=False), (4, 3, 2)),
    "no statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3, 2)),
    "momentum zero": (lambda: nn.BatchNorm1d(3, momentum=0.0), (4, 3, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, momentum=0.3, affine=True, track_running_stats=True), (4, 3, 2, 5)),
    "InstanceNorm without momentum": (
        lambda: nn.InstanceNorm1d(3, momentum=None, track_running_stats=True),  # type: ignore[arg-type]
        (4, 3, 5),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str, x64: None) -> None:
    """Three steps in training mode: outputs and all buffers are PyTorch's."""
    make, shape = TRAINED[name]
    model = randomised(nn.Sequential(make()))
    model.eval()
    module = to_flax(model, (torch.randn(shape).double(),))
    module.train()
    model.train()
    for x in torch.randn(3, *shape).double() * 3 + 1:
        assert_close(module(jnp.asarray(x.numpy())), model(x))
    assert_buffers(module, model)
    x = torch.randn(shape).double()
    module.eval()
    assert_close(module(jnp.asarray(x.numpy())), model.eval()(x))


def assert_buffers(module: nnx.Module, model: nn.Module) -> None:
    stored = flatten(split(module).buffers)
    names = {"running_mean": "mean", "running_var": "var"}
    expected = {".".join(names.get(part, part) for part in key.split(".")): t for key, t in model.named_buffers()}
    assert set(stored) == set(expected)
    for key, tensor in expected.items():
        assert_close(stored[key], tensor)


def test_training_gradients(x64: None) -> None:
    """Through the batch's own statistics."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train()
    x = torch.randn(5, 3).double().requires_grad_()
    module = to_flax(model, (x.detach(),), mode="as_is")
    (model(x) ** 3).sum().backward()
    grad = nnx.grad(lambda module, x: (module(x) ** 3).sum(), argnums=1)(module, jnp.asarray(x.detach().numpy()))
    assert_close(grad, x.grad)


def test_modes_of_submodules(x64: None) -> None:
    """A frozen submodule in a model that trains: modes are PyTorch's, and `train` and `eval` reach all."""
    model = randomised(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))).train()
    next(model.children()).eval()
    x = torch.randn(6, 3).double()
    module = to_flax(model, (x,), mode="as_is")
    assert_close(module(jnp.asarray(x.numpy())), model(x))
    assert_buffers(module, model)
    model.train()
    module.train()
    assert_close(module(jnp.asarray(x.numpy())), model(x))
    assert_buffers(module, model)


def test_one_layer_called_twice(x64: None) -> None:
    """Both calls move the same statistics."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x) * 2 + 1)

    model = randomised(Twice()).train()
    x = torch.randn(6, 3).double()
    module = to_flax(model, (x,), mode="as_is")
    assert_close(module(jnp.asarray(x.numpy())), model(x))
    assert_buffers(module, model)


class Watching(nn.Module):
    """Keeps statistics of values that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 2))
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        self.norm(y[..., None].expand(-1, -1, 3))
        return self.fc(x)


def test_statistics_of_what_no_output_depends_on(x64: None) -> None:
    model = randomised(Watching()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    module = to_flax(model.eval(), (x,))
    module.train()
    trained = copy.deepcopy(model).train()
    assert_close(module(jnp.asarray(x.numpy())), trained(x))
    assert_buffers(module, trained)


def test_a_single_value_is_refused() -> None:
    layer = layers.BatchNorm(3)
    with pytest.raises(InputError, match="more than one value per feature"):
        layer(jnp.ones((1, 3)))
    with pytest.raises(InputError, match="must have 3 features"):
        layer(jnp.ones((2, 4)))


def test_batch_norm_in_half_precision() -> None:
    """Statistics in float32, the result in the input's dtype."""
    layer = layers.BatchNorm(2, param_dtype=jnp.bfloat16)
    x = (100 + jnp.arange(16.0).reshape(8, 2)).astype(jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16 and layer.mean is not None and layer.mean[...].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, "float32").std(0), 1, atol=0.02)


# Functional and user-written


class Functional(nn.Module):
    """`F.batch_norm` on tensors of a user's own, in a module without a counter."""

    def __init__(self, **options: Any):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.middle, self.spread = nn.Buffer(torch.randn(3)), nn.Buffer(torch.rand(3) + 0.5)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        options = {"training": self.training} | self.options
        return F.batch_norm(x, self.middle, self.spread, self.gain, self.offset, **options)


def test_functional_batch_norm(x64: None) -> None:
    model = randomised(Functional(momentum=0.2))
    x = torch.randn(4, 3, 2).double()
    assert_ports(model, x, randomise=False)
    module = to_flax(nn.Sequential(model).eval(), (x,))
    module.train()
    model.train()
    assert_close(module(jnp.asarray(x.numpy())), model(x))
    stored = flatten(split(module).buffers)
    assert_close(stored["0.mean"], model.middle)
    assert_close(stored["0.var"], model.spread)


def test_functional_batch_norm_that_never_trains(x64: None) -> None:
    """Running statistics in training too: no layer whose mode could change."""
    model, x = randomised(Functional(training=False)), torch.randn(4, 3, 2).double()
    assert_ports(model, x, randomise=False)
    module = to_flax(model, (x,))
    module.train()
    assert_close(module(jnp.asarray(x.numpy())), model(x))


def test_functional_batch_norm_that_always_writes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="running statistics in evaluation"):
        to_flax(Functional(training=True), (torch.randn(4, 3),))


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        w, b = self.w.tanh(), self.b
        return (
            F.layer_norm(x, (3,)),
            F.layer_norm(x, (4, 3), torch.outer(w, b[:3]), None),
            F.group_norm(x, 2, w, b),
            F.instance_norm(x, weight=w, bias=b),
            F.batch_norm(x, None, None, w, b, training=True),
            F.batch_norm(x, b.detach(), w.detach().exp(), training=False),
            F.rms_norm(x, (3,), b[:3]),
        )


def test_functions_with_computed_weights() -> None:
    assert_ports(Functions(), torch.randn(2, 4, 3), batches=(3,))


def test_shared_weights() -> None:
    """Two norms with the same parameters: what no layer can hold alone is written out."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LayerNorm(4), nn.LayerNorm(4)
            self.c, self.d = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.b.weight, self.d.weight = self.a.weight, self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x) ** 2) ** 2))

    assert_ports(Shared(), torch.randn(3, 4))


def test_statistics_of_what_nobody_uses_are_kept() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            y = x * 2
            y.view(-1).mul_(3)  # in place: torch removes side effects, and unused values with them
            return y

    assert_ports(Unused(), torch.randn(4, 3))


def test_momentum_by_mode() -> None:
    class Odd(Functional):
        def forward(self, x: Tensor) -> Tensor:
            momentum = 0.5 if self.training else 0.0
            return F.batch_norm(x, self.middle, self.spread, training=self.training, momentum=momentum)

    assert_trains(Odd, torch.randn(4, 3))


def test_running_statistics_beside_computed_weights_are_for_evaluation_only() -> None:
    class Computed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.middle, self.spread, 2 * self.gain, self.offset, training=self.training)

    reason = lowered(Computed(), torch.randn(4, 3)).network.evaluation_only
    assert reason and "not held by one module" in reason


# By a norm


class Distances(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            F.cosine_similarity(x, y),
            F.cosine_similarity(x, y[:, :1], dim=-1, eps=1.0),
            F.pairwise_distance(x, y),
            F.pairwise_distance(x, y, p=1.0, keepdim=True),
            nn.CosineSimilarity(0)(x, y),
        )


def test_distances() -> None:
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    x[0, 0], y[0, 1] = 0, 0
    assert_ports(Distances(), x, y, batches=())


def test_normalize() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return F.normalize(x), F.normalize(x, p=1.0, dim=0), F.normalize(x, dim=-1, eps=10.0)

    assert_ports(Normalize(), torch.randn(3, 4), batches=())


def parametrised(kind: str) -> nn.Module:
    if kind == "weight norm":
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(2, 3, 2)),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(18, 4), dim=1),
            parametrizations.weight_norm(nn.Linear(4, 4), dim=None),  # type: ignore[arg-type]
        )
    if kind == "legacy weight norm":
        with torch.no_grad():  # without this it could not be copied
            return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(24, 4)))
    if kind == "spectral norm":
        return nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(24, 4)))
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 3, 2)))


@pytest.mark.parametrize("kind", ["weight norm", "legacy weight norm", "spectral norm", "legacy spectral norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_parametrisations(kind: str) -> None:
    assert_ports(parametrised(kind), torch.randn(2, 2, 4, 3), batches=(3,))


def test_local_response_norm() -> None:
    assert_ports(nn.LocalResponseNorm(3, alpha=0.1, beta=0.6, k=1.5), torch.randn(2, 5, 3, 4))


def test_cross_map_response_norm_is_refused() -> None:
    """A layer from Lua Torch, a Python function of its own with in-place operations that cannot be exported."""
    with pytest.raises(UnsupportedError, match=r"CrossMapLRN2d\.forward"):
        to_flax(nn.CrossMapLRN2d(3), (torch.randn(2, 5, 3, 4),), batch_axis=None)


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm with more inside, which counts batches by default."""

    def __init__(self, features: int, *inside: nn.Module, counts: bool = True):
        super().__init__(features, momentum=0.2)
        self.inside, self.counts = nn.Sequential(*inside), counts

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.counts and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, self.eps
        )
        return self.inside(y)


class WithWeights(nn.Module):
    """Running statistics of a module's own, with another weight."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta, self.scale = (nn.Parameter(torch.rand(4)) for _ in range(3))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training, 0.1)
        return self.scale[:, None, None] * y


class Outermost(WithActivation):
    """A network that is a BatchNorm itself."""

    def __init__(self) -> None:
        parts = (WithActivation(4, nn.Dropout(0.3), nn.ReLU(inplace=True)), WithWeights(), nn.PReLU(4))
        super().__init__(3, nn.Conv2d(3, 4, 3), *parts, WithActivation(4, counts=False))


def test_batch_norms_that_do_more_keep_their_statistics() -> None:
    ensemble = assert_trains(Outermost, torch.randn(4, 3, 6, 5))
    assert "self.norm = layers.BatchNorm(" in ensemble.source()
    counters = [path for path in flatten(ensemble.buffers) if path.endswith("num_batches_tracked")]
    assert sorted(counters) == [
        "inside.1.norm.num_batches_tracked",
        "inside.4.num_batches_tracked",
        "norm.num_batches_tracked",
    ]


def test_the_default_of_rms_norm_is_that_of_its_dtype_in_the_proof() -> None:
    """PyTorch's is the dtype's own resolution, which is another one in float64."""
    models = [nn.Sequential(nn.RMSNorm(6), Fn(lambda x: F.rms_norm(x * 0.01, (6,))), nn.Linear(6, 2)) for _ in range(2)]
    assert torch_bridge.to_ensemble(models, (torch.randn(4, 6),)).proof is not None
