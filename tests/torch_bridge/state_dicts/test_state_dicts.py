"""Flax twins written by hand, given PyTorch's state dicts: they agree in float64, or an error names all offenders."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import pallas
from torch import Tensor, nn

import jaxensemble
from jaxensemble import Ensemble, InputError, MemberError, StateError
from jaxensemble.modules.state import flatten, split
from tests.helpers.porting import assert_close, randomised
from torch_bridge.state_dicts import stack_state_dicts

pytestmark = pytest.mark.usefixtures("x64")

MEMBERS = 3


class TorchMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(30, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


class FlaxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1, self.fc2 = nnx.Linear(30, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.fc3 = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        return self.fc3(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


class TorchCNN(nn.Module):
    """The tutorial's, smaller; the image is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4 * 3 * 5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.fc2(self.fc1(x).relu())


class FlaxCNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 3, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(4 * 3 * 5, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.fc2(nnx.relu(self.fc1(x)))


class FlaxRenamedCNN(FlaxCNN):
    """Other names, and a transpose before the flatten: PyTorch's order after all."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.features = nnx.List([self.conv1, self.conv2])
        self.head = nnx.Sequential(self.fc1, nnx.relu, self.fc2)
        del self.conv1, self.conv2, self.fc1, self.fc2

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.features:
            x = nnx.relu(conv(x))
        x = nnx.max_pool(x, (2, 2), (2, 2)).transpose(0, 3, 1, 2)
        return self.head(x.reshape(x.shape[0], -1))


class FlaxMappedCNN(FlaxCNN):
    """Written for one image, and mapped over the batch."""

    def __init__(self, rngs: nnx.Rngs, mapped: Callable[..., Any]) -> None:
        super().__init__(rngs)
        self.mapped = mapped

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mapped(self.one)(x)

    def one(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = nnx.max_pool(x, (2, 2), (2, 2)).ravel()
        return self.fc2(nnx.relu(self.fc1(x)))


class TorchNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.hidden, self.bn = nn.Linear(4 * 6, 8), nn.BatchNorm1d(8)
        self.rms, self.act, self.out = nn.RMSNorm(8, eps=1e-6), nn.PReLU(), nn.Linear(8, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids)).flatten(1)
        return self.out(self.act(self.rms(self.bn(self.hidden(x)))))


class FlaxNorms(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.norm = (
            nnx.Embed(11, 6, param_dtype=jnp.float64, rngs=rngs),
            nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs),
        )
        self.hidden, self.bn = nnx.Linear(4 * 6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.rms, self.act = nnx.RMSNorm(8, rngs=rngs), nnx.PReLU()
        self.out = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.norm(self.embed(ids))
        x = x.reshape(x.shape[0], -1)
        return self.out(self.act(self.rms(self.bn(self.hidden(x)))))


def torch_sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.InstanceNorm2d(8, affine=True), nn.Sigmoid()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(8 * 2 * 3),
        nn.Linear(8 * 2 * 3, 5),
    )


def flax_sequential(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs),
        nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, rngs=rngs),
        lambda x: nnx.gelu(x, approximate=False),
        nnx.Sequential(
            nnx.Conv(4, 8, (3, 3), padding="VALID", feature_group_count=2, rngs=rngs),
            nnx.InstanceNorm(8, epsilon=1e-5, rngs=rngs),
            nnx.sigmoid,
        ),
        lambda x: nnx.avg_pool(x, (2, 2), (2, 2)),
        lambda x: x.reshape(x.shape[0], -1),
        nnx.BatchNorm(8 * 2 * 3, rngs=rngs),
        nnx.Linear(8 * 2 * 3, 5, rngs=rngs),
    )


class TorchDecoder(nn.Module):
    """A Linear layer, whose outputs become an image, and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(5, 4 * 2 * 3), nn.BatchNorm1d(4 * 2 * 3)
        self.up1 = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(3, 2, 3, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(self.fc(z)).relu().unflatten(1, (4, 2, 3))
        return self.up2(self.up1(x).relu())


class FlaxDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, transpose_kernel: bool) -> None:
        up = {"strides": (2, 2), "transpose_kernel": transpose_kernel, "rngs": rngs}
        self.fc, self.norm = nnx.Linear(5, 4 * 2 * 3, rngs=rngs), nnx.BatchNorm(4 * 2 * 3, rngs=rngs)
        self.up1 = nnx.ConvTranspose(4, 3, (4, 4), padding=2, **up)
        self.up2 = nnx.ConvTranspose(3, 2, (3, 3), padding="VALID", **up)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.fc(z))).reshape(-1, 2, 3, 4)
        return self.up2(nnx.relu(self.up1(x)))


