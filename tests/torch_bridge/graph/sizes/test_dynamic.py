"""Open sizes besides the batch's: lengths of sequences, sizes of images."""

import copy
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import torch_bridge
from jaxensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError
from jaxensemble.modules.build import skeleton
from jaxensemble.network.json_format import from_json, to_json
from jaxensemble.network.network import Sizes, Slice
from tests.helpers.porting import Fn, randomised
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.sizes.open_axes import OpenAxes, resize_open_axes
from torch_bridge.parity import precision, reference
from torch_bridge.parity.metrics import arrays_by_place, stack_outputs

IMAGE = {0: {2: "height", 3: "width"}}
LENGTH = {0: {1: "length"}}
X = torch.randn(2, 3, 16, 20)
ROWS = torch.randn(2, 6, 8)
IDS = torch.randint(0, 9, (2, 6))


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Residual(nn.Module):
    """A stem, a residual addition, and a head on the mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.norm, self.conv, self.down = nn.BatchNorm2d(8), conv(8, 8), conv(8, 16, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.fc(F.adaptive_avg_pool2d(self.down(x + F.relu(self.conv(x))), 1).flatten(1))


class UNet(nn.Module):
    """`join` has the upsampled map meet the one before it."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.a, self.b, self.up, self.out, self.join = (
            conv(3, 4),
            conv(4, 8),
            nn.ConvTranspose2d(8, 4, 2, 2),
            conv(8, 2),
            join,
        )

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        return self.out(torch.cat([a, self.join(self.up(F.relu(self.b(F.max_pool2d(a, 2)))), a)], 1))


def interpolated(x: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)


def padded(x: Tensor, other: Tensor) -> Tensor:
    rows, columns = other.size(2) - x.size(2), other.size(3) - x.size(3)
    return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


class Causal(nn.Module):
    """Attention with a mask and positions made for the length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 8), nn.Embedding(32, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 9)

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.words(ids) + self.places(torch.arange(t))
        q, k, v = (part.view(n, t, 2, 4).transpose(1, 2) for part in self.qkv(x).split(8, 2))
        weights = (q @ k.transpose(-2, -1) / 2).masked_fill(torch.tril(torch.ones(t, t)) == 0, float("-inf"))
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 8))


class Flash(Causal):
    """A text encoder with PyTorch's own attention, and a table of positions, which ends."""

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.words(ids) + self.places.weight[:t]
        q, k, v = (part.view(n, t, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, 8))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 4), kind(4, 5, batch_first=True, **options)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.layer(self.words(ids))
        return y[:, -1], y.max(1).values


class Held(nn.Module):
    """A linear layer for forwards of any kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)


class Averaged(Held):
    """A mean over what a mask leaves, of a dict of inputs."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["mask"].unsqueeze(-1)
        return (self.fc(batch["x"]) * mask).sum(1) / mask.sum(1).clamp(min=1)


class Crossed(nn.Module):
    """Two inputs with a length each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.attention(q, kv, kv)[0]


class Patches(nn.Module):
    """A vision transformer whose table of positions is resized to the image, or left out."""

    def __init__(self, resized: bool) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 8, 4, 5))
        self.layer, self.resized = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), resized

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        if self.resized:
            x = x + F.interpolate(self.places, size=x.shape[2:], mode="bicubic")
        return self.layer(x.flatten(2).transpose(1, 2)).mean(1)


class Windows(Held):
    """Windows of four by four."""

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = self.fc(x).softmax(1)
        return x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)


class Longer(Held):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * 2 if x.shape[1] > 5 else x).mean(1)


def after_linear(forward: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Fn(forward))


def normalised(x: Tensor) -> Tensor:
    """Running means: sums of earlier values, divided by their number."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)


ANY = Sizes()


def image(least: int = 1, multiple: int = 1) -> dict[str, Sizes]:
    return dict.fromkeys(("height", "width"), Sizes(least, None, multiple))


