"""Ensembles of twins written by hand with `flax.nnx` and `flax.linen`, channels-last, compared with PyTorch."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, InputError, StateError
from tests.helpers.porting import randomised

pytestmark = pytest.mark.usefixtures("x64")


class Block(nn.Module):
    """Every kind of layer that is supported; an image of 4 x 6 pixels in, one of 9 x 13 and numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.group, self.act = nn.GroupNorm(2, 4, eps=1e-6), nn.PReLU()
        self.up, self.up2 = nn.ConvTranspose2d(4, 4, 3, stride=2), nn.ConvTranspose2d(4, 4, 3, stride=2)
        self.words, self.drop = nn.Embedding(7, 5), nn.Dropout(0.5)
        self.fc, self.norm, self.out = nn.Linear(4 * 4 * 6 + 5, 6), nn.LayerNorm(6, eps=1e-6), nn.Linear(6, 4)

    def forward(self, image: Tensor, word: Tensor) -> Any:
        x = self.act(self.bn(self.conv(image)))
        joined = torch.cat([x.flatten(1), self.words(word)], 1)
        return self.group(self.up(x) + self.up2(x)), self.out(self.drop(self.norm(self.fc(joined))))


class LinenHead(linen.Module):
    @linen.compact
    def __call__(self, x: Any, training: bool) -> Any:
        x = linen.LayerNorm(name="norm", use_fast_variance=False)(linen.Dense(6, name="fc")(x))
        x = linen.Dropout(0.5, deterministic=not training)(x).reshape(-1, 2, 3)
        return linen.DenseGeneral(4, axis=(-2, -1), name="out")(x)


class LinenBlock(linen.Module):
    training: bool = False

    @linen.compact
    def __call__(self, image: Any, word: Any) -> Any:
        x = linen.Conv(4, (3, 3), feature_group_count=2, name="conv")(image)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-5)(x)
        x = linen.PReLU(name="act")(x)
        up = linen.ConvTranspose(4, (3, 3), (2, 2), padding="VALID", name="up")(x)
        up += linen.ConvTranspose(4, (3, 3), (2, 2), padding="VALID", transpose_kernel=True, name="up2")(x)
        joined = jnp.concatenate([x.reshape(x.shape[0], -1), linen.Embed(7, 5, name="words")(word)], 1)
        up = linen.GroupNorm(2, name="group", use_fast_variance=False)(up)
        return up, LinenHead(name="head")(joined, self.training)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv, self.bn = nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.group, self.act = nnx.GroupNorm(4, num_groups=2, use_fast_variance=False, rngs=rngs), nnx.PReLU()
        self.up, self.up2 = (nnx.ConvTranspose(4, 4, (3, 3), (2, 2), padding="VALID", rngs=rngs) for _ in range(2))
        self.words, self.drop = nnx.Embed(7, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.fc, self.norm = nnx.Linear(4 * 4 * 6 + 5, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.out = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, image: Any, word: Any) -> Any:
        x = self.act(self.bn(self.conv(image)))
        joined = jnp.concatenate([x.reshape(x.shape[0], -1), self.words(word)], 1)
        return self.group(self.up(x) + self.up2(x)), self.out(self.drop(self.norm(self.fc(joined))))


class Within(nnx.Module):
    """A module of `flax.linen` within one of `flax.nnx`."""

    def __init__(self, linen_module: Any, *example: Any) -> None:
        self.inner = nnx.bridge.ToNNX(linen_module, rngs=nnx.Rngs(0)).lazy_init(*example)

    def __call__(self, image: Any, word: Any) -> Any:
        return self.inner(image, word)


IMAGE, WORD = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.tensor([1, 5, 0])
LAST = (IMAGE.movedim(1, -1).numpy(), WORD.numpy())
LINEN = {"bn": "BatchNorm_0", "fc": "head.fc", "norm": "head.norm", "out": "head.out"}


def bridged(module: linen.Module) -> Any:
    return nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(*LAST)


TWINS: dict[str, tuple[Callable[[], nnx.Module], dict[str, str]]] = {
    "nnx": (lambda: NnxBlock(nnx.Rngs(0)), {}),
    "linen": (lambda: bridged(LinenBlock()), LINEN),
    "linen within nnx": (
        lambda: Within(LinenBlock(), *LAST),
        {name: f"inner.{LINEN.get(name, name)}" for name, layer in Block().named_children() if layer.state_dict()},
    ),
}


def members() -> list[nn.Module]:
    return [randomised(Block(), seed).eval() for seed in range(2)]


def ensemble_of(models: list[nn.Module], twin: nnx.Module, names: dict[str, str]) -> Ensemble:
    dicts = [model.state_dict() for model in models]
    twin.eval()
    graphdef: Any = nnx.graphdef(twin)
    return Ensemble(graphdef, *torch_bridge.stack_state_dicts(dicts, twin, LAST, names=names))


@pytest.mark.thinned
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_compared_with_pytorch(name: str) -> None:
    twin, names = TWINS[name]
    models = members()
    ensemble = ensemble_of(models, twin(), names)
    layouts: Any = {"input_layout": "NHWC", "output_layout": "NHWC"}
    report = torch_bridge.check(models, ensemble, (IMAGE, WORD), thorough=name == "nnx", **layouts)
    assert report.passed, report
    if name == "linen":
        assert not torch_bridge.check(models[::-1], ensemble, (IMAGE, WORD), thorough=False, **layouts).passed
        assert not torch_bridge.check(models, ensemble, (IMAGE, WORD), thorough=False, input_layout="NHWC").passed


def test_layouts_are_checked() -> None:
    models, twin = members(), NnxBlock(nnx.Rngs(0))
    ensemble = ensemble_of(models, twin, {})
    with pytest.raises(InputError, match=r"(?s)NnxBlock cannot be called with .*pass input_layout='NHWC'") as raised:
        torch_bridge.check(models, ensemble, (IMAGE, WORD))
    assert isinstance(raised.value.__cause__, InputError) and raised.value.__cause__.details in raised.value.details
    with pytest.raises(InputError, match=r"`inputs\[1\]` must be an array") as raised:
        torch_bridge.check(models, ensemble, (IMAGE, "a word"))
    assert "NHWC" not in str(raised.value)
    with pytest.raises(InputError, match="must be one of 'torch', 'NHWC'; got 'NCHW' and 'torch'"):
        torch_bridge.check(models, ensemble, (IMAGE, WORD), input_layout="NCHW")
    lines = [nn.Linear(3, 2)] * 2
    ported = torch_bridge.to_ensemble(lines, (torch.ones(1, 3),), check=False)
    with pytest.raises(InputError, match="ported with input_layout='torch'; got 'NHWC' and 'torch'"):
        torch_bridge.check(lines, ported, (torch.ones(1, 3),), input_layout="NHWC")
    with pytest.raises(InputError, match="PyTorch itself cannot run Linear") as raised:
        torch_bridge.check(lines, Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(0))] * 2), (torch.ones(1, 5),))
    assert "NHWC" not in str(raised.value)