class TorchBare(nn.Module):
    """Bare parameters that belong to an image, a concatenation, padding, a residual connection and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 7, 3, groups=7, padding=1)
        self.position, self.gamma = nn.Parameter(torch.zeros(1, 4, 4, 4)), nn.Parameter(torch.ones(7, 1, 1))
        self.extra, self.fc = nn.Linear(7, 2), nn.Linear(7 * 5 * 4 + 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.conv1(x) + self.position, x], 1)
        x = x + self.gamma * self.conv2(x).tanh()
        pooled = self.extra(x.mean((2, 3)))
        x = nn.functional.pad(x, (0, 0, 1, 0))
        return self.fc(torch.cat([x.flatten(1), pooled], 1))


class FlaxBare(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(7, 7, (3, 3), feature_group_count=7, padding=1, rngs=rngs)
        self.position, self.gamma = nnx.Param(jnp.zeros((1, 4, 4, 4))), nnx.Param(jnp.ones(7))
        self.extra, self.fc = nnx.Linear(7, 2, rngs=rngs), nnx.Linear(7 * 5 * 4 + 2, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.concatenate([self.conv1(x) + self.position[...], x], -1)
        x = x + self.gamma[...] * jnp.tanh(self.conv2(x))
        pooled = self.extra(x.mean((1, 2)))
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
        return self.fc(jnp.concatenate([x.reshape(x.shape[0], -1), pooled], 1))


class TorchAttention(nn.Module):
    """Attention with separate projections, whose Flax twin has LinearGeneral layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class FlaxAttention(nnx.Module):
    """Layers as in `nnx.MultiHeadAttention`, which itself computes the softmax in float32."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value = (nnx.LinearGeneral(6, (2, 3), rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = jnp.einsum("nqhd,nkhd->nhqk", self.query(x) / 3**0.5, self.key(x))
        return self.out(jnp.einsum("nhqk,nkhd->nqhd", nnx.softmax(weights), self.value(x)))


class FlaxContracting(nnx.Module):
    """No flatten at all: the Linear layer contracts the three axes of the image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 4, (2, 2), padding="VALID", rngs=rngs)
        self.fc = nnx.LinearGeneral((2, 3, 4), 5, axis=(-3, -2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(nnx.relu(self.conv(x)))


def torch_contracting() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 3, 5))
    return net


IMAGE = (2, 1, 10, 14)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nnx.Rngs], nnx.Module], Tensor, dict[str, Any]]] = {
    "mlp": (TorchMLP, FlaxMLP, noise(2, 1, 5, 6), {}),
    "cnn": (TorchCNN, FlaxCNN, noise(*IMAGE), {}),
    "renamed cnn": (
        TorchCNN,
        FlaxRenamedCNN,
        noise(*IMAGE),
        {"names": {"conv1": "features.0", "conv2": "features.1", "fc1": "head.0", "fc2": "head.layers.2"}},
    ),
    "norms": (TorchNorms, FlaxNorms, torch.arange(20).reshape(5, 4) % 11, {}),
    "sequential": (torch_sequential, flax_sequential, noise(2, 2, 6, 8), {}),
    "decoder": (TorchDecoder, lambda rngs: FlaxDecoder(rngs, False), noise(2, 5), {}),
    "decoder, kernels transposed": (TorchDecoder, lambda rngs: FlaxDecoder(rngs, True), noise(2, 5), {}),
    "bare": (TorchBare, FlaxBare, noise(2, 3, 4, 4), {}),
    "mapped": (TorchCNN, lambda rngs: FlaxMappedCNN(rngs, jax.vmap), noise(*IMAGE), {}),
    "in a loop": (
        TorchCNN,
        lambda rngs: FlaxMappedCNN(rngs, lambda one: lambda x: jax.lax.map(one, x)),
        noise(*IMAGE),
        {},
    ),
    "in a branch": (
        TorchCNN,
        lambda rngs: FlaxMappedCNN(rngs, lambda one: lambda x: jax.lax.cond(x.sum() > 0, *[jax.vmap(one)] * 2, x)),
        noise(*IMAGE),
        {},
    ),
    "unrolled": (
        TorchCNN,
        lambda rngs: FlaxMappedCNN(
            rngs,
            lambda one: (
                lambda x: jax.lax.fori_loop(
                    0, len(x), lambda k, y: y.at[k].set(one(jnp.asarray(x)[k])), jnp.zeros((len(x), 5), x.dtype)
                )
            ),
        ),
        noise(*IMAGE),
        {},
    ),
    "attention": (TorchAttention, FlaxAttention, noise(2, 5, 6), {}),
    "contracting": (torch_contracting, FlaxContracting, noise(2, 2, 3, 4), {"names": {"0": "conv", "3": "fc"}}),
}