SEQUENCES: dict[str, tuple[nn.Module, Tensor, Sizes]] = {
    "causal": (Causal(), IDS, Sizes(1, 32)),
    "table": (Flash(), IDS, Sizes(1, 32)),
    "gru": (Recurrent(nn.GRU, bidirectional=True), IDS, ANY),
    "lstm": (Recurrent(nn.LSTM, num_layers=2, dropout=0.5), IDS, ANY),
    "rnn": (Recurrent(nn.RNN, nonlinearity="relu"), IDS, ANY),
    "decided": (Longer(8, 3), ROWS, Sizes(6)),
    "sums": (after_linear(normalised), ROWS, ANY),
    "spectrum": (after_linear(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1)), ROWS, ANY),
    "last": (after_linear(lambda x: x[:, -1] + x[:, :3].sum(1)), ROWS, Sizes(4)),
}

IMAGES: dict[str, tuple[nn.Module, dict[str, Sizes]]] = {
    "residual": (Residual(), image(9)),
    "u-net": (UNet(lambda x, _: x), image(4, 2)),
    "u-net, resized": (UNet(interpolated), image(4)),
    "u-net, padded": (UNet(padded), image(4)),
    "patches": (Patches(False), image(8)),
    "patches, resized": (Patches(True), image(8)),
    "half": (nn.Sequential(conv(3, 2), nn.Upsample(scale_factor=0.5, mode="bilinear")), image(4)),
    "shuffled": (nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 1)), image()),
    "pooled": (nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(24, 2)), image()),
    "ceiling": (nn.Sequential(conv(3, 4), nn.MaxPool2d(3, 2, ceil_mode=True), nn.GroupNorm(2, 4)), image(4)),
    "reflected": (nn.Sequential(nn.ReflectionPad2d(2), conv(3, 2), nn.Upsample(scale_factor=2)), image(3)),
}

Case = tuple[nn.Module, tuple[Any, ...], dict[Any, Any], dict[str, Sizes]]

CASES: dict[str, Case] = {
    "mask": (
        Averaged(4, 3),
        ({"x": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)},),
        {"batch": {"x": {1: "length"}, "mask": {1: "length"}}},
        {"length": ANY},
    ),
    "two lengths": (
        Crossed(),
        (ROWS, torch.randn(2, 9, 8)),
        {"q": {1: "queries"}, "kv": {1: "keys"}},
        {"keys": ANY, "queries": ANY},
    ),
    "one side": (
        nn.Sequential(conv(3, 2), Fn(lambda x: x @ x.transpose(2, 3))),
        (torch.randn(2, 3, 8, 8),),
        {0: {2: "side", 3: "side"}},
        {"side": ANY},
    ),
    "windows": (
        Windows(8, 8),
        (torch.randn(2, 8, 12, 8),),
        {0: {1: "height", 2: "width"}},
        image(8, 4),
    ),
    "dilated": (
        nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(8, 3, 3, dilation=2)),
        (ROWS.transpose(1, 2),),
        {0: {2: "length"}},
        {"length": ANY},
    ),
    "bounded": (Longer(8, 3), (ROWS,), {"x": {1: Dim("length", max=50)}}, {"length": Sizes(6, 50)}),
    **{name: (model, (x,), {0: {1: "length"}}, {"length": sizes}) for name, (model, x, sizes) in SEQUENCES.items()},
    **{name: (model, (X,), IMAGE, sizes) for name, (model, sizes) in IMAGES.items()},
}


def members_of(model: nn.Module) -> list[nn.Module]:
    return [randomised(copy.deepcopy(model), seed=k).eval() for k in range(2)]


def ported(case: str, **options: Any) -> tuple[list[nn.Module], Ensemble, Arguments]:
    """Returns members in float64, their ensemble, and its example."""
    model, inputs, dynamic, _ = CASES[case]
    models, inputs = members_of(model), precision.doubled(Arguments.of(inputs))
    return models, torch_bridge.to_ensemble(models, *inputs, dynamic=dynamic, **options), inputs