def test_training_that_cannot_be_compared_is_no_pass() -> None:
    lines = [nn.Linear(3, 2) for _ in range(2)]
    twins = Ensemble.from_modules([torch_bridge.to_flax(line, (torch.ones(1, 3),)) for line in lines])
    with pytest.raises(InputError, match="`train=True` is for ensembles that were ported"):
        torch_bridge.check(lines, twins, (torch.ones(4, 3),), train=True)
    for batch_axis in (None, (None,)):
        fixed = torch_bridge.to_ensemble(lines, (torch.ones(4, 3),), batch_axis=batch_axis, check=False)
        with pytest.raises(InputError, match=r"`train=True` compares training by .* without a batch axis"):
            torch_bridge.check(lines, fixed, (torch.ones(4, 3),), train=True)


def test_a_twin_that_draws_at_every_call_is_not_compared() -> None:
    models = members()
    ensemble = ensemble_of(models, bridged(LinenBlock(training=True)), LINEN)
    report = torch_bridge.check(models, ensemble, (IMAGE, WORD), input_layout="NHWC")
    assert not report.passed and any("they are random" in note for note in report.notes)


def test_modules_of_linen_are_taken_as_nnx_ones_with_arrays() -> None:
    dicts = [nn.Linear(3, 2).double().state_dict()]
    x = np.ones((1, 3))
    text = "give it as nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(example_input)"
    with pytest.raises(InputError, match=re.escape(text)):
        torch_bridge.stack_state_dicts(dicts, linen.Dense(2), x)  # type: ignore[arg-type]
    bare: Any = nnx.bridge.ToNNX(linen.Dense(2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=re.escape("has arrays after .lazy_init(example_input)")):
        torch_bridge.stack_state_dicts(dicts, bare, x)
    params, _ = torch_bridge.stack_state_dicts(dicts, bare.lazy_init(x), x)
    np.testing.assert_array_equal(params["kernel"][0], dicts[0]["weight"].T)
    over: Any = nnx.bridge.ToNNX(linen.DenseGeneral(2, batch_dims=(0,), axis=(1,)), rngs=nnx.Rngs(0)).lazy_init(x)
    with pytest.raises(StateError, match="a DenseGeneral with batch axes, or with its axes out of order"):
        torch_bridge.stack_state_dicts(dicts, over, x)