def members_of(factory: Callable[[], nn.Module]) -> list[nn.Module]:
    return [randomised(factory(), seed).eval() for seed in range(MEMBERS)]


def channels_last(x: Tensor) -> np.ndarray:
    x = x.double() if x.is_floating_point() else x
    return x.movedim(1, -1).contiguous().numpy() if x.ndim == 4 else x.numpy()


def outputs(module: nnx.Module, params: Any, buffers: Any, x: np.ndarray) -> jax.Array:
    func = lambda params, buffers: jaxensemble.functional_call(module, (params, buffers), x, strict=True)  # noqa: E731
    return jax.jit(jax.vmap(func))(params, buffers)


def expected(models: list[nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        result = torch.stack([model(x.double() if x.is_floating_point() else x) for model in models])
    return result.movedim(2, -1) if result.ndim == 5 else result


@pytest.mark.thinned
@pytest.mark.parametrize("name", CASES)
def test_gives_what_pytorch_gives(name: str) -> None:
    factory, twin, x, options = CASES[name]
    models, module = members_of(factory), twin(nnx.Rngs(0))
    nnx.Module.eval(module)
    dicts = [model.state_dict() for model in models]
    before = copy.deepcopy(dicts)
    params, buffers = stack_state_dicts(dicts, module, channels_last(x), **options)
    assert_close(outputs(module, params, buffers, channels_last(x)), expected(models, x))
    for ours, theirs in ((params, split(module).params), (buffers, split(module).buffers)):
        shapes = {key: leaf.shape[1:] for key, leaf in flatten(ours).items()}
        assert shapes == {key: leaf.shape for key, leaf in flatten(theirs).items()}
    for ours, theirs in zip(dicts, before, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_numpy_arrays_and_training_mode_and_an_abstract_module() -> None:
    models = members_of(TorchCNN)
    dicts = [{key: tensor.numpy() for key, tensor in model.state_dict().items()} for model in models]
    module = nnx.eval_shape(lambda: FlaxCNN(nnx.Rngs(0)))
    params, buffers = stack_state_dicts(dicts, module, jax.ShapeDtypeStruct((1, 10, 14, 1), jnp.float32))
    real = FlaxCNN(nnx.Rngs(0))
    nnx.Module.eval(real)
    x = torch.randn(IMAGE)
    assert_close(outputs(real, params, buffers, channels_last(x)), expected(models, x))


def test_an_ensemble_takes_the_result() -> None:
    models, module = members_of(torch_sequential), flax_sequential(nnx.Rngs(0))
    nnx.Module.eval(module)
    x = torch.randn(2, 2, 6, 8)
    params, buffers = stack_state_dicts([model.state_dict() for model in models], module, channels_last(x))
    ensemble = Ensemble(split(module).graphdef, params, buffers)
    assert_close(ensemble(channels_last(x)), expected(models, x))


def test_the_result_shares_no_memory() -> None:
    model = nn.Linear(2, 2)
    params, _ = stack_state_dicts([model.state_dict()], nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
    kept = model.bias.detach().clone().numpy()
    model.bias.data.zero_()
    np.testing.assert_array_equal(params["bias"][0], kept)


def test_names_may_be_a_function() -> None:
    models = members_of(TorchMLP)
    module = nnx.Dict({f"dense{k}": layer for k, layer in enumerate((nnx.Linear(30, 16, rngs=nnx.Rngs(0)),))})

    class Twin(nnx.Module):
        def __init__(self) -> None:
            self.layers = module

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layers["dense0"](x)

    dicts = [{key: v for key, v in model.state_dict().items() if "fc1" in key} for model in models]
    params, _ = stack_state_dicts(
        dicts, Twin(), jnp.ones((1, 30)), names=lambda key: key.replace("fc1", "layers.dense0")
    )
    np.testing.assert_array_equal(params["layers"]["dense0"]["kernel"][1], dicts[1]["fc1.weight"].T)
    with pytest.raises(InputError, match=r"`names\('fc1\.weight'\)` must be a str; got NoneType"):
        stack_state_dicts(dicts, Twin(), jnp.ones((1, 30)), names=lambda key: None)  # type: ignore[arg-type, return-value]


class FlaxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.again = self.first

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.again(self.second(self.first(x)))


def test_tied_weights_have_to_agree() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    tied = nn.ModuleDict({"first": first, "second": second, "again": first}).state_dict()
    params, _ = stack_state_dicts([tied], FlaxTied(nnx.Rngs(0)), jnp.ones((1, 3)))
    np.testing.assert_array_equal(params["again"]["kernel"][0], first.weight.detach().T)
    untied = tied | {"second.weight": torch.zeros(3, 3)}
    with pytest.raises(StateError, match=r"`first\.weight` and `second\.weight` both go to `again\.kernel`"):
        stack_state_dicts([untied], FlaxTied(nnx.Rngs(0)), jnp.ones((1, 3)))


# Orders that cannot be determined


def test_a_flattened_input_with_channels_has_to_be_stated() -> None:
    models = members_of(TorchMLP)
    dicts = [model.state_dict() for model in models]
    module, x = FlaxMLP(nnx.Rngs(0)), torch.randn(2, 3, 2, 5)
    with pytest.raises(
        StateError, match=r"`fc1\.weight` for `fc1\.kernel`: it is flattened from axes \(2, 5, 3\) of an"
    ):
        stack_state_dicts(dicts, module, channels_last(x))
    with pytest.raises(StateError, match="may or may not have PyTorch's layout"):
        stack_state_dicts(dicts, module, x.numpy())
    params, buffers = stack_state_dicts(dicts, module, channels_last(x), permutations={"fc1": (2, 5, 3)})
    assert_close(outputs(module, params, buffers, channels_last(x)), expected(models, x))
    params, buffers = stack_state_dicts(dicts, module, x.numpy(), permutations={"fc1": None})
    assert_close(outputs(module, params, buffers, x.double().numpy()), expected(models, x))


class FlaxOdd(FlaxCNN):
    """The part between the convolutions and the Linear layer is an argument."""

    def __init__(self, rngs: nnx.Rngs, between: Callable[[jax.Array], jax.Array]) -> None:
        super().__init__(rngs)
        self.between = between

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))), (2, 2), (2, 2))
        return self.fc2(nnx.relu(self.fc1(self.between(x))))