def without_ties(inputs: Arguments) -> Arguments:
    """Returns arguments whose repeated entries differ: which of equal ones is the least is decided by rounding."""
    change = lambda leaf: leaf + 0.01 * torch.randn_like(leaf) if leaf.is_floating_point() else leaf  # noqa: E731
    return pytree.tree_map_only(torch.Tensor, change, inputs)


def assert_outputs(models: list[nn.Module], ensemble: Ensemble, inputs: Arguments, sizes: dict[str, int]) -> None:
    resized = without_ties(resize_open_axes(inputs, OpenAxes.of_ensemble(ensemble).names, sizes))
    actual = arrays_by_place(ensemble(*resized.entries))
    for place, theirs in stack_outputs(reference.run_loop(models, resized)).items():
        np.testing.assert_allclose(actual[place], theirs, rtol=0, atol=1e-12, err_msg=f"{place} for {sizes}")


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_outputs_of_other_sizes(case: str) -> None:
    """Ensembles agree with PyTorch for the least sizes, and for others."""
    expected = CASES[case][3]
    with jax.enable_x64(True):
        models, ensemble, inputs = ported(case, check=False)
        assert ensemble.network.sizes == expected
        assert_outputs(models, ensemble, inputs, {name: size.least for name, size in expected.items()})
        assert_outputs(models, ensemble, inputs, {name: 12 + 4 * k for k, name in enumerate(expected)})