UNCLEAR: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "tokens": (lambda x: x.reshape(-1, 15, 4).reshape(-1, 60), r"in several steps, from axes \(3, 5, 4\)"),
    "sort": (lambda x: jnp.sort(x.reshape(-1, 60)), "through sort on a flattened"),
    "fft": (lambda x: jnp.fft.fft(x.reshape(-1, 60)).real, "through fft on a flattened"),
    "resize": (
        lambda x: jax.image.resize(x, (x.shape[0], 15, 1, 4), "bilinear").reshape(-1, 60),
        r"from axes \(15, 4\), of which not all are known",
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_followed_has_to_be_stated(name: str) -> None:
    between, text = UNCLEAR[name]
    dicts = [model.state_dict() for model in members_of(TorchCNN)]
    module = FlaxOdd(nnx.Rngs(0), between)
    with pytest.raises(StateError, match=f"axes whose order in PyTorch is not known[^:]*: permutations=(.|\n)*{text}"):
        stack_state_dicts(dicts, module, jnp.ones((2, 10, 14, 1)))
    params, _ = stack_state_dicts(dicts, module, jnp.ones((2, 10, 14, 1)), permutations={"fc1": (3, 5, 4)})
    weight = dicts[1]["fc1.weight"].unflatten(1, (4, 3, 5)).permute(2, 3, 1, 0).reshape(60, 6)
    np.testing.assert_array_equal(params["fc1"]["kernel"][1], weight)


class FlaxTwisted(FlaxCNN):
    """The kernel goes through something before it meets the flattened image."""

    def __init__(self, rngs: nnx.Rngs, twist: Callable[[jax.Array], jax.Array]) -> None:
        super().__init__(rngs)
        self.twist = twist

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))), (2, 2), (2, 2))
        return self.fc2(nnx.relu(x.reshape(-1, 60) @ self.twist(self.fc1.kernel[...])))