SEVERAL: dict[str, tuple[nn.Module, Tensor, dict[Any, Any], dict[str, Sizes], tuple[dict[str, int], ...]]] = {
    "length": (
        nn.Sequential(
            nn.Linear(8, 8),
            Fn(
                lambda x: x * (torch.arange(x.shape[1]) >= x.shape[1] - 2).unsqueeze(1),
                lambda x: torch.where(x > x.shape[1] / 20, x.shape[1], 0.5),
                lambda x: F.layer_norm(x, x.shape[1:]) + F.rms_norm(x, x.shape[1:]),
                lambda x: F.max_pool1d(x.mT, 3, 2, 1, ceil_mode=True),
                lambda x: F.max_pool1d(x.mT, x.shape[1]).squeeze(2) + F.avg_pool1d(x.mT, x.shape[1]).squeeze(2),
                lambda x: torch.einsum("nic,njc,njd->nid", x, x, x),
                lambda x: x[:, : math.ceil(x.shape[1] / 2)],
            ),
        ),
        ROWS,
        LENGTH,
        {"length": Sizes(3)},
        ({"length": 3}, {"length": 4}, {"length": 9}),
    ),
    "image": (
        nn.Sequential(
            conv(3, 4),
            Fn(
                lambda x: x.flatten(2).argmax(-1),
                lambda x: x.flatten(2).argmin(-1, keepdim=True),
                lambda x: F.avg_pool2d(x, x.shape[2:]) * F.max_pool2d(x, kernel_size=x.size()[2:]),
                lambda x: F.layer_norm(x, x.shape[1:]),
                lambda x: F.pixel_unshuffle(x, 2),
                lambda x: F.glu(x, 3),
                lambda x: (
                    F.pad(x, (4, 4, 4, 4)).repeat(1, 1, 2, 2)[:, :, 8:-8, 8:-8] + F.interpolate(x, scale_factor=2)
                ),
            ),
        ),
        X,
        IMAGE,
        image(4, 2),
        ({"height": 4, "width": 10}, {"height": 26, "width": 4}),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_outputs_of_several_operations(case: str) -> None:
    """Networks that once were wrong or refused, each for several sizes."""
    model, x, dynamic, expected, tried = SEVERAL[case]
    with jax.enable_x64(True):
        models, inputs = members_of(model), precision.doubled(Arguments.of((x,)))
        ensemble = torch_bridge.to_ensemble(models, *inputs, dynamic=dynamic, check=False)
        assert ensemble.network.sizes == expected
        for sizes in tried:
            assert_outputs(models, ensemble, inputs, sizes)


class Tables(nn.Module):
    """Sequences that may be as long as tables; a recurrent layer that may run one step."""

    def __init__(self, offset: int = 2) -> None:
        super().__init__()
        self.offset = offset
        self.mask, self.places = nn.Buffer(torch.ones(1, 12, 12).tril()), nn.Parameter(torch.randn(12, 8))
        self.layer, self.words = nn.GRU(8, 8, batch_first=True), nn.Embedding(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = self.layer(x + self.places[:n] + self.words(torch.arange(self.offset, n + self.offset)))[0]
        return (x @ x.mT).masked_fill(self.mask[:, :n, :n] == 0, -1e9).softmax(-1) @ x


def test_sizes_at_the_ends() -> None:
    with jax.enable_x64(True):
        models, inputs = members_of(Tables()), precision.doubled(Arguments.of((ROWS,)))
        ensemble = torch_bridge.to_ensemble(models, *inputs, dynamic=LENGTH, check=False)
        assert ensemble.network.sizes == {"length": Sizes(1, 12)}
        for length in (1, 12):
            assert_outputs(models, ensemble, inputs, {"length": length})
        bounded = torch_bridge.to_ensemble(models, *inputs, dynamic={0: {1: Dim("length", max=9)}}, check=False)
        assert bounded.network.sizes == {"length": Sizes(1, 9)}
        later = torch_bridge.to_ensemble(members_of(Tables(6)), *inputs, dynamic=LENGTH, check=False)
        assert later.network.sizes == {"length": Sizes(1, 8)}


def test_sizes_at_which_a_forward_decides_otherwise_are_left_out() -> None:
    """One that is far off, too; where several are, sizes are multiples, if that leaves more."""
    halved = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Fn(lambda x: x.unflatten(2, (-1, 4)).mean(3)))
    for model, x, dynamic, sizes in (
        (after_linear(lambda x: x * 2 if x.shape[1] == 200 else x), ROWS, LENGTH, Sizes(1, 199)),
        (after_linear(lambda x: x * 2 if x.shape[1] // 3 == 77 else x), ROWS, LENGTH, Sizes(1, 230)),
        (after_linear(lambda x: x * 2 if 3 * x.shape[1] - 1 == 602 else x), ROWS, LENGTH, Sizes(1, 200)),
        (after_linear(lambda x: x * 2 if x.shape[1] in (3, 200) else x), ROWS, LENGTH, Sizes(2, 198, 2)),
        (halved, X, {0: {2: "length"}}, Sizes(16, None, 8)),
    ):
        ensemble = torch_bridge.to_ensemble([model.eval()], (x,), dynamic=dynamic, check=False)
        assert ensemble.network.sizes == {"length": sizes}


def test_sizes_of_one_are_left_out_where_they_are_another_matter() -> None:
    """Sizes are limited if the forward refuses some, or computes something else, although no condition says so."""

    def asserted(x: Tensor) -> Tensor:
        assert x.shape[1] > 1
        return x

    for forward in (asserted, lambda x: x.sum(1) / (x.shape[1] - 1 or 1), lambda x: torch.cov(x[0])):
        ensemble = torch_bridge.to_ensemble([after_linear(forward)], (ROWS,), dynamic=LENGTH, check=False)
        with pytest.raises(InputError, match="length of 1, which must be at least 2"):
            ensemble(np.zeros((2, 1, 8), np.float32))


def test_the_proof_runs_at_two_sizes() -> None:
    """Both proofs run at two sizes, porting's too; the thorough one at the least size."""
    with jax.enable_x64(True):
        models, ensemble, inputs = ported("u-net")
        assert ensemble.proof is not None
        assert "float64, height 18, width 24" in {each.stage for each in ensemble.proof.comparisons}
        report = torch_bridge.check(models, ensemble, *inputs)
    assert report.passed
    assert {"float64, height 18, width 24", "float64, height 4, width 4"} <= {row.stage for row in report.rows}


def test_a_proof_finds_what_is_wrong_for_another_size_only() -> None:
    with jax.enable_x64(True):
        models, ensemble, inputs = ported("last")
        network = ensemble.network
        (slice_,) = [call for call in network.calls if call.target == "[]" and call.args[1] == (Slice(), -1)]
        wrong = dataclasses.replace(slice_, args=(slice_.args[0], (Slice(), 5)))
        network = dataclasses.replace(network, calls=tuple(wrong if call is slice_ else call for call in network.calls))
        planted = dataclasses.replace(ensemble, network=network, graphdef=skeleton(network).graphdef)
        report = torch_bridge.check(models, planted, *inputs, thorough=False)
    assert {row.stage for row in report.rows if not row.passed} == {"float64, length 7"}


class Outgrown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.max_pool2d(x, 2), output_size=x.shape[2:])


def test_what_cannot_stay_open_is_refused_by_name() -> None:
    """The error has the line, if there is one."""
    steps = Fn(lambda x: sum(x[:, k] for k in range(x.shape[1])))
    for model, x, dynamic, text in (
        (nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(1280, 3)), X, IMAGE, r"takes height and width for a fixed"),
        (nn.Sequential(conv(3, 4), nn.LayerNorm([4, 16, 20])), X, IMAGE, r"takes height and width for a fixed number"),
        (Fn(lambda x: x + torch.ones(6, 8)), ROWS, LENGTH, r"length .*\(test_dynamic.py:\d+: .*torch.ones\(6, 8\)"),
        (Fn(lambda x: x * 2 if x.shape[2] == 2 * x.shape[3] else x), X, IMAGE, r"takes height and width .*== 2 \*"),
        (Fn(lambda x: x * 2 if 2 * x.shape[2] == x.shape[3] else x), X, IMAGE, r"takes height and width .*== x"),
        (Fn(lambda x: x * 2 if x.shape[2] - x.shape[3] == 8 else x), X, IMAGE, r"takes height and width .*== 8"),
        (Outgrown(), X, IMAGE, "the padding of the output depends on height and width"),
        (Fn(lambda x: x.squeeze(1)), ROWS, LENGTH, "it would drop a length of one as well"),
        (Fn(lambda x: x + torch.arange(0, 1, 1 / x.shape[1])[:, None]), ROWS, LENGTH, "sizes are equal .* on length"),
        (steps, ROWS, LENGTH, r"takes length for a fixed number.* range\(x.shape"),
        (Fn(lambda x: x.sum(1) if x.shape[1] in (6, 9) else x.mean(1)), ROWS, LENGTH, "takes length"),
        (Fn(lambda x: F.interpolate(x, scale_factor=1 / 3)), X, IMAGE, "depends on height; leave it out of `dynamic`"),
        (Fn(lambda x: torch.func.grad(lambda x: x.sin().sum())(x)), ROWS, LENGTH, "leave length out of `dynamic`"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            torch_bridge.to_flax(model.eval(), (x,), dynamic=dynamic)
        assert re.search(text, " ".join(str(caught.value).split()))


def test_everything_wrong_with_dynamic_is_told_at_once() -> None:
    spec = {
        "mask": {0: "length"},
        "q": {3: "depth", 0: "rows", 1: "not a name"},
        "kv": {1: "batch", 2: "length"},
    }
    with pytest.raises(InputError) as caught:
        torch_bridge.to_ensemble([Crossed()], (ROWS, torch.randn(2, 1, 8)), dynamic=spec)
    assert [line.strip() for line in caught.value.details.splitlines()[1:]] == [
        "'mask': there is no such argument; there are q, kv",
        "axis 3 of q: there are axes 0 to 2",
        "axis 0 of q: it is the batch axis, which is open by itself",
        "axis 1 of q: expected a name, such as 'length'; got 'not a name'",
        "axis 1 of kv: expected a name, such as 'length'; got 'batch'",
    ]
    listed: Any = [1]
    for inputs, wrong, text in (
        ((ROWS, ROWS), listed, r"must name axes by argument, as .*; got \[1\]"),
        ((ROWS, torch.randn(2, 1, 8)), {"kv": {1: "keys"}}, "axis 1 of kv: its size is 1 in the example"),
        ((ROWS, torch.randn(2, 9, 8)), {"q": {1: "n"}, "kv": {1: "n"}}, "axis 1 of kv: n is 9, but 6 for axis 1 of q"),
        ((ROWS, ROWS), {"q": "length"}, "q: expected the names of axes by their numbers; got 'length'"),
        ((ROWS, ROWS), {"q": {1: Dim("n", min=9)}}, "axis 1 of q: n is 6 in the example, which must be at least 9"),
    ):
        with pytest.raises(InputError, match=text):
            torch_bridge.to_flax(Crossed(), inputs, dynamic=wrong)
    with pytest.raises(
        InputError, match=r"batch\['x'\]: .*\n?.*expected some of \['x'\]; got \['y'\]|expected some of"
    ):
        torch_bridge.to_flax(Averaged(4, 3), ({"x": ROWS},), dynamic={"batch": {"y": {1: "length"}}})


def test_calls_are_held_to_the_sizes_that_there_may_be() -> None:
    """Open sizes work after saving and loading, and in each form of a call."""
    models = [Flash().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (IDS,), dynamic={"ids": {1: "length"}}, check=False)
    again = from_json(to_json(ensemble.network))
    assert again == ensemble.network
    assert ensemble(torch.zeros(5, 32, dtype=torch.int64)).shape == (2, 5, 32, 9)
    assert ensemble.each(torch.zeros(2, 5, 3, dtype=torch.int64)).shape == (2, 5, 3, 9)
    for length in (0, 33):
        with pytest.raises(InputError, match=f"`ids`: length of {length}, which must be at least 1, at most 32"):
            ensemble(torch.zeros(5, length, dtype=torch.int64))


def test_training_with_open_sizes() -> None:
    """Dropout of recurrent layers, and a forward that does something else in training."""

    class Noisy(Recurrent):
        def forward(self, ids: Tensor) -> Any:
            last, most = super().forward(ids)
            return (last + torch.randn_like(last) if self.training else last), most

    models = [Noisy(nn.LSTM, num_layers=2, dropout=0.5) for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (IDS,), dynamic=LENGTH, mode="train", check=False)
    longer = torch.zeros(3, 11, dtype=torch.int64)
    first, second = (ensemble(longer, key=jax.random.key(k)) for k in range(2))
    assert first[0].shape == (2, 3, 5)
    assert not np.allclose(first[0], second[0])


def test_channels_last_inputs_and_batches_of_pairs() -> None:
    model = members_of(nn.Sequential(Fn(lambda x: x.view(x.shape[0] // 2, 2, *x.shape[1:]).sum(1)), conv(3, 4)))[0]
    with jax.enable_x64(True):
        module: Any = torch_bridge.to_flax(model, (torch.cat([X, X]).double(),), dynamic=IMAGE, input_layout="NHWC")
        x = torch.randn(6, 3, 5, 7, dtype=torch.float64)
        np.testing.assert_allclose(module(x.permute(0, 2, 3, 1).numpy()), model(x).detach().numpy(), rtol=0, atol=1e-12)


class Even(nn.Module):
    """An image that is padded to even sizes, and cropped again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = conv(1, 2), nn.ConvTranspose2d(2, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % 2, 0, -h % 2))
        return self.up(F.max_pool2d(self.conv(x), 2))[:, :, :h, :w]


def test_images_that_are_padded_to_even_sizes() -> None:
    """Only even sizes are open: for others, the exporter does not know how rows lie in memory."""
    models = members_of(Even())
    with jax.enable_x64(True):
        x = torch.randn(2, 1, 16, 20, dtype=torch.float64)
        ensemble = torch_bridge.to_ensemble(models, (x,), dynamic=IMAGE)
        assert ensemble.network.sizes == image(4, 2)


def test_a_sum_over_all_of_an_image_by_a_divisor_is_no_mean() -> None:
    """It was ported as pooling by the whole image, whatever the divisor."""
    with pytest.raises(UnsupportedError, match="takes height for a fixed number"):
        torch_bridge.to_flax(Fn(lambda x: F.avg_pool2d(x, x.shape[2:], divisor_override=3)), (X,), dynamic=IMAGE)