def pallas_copy(x: jax.Array) -> jax.Array:
    def copy(source: Any, target: Any) -> None:
        target[...] = source[...]

    return pallas.pallas_call(copy, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


TWISTS: dict[str, tuple[Callable[[jax.Array], jax.Array], str]] = {
    "orthogonal": (lambda w: jnp.linalg.qr(w)[0], "depends through qr on"),
    "padded": (lambda w: jnp.pad(w[:-1], ((0, 1), (0, 0))), "goes through pad into|goes through slice into"),
    "in pieces": (lambda w: jnp.concatenate([w[:30], w[30:]]), "goes through concatenate into"),
    "copied": (pallas_copy, "goes into pallas_call, where it is not followed"),
}


@pytest.mark.parametrize("name", TWISTS)
def test_a_kernel_that_is_not_followed_has_to_be_stated(name: str) -> None:
    twist, text = TWISTS[name]
    dicts = [model.state_dict() for model in members_of(TorchCNN)]
    with pytest.raises(StateError, match=f"`fc1.weight` for `fc1.kernel`: it .*({text})"):
        stack_state_dicts(dicts, FlaxTwisted(nnx.Rngs(0), twist), jnp.ones((2, 10, 14, 1)))


def test_weight_norm_of_a_kernel_is_followed() -> None:
    dicts = [model.state_dict() for model in members_of(TorchCNN)]
    module = FlaxTwisted(nnx.Rngs(0), lambda w: w / jnp.linalg.norm(w, axis=0))
    params, _ = stack_state_dicts(dicts, module, jnp.ones((2, 10, 14, 1)))
    weight = dicts[1]["fc1.weight"].unflatten(1, (4, 3, 5)).permute(2, 3, 1, 0).reshape(60, 6)
    np.testing.assert_array_equal(params["fc1"]["kernel"][1], weight)


def test_wrong_permutations_are_all_named() -> None:
    dicts = [model.state_dict() for model in members_of(TorchCNN)]
    with pytest.raises(InputError) as caught:
        permutations = {"fc1": (3, 5, 5), "fc9": (1, 2)}
        stack_state_dicts(dicts, FlaxCNN(nnx.Rngs(0)), jnp.ones((1, 10, 14, 1)), permutations=permutations)
    assert "`fc1` has 60 inputs; (3, 5, 5) makes 75" in str(caught.value)
    assert "`fc9` is no layer with inputs" in str(caught.value)


# Errors


def test_all_that_does_not_fit_is_one_error() -> None:
    state = TorchMLP().state_dict()
    state["fc1.bias"] = torch.zeros(17)
    state["head.weight"], state["fc3.num_batches_tracked"] = state.pop("fc3.weight"), torch.tensor(0)
    state["unrelated"] = torch.zeros(2, 3)
    with pytest.raises(StateError) as caught:
        stack_state_dicts([state], FlaxMLP(nnx.Rngs(0)), jnp.ones((1, 30)), names={"tail": "fc3"})
    text = caught.value.details
    assert "FlaxMLP do not fit together" in text
    for line in (
        "`head.weight` float32[4, 16]",
        "`unrelated` float32[2, 3]",
        "`fc3.kernel` [16, 4], which no key goes to",
        "`names` has `tail`",
        "`fc1.bias` for `fc1.bias`: expected shape (16,) in PyTorch, got (17,)",
    ):
        assert f"\n  {line}" in text
    assert "num_batches_tracked" not in text


@pytest.mark.parametrize(
    ("layer", "twin", "text"),
    [
        (nn.Linear(3, 4), nnx.Linear(4, 3, rngs=nnx.Rngs(0)), r"expected shape \(3, 4\) in PyTorch, got \(4, 3\)"),
        (
            nn.Conv1d(2, 4, 3),
            nnx.Conv(2, 5, (3,), rngs=nnx.Rngs(0)),
            r"expected shape \(5, 2, 3\) in PyTorch, got \(4, 2, 3\)",
        ),
        (
            nn.ConvTranspose1d(2, 4, 3, groups=2),
            nnx.ConvTranspose(2, 4, (3,), rngs=nnx.Rngs(0)),
            r"expected shape \(2, 4, 3\) in PyTorch, got \(2, 2, 3\)",
        ),
    ],
)
def test_shapes_are_told_as_pytorch_has_them(layer: nn.Module, twin: Any, text: str) -> None:
    x = jnp.ones((1, twin.in_features) if isinstance(twin, nnx.Linear) else (1, 5, twin.in_features))
    with pytest.raises(StateError, match=text):
        stack_state_dicts([layer.state_dict()], twin, x)


def test_a_layer_that_is_not_known_is_not_guessed() -> None:
    twin = nnx.Einsum("nc,cd->nd", (3, 3), (3,), rngs=nnx.Rngs(0))
    with pytest.raises(
        StateError, match=r"stay unread[^:]*: (.|\n)*`weight` float32\[3, 3\](.|\n)*unfilled:\n  `kernel`"
    ):
        stack_state_dicts([nn.Linear(3, 3).state_dict()], twin, jnp.ones((1, 3)))


def test_differences_between_members_are_one_error() -> None:
    dicts = [nn.Linear(3, 2).state_dict() for _ in range(5)]
    dicts[1]["weight"] = torch.zeros(2, 4)
    dicts[2]["bias"] = dicts[2]["bias"].double()
    dicts[3]["more"] = torch.zeros(1)
    dicts[4]["weight"] = torch.zeros(2, 4)
    del dicts[3]["bias"]
    with pytest.raises(MemberError) as caught:
        stack_state_dicts(dicts, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
    for line in (
        "`weight`: float32[2, 4] in members 1, 4, float32[2, 3] in member 0",
        "`bias`: float64[2] in member 2, float32[2] in member 0",
        "`more`: float32[1] in member 3, nothing in member 0",
        "`bias`: nothing in member 3, float32[2] in member 0",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("dicts", "text"),
    [
        ([], "at least one state dict; got none"),
        ({"weight": torch.zeros(2, 3)}, "must be a sequence of state dicts; got one dict"),
        (nn.Linear(3, 2), "got one Linear"),
        ([nn.Linear(3, 2)], "0: Linear"),
        ([{"weight": 3, 5: torch.zeros(1)}], "state dict 0, 'weight': int\n  state dict 0, 5: Tensor"),
        ([{"weight": torch.zeros(2, 3).to_sparse(), "bias": torch.zeros(2)}], "member 0, `weight`.*layout"),
    ],
)
def test_what_is_no_state_dict_is_refused(dicts: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        stack_state_dicts(dicts, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))


def test_the_other_arguments_are_checked() -> None:
    dicts = [nn.Linear(3, 2).state_dict()]
    with pytest.raises(InputError, match=r"must be a flax\.nnx\.Module"):
        stack_state_dicts(dicts, nn.Linear(3, 2), jnp.ones((1, 3)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be called with `example_input`: TypeError"):
        stack_state_dicts(dicts, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 5)))


def test_64_bit_weights_are_never_rounded() -> None:
    dicts = [nn.Linear(3, 2).double().state_dict()]
    with jax.enable_x64(False), pytest.raises(InputError, match="member 0, `weight` is float64"):
        stack_state_dicts(dicts, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), np.ones((1, 3), "float32"))
