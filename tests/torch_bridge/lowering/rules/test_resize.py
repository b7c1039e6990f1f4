"""Operations that change spatial sizes: interpolation, sampling, padding, shuffles, windows."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxensemble import ops
from jaxensemble.errors import UnsupportedError
from jaxensemble.ops.interpolation import antialiased_taps, nearest_indices, taps
from tests.helpers.porting import assert_ports
from torch_bridge.porting.port import convert

Op = Callable[..., Tensor]


class Each(nn.Module):
    """The results of several operations on one input, by name."""

    def __init__(self, **operations: Op):
        super().__init__()
        self.operations = operations

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: operation(x) for name, operation in self.operations.items()}


class OfTwo(nn.Module):
    """One operation on two inputs."""

    def __init__(self, operation: Op):
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.operation(x, y)


def to(size: Any, mode: str, **options: Any) -> Op:
    return nn.Upsample(size, mode=mode, **options)


def by(factor: Any, mode: str, **options: Any) -> Op:
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode, **options)


INTERPOLATION: dict[str, tuple[dict[str, Op], tuple[int, ...]]] = {
    "nearest1d": (
        {
            "double": by(2, "nearest"),
            "size": to(11, "nearest"),
            "factor": by(1.6, "nearest"),
            "recomputed": by(1.6, "nearest", recompute_scale_factor=True),
            "down": by(0.45, "nearest"),
        },
        (2, 3, 7),
    ),
    "nearest2d": (
        {
            "double": nn.UpsamplingNearest2d(scale_factor=2),
            "uneven": by((3, 0.7), "nearest"),
            "size": to((4, 13), "nearest"),
            "one": to((1, 7), "nearest"),
        },
        (2, 3, 5, 6),
    ),
    "nearest-exact": (
        {"size": to((4, 13), "nearest-exact"), "factor": by((1.7, 0.6), "nearest-exact")},
        (2, 3, 5, 6),
    ),
    "nearest1d3d-exact": ({"factor": by(1.5, "nearest-exact")}, (2, 3, 5)),
    "nearest3d": (
        {"size": to((2, 5, 3), "nearest"), "exact": by((1, 2.3, 0.6), "nearest-exact")},
        (2, 3, 2, 4, 5),
    ),
    "linear1d": (
        {
            "size": to(11, "linear"),
            "aligned": to(11, "linear", align_corners=True),
            "factor": by(0.6, "linear"),
            "aligned to one": to(1, "linear", align_corners=True),
        },
        (2, 3, 7),
    ),
    "bilinear": (
        {
            "double": by(2, "bilinear"),
            "aligned": nn.UpsamplingBilinear2d(scale_factor=2.5),
            "factor": by((1.7, 0.6), "bilinear"),
            "recomputed": by(1.7, "bilinear", recompute_scale_factor=True),
        },
        (2, 3, 5, 6),
    ),
    "bicubic": (
        {
            "size": to((9, 4), "bicubic"),
            "aligned": to((9, 4), "bicubic", align_corners=True),
            "factor": by((1.7, 0.6), "bicubic"),
            "same": by(1, "bicubic"),
        },
        (2, 3, 5, 6),
    ),
    "trilinear": (
        {"size": to((4, 3, 6), "trilinear"), "aligned": to((3, 1, 5), "trilinear", align_corners=True)},
        (2, 2, 2, 4, 3),
    ),
    "antialiased": (
        {
            "half": by(0.5, "bilinear", antialias=True),
            "cubic": lambda x: F.interpolate(x, (3, 11), mode="bicubic", antialias=True),
            "factor": by((0.37, 1.3), "bicubic", antialias=True),
            "aligned": lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True, align_corners=True),
        },
        (2, 3, 9, 8),
    ),
    "area": ({"uneven": by((1.5, 0.6), "area")}, (2, 3, 5, 6)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", INTERPOLATION)
def test_interpolation(case: str) -> None:
    operations, shape = INTERPOLATION[case]
    assert_ports(Each(**operations), torch.randn(shape), batches=())


def test_factor_that_leaves_the_size_as_it_is() -> None:
    model = Each(linear=by((1.1, 1), "bilinear"), cubic=by((1.1, 1), "bicubic"))
    # PyTorch's own gradient of the cubic one is that of a copy, which its result is not.
    assert_ports(model, torch.randn(2, 3, 5, 6), gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_takes_the_entries_that_pytorch_takes(mode: str, rank: int, dtype: torch.dtype) -> None:
    ones = (1,) * (rank - 1)
    for before in (*range(1, 25), 33, 63, 127):
        x = torch.arange(before, dtype=dtype).reshape(1, 1, before, *ones)
        sizes: list[tuple[int, float | None]] = [(after, None) for after in (*range(1, 45), 97, 150)]
        sizes += [(int(before * f), f) for f in (0.3, 0.7, 1.1, 1.3, 1.6, 2.01, 2.5, 3.0, 3.7) if int(before * f)]
        for after, factor in sizes:
            options: dict[str, Any] = {"size": (after, *ones)} if factor is None else {"scale_factor": (factor, *ones)}
            expected = F.interpolate(x, mode=mode, **options).flatten().numpy()
            small = rank == 2 and after + 1 <= 128
            exact = mode == "nearest-exact"
            indices = nearest_indices(before, after, factor, exact=exact, dtype=x.numpy().dtype, small_plane=small)
            np.testing.assert_array_equal(indices, expected, f"{before} to {after} by {factor}")


@pytest.mark.thinned
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_interpolation_of_many_sizes(mode: str, antialias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    method = "linear" if mode == "bilinear" else "cubic"
    for before in (1, 2, 3, 5, 8, 13, 30):
        x = torch.randn(1, 1, before, 1, dtype=torch.float64, generator=generator).expand(-1, -1, -1, 2)
        for after in (1, 2, 3, 4, 6, 7, 15, 31, 64):
            for corners in (False, True):
                options: dict[str, Any] = {"mode": mode, "align_corners": corners, "antialias": antialias}
                expected = F.interpolate(x, (after, 2), **options)[0, 0, :, 0].numpy()
                make = antialiased_taps if antialias else taps
                indices, weights = make(before, after, method, corners)
                actual = (x[0, 0, :, 0].numpy()[indices] * weights).sum(1)
                np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12, err_msg=f"{before} to {after}")


def test_antialiased_image_one_pixel_wide_is_refused() -> None:
    model = Each(half=lambda x: F.interpolate(x, (2, 1), mode="bilinear", antialias=True))
    with pytest.raises(UnsupportedError, match="first row"):
        convert(model, (torch.randn(2, 3, 4, 5),))


def test_whole_numbers_are_picked_and_never_mixed() -> None:
    x = torch.randint(0, 255, (2, 3, 4, 5), dtype=torch.uint8)
    assert_ports(Each(size=to((7, 3), "nearest")), x)
    with pytest.raises(UnsupportedError, match="rounded"):
        convert(Each(size=to((7, 3), "bilinear")), (x,))


@pytest.mark.thinned
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample(mode: str, padding_mode: str, align_corners: bool) -> None:
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    model = OfTwo(lambda x, grid: F.grid_sample(x, grid, **options))
    assert_ports(model, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 2) * 1.5, batches=())


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_grid_sample_in_space(padding_mode: str) -> None:
    model = OfTwo(lambda x, grid: F.grid_sample(x, grid, padding_mode=padding_mode, align_corners=False))
    assert_ports(model, torch.randn(2, 3, 2, 5, 4), torch.randn(2, 1, 3, 2, 3) * 1.5, batches=())


def test_grid_sample_far_outside_and_at_the_edges() -> None:
    places = torch.tensor([-1e4, -3.0, -1.0, -0.5, 0.0, 1.0, 3.0, 1e4])
    grid = torch.cartesian_prod(places, places).reshape(1, 8, 8, 2).double()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    with jax.enable_x64(True):
        stored = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
        for corners in (False, True):
            methods: dict[str, Literal["linear", "nearest"]] = {"bilinear": "linear", "nearest": "nearest"}
            for mode, method in methods.items():
                expected = F.grid_sample(x, grid, mode=mode, align_corners=corners)
                actual = ops.grid_sample(stored, jnp.asarray(grid.numpy()), method, align_corners=corners)
                np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
def test_spatial_transformer(align_corners: bool) -> None:
    def forward(x: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, [x.shape[0], 3, 4, 7], align_corners=align_corners)
        return F.grid_sample(x, grid, align_corners=align_corners)

    assert_ports(OfTwo(forward), torch.randn(2, 3, 5, 6), torch.randn(2, 2, 3))


def test_affine_grid() -> None:
    for size, corners in (((4, 7), True), ((1, 5), False)):
        model = OfTwo(lambda x, theta, s=size, c=corners: F.affine_grid(theta, [x.shape[0], 3, *s], align_corners=c))
        assert_ports(model, torch.randn(2, 3, 5), torch.randn(2, 2, 3), gradients=False, batches=(3,))
    model = OfTwo(lambda x, theta: F.affine_grid(theta, [x.shape[0], 3, 2, 3, 4], align_corners=False))
    assert_ports(model, torch.randn(2, 3, 5), torch.randn(2, 3, 4), gradients=False, batches=(3,))


PADDING: dict[str, tuple[dict[str, Op], tuple[int, ...]]] = {
    "1d": (
        {
            "zero": nn.ZeroPad1d((1, 2)),
            "constant": nn.ConstantPad1d((0, 3), -1.5),
            "reflect": nn.ReflectionPad1d((3, 1)),
            "replicate": nn.ReplicationPad1d((0, 9)),
            "circular": nn.CircularPad1d((5, 2)),
        },
        (2, 3, 5),
    ),
    "2d": (
        {
            "zero": nn.ZeroPad2d((1, 2, 3, 0)),
            "constant": nn.ConstantPad2d((1, 0, 2, 3), float("-inf")),
            "reflect": nn.ReflectionPad2d((3, 1, 0, 2)),
            "replicate": nn.ReplicationPad2d((2, 7, 1, 0)),
            "circular": nn.CircularPad2d((1, 2, 4, 0)),
        },
        (2, 3, 4, 5),
    ),
    "3d": (
        {
            "zero": nn.ZeroPad3d(1),
            "constant": nn.ConstantPad3d((1, 0, 2, 3, 0, 1), 0.5),
            "reflect": nn.ReflectionPad3d((2, 1, 0, 2, 1, 1)),
            "replicate": nn.ReplicationPad3d((2, 3, 1, 0, 0, 1)),
            "circular": nn.CircularPad3d((1, 2, 3, 0, 0, 1)),
        },
        (2, 2, 3, 4, 5),
    ),
    "negative": (
        {
            "crop": nn.ZeroPad2d((-1, -2, -1, 0)),
            "both": nn.ConstantPad2d((-1, 2, 3, -2), 2.0),
            "reflect": lambda x: F.pad(x, (-1, 2, 2, -1), mode="reflect"),
            "replicate": lambda x: F.pad(x, (3, -2, -1, 2), mode="replicate"),
            "circular": lambda x: F.pad(x, (-1, -1, 2, 1), mode="circular"),
        },
        (2, 3, 4, 5),
    ),
    "other dimensions": (
        {
            "channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
            "channels of a shortcut": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0),
            "batch": lambda x: F.pad(x, (0, 1, 0, 0, 0, 0, 2, 1)),
            "nothing": lambda x: F.pad(x, (0, 0)),
        },
        (2, 3, 4, 5),
    ),
    "size one": (
        {"grown": nn.ZeroPad2d((1, 1, 0, 2)), "channel": lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))},
        (2, 1, 1, 1),
    ),
    "to size one": ({"cropped": nn.ZeroPad2d((-2, -2, -1, -2))}, (2, 3, 4, 5)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", PADDING)
def test_padding(case: str) -> None:
    operations, shape = PADDING[case]
    assert_ports(Each(**operations), torch.randn(shape), batches=(3,))


def test_padding_between_convolutions_moves_nothing() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReflectionPad2d((1, 2, 0, 1)), nn.Conv2d(4, 4, 3), nn.ZeroPad2d(-1), nn.Conv2d(4, 2, 1)
    )
    assert_ports(model, torch.randn(2, 3, 6, 7))
    targets = [call.target for call in convert(model, (torch.randn(2, 3, 6, 7),)).network.calls]
    assert targets.count("jnp.transpose") == 2


def test_padding_of_other_dtypes() -> None:
    model = Each(zero=lambda x: F.pad(x, (1, 2)), constant=lambda x: F.pad(x, (0, 1), value=1))
    assert_ports(model, torch.randint(0, 9, (2, 3, 4)))
    assert_ports(model, torch.rand(2, 3, 4) > 0.5)


SHUFFLES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pixel": (lambda: nn.PixelShuffle(2), (2, 12, 3, 2)),
    "pixel, convolutions around": (
        lambda: nn.Sequential(nn.Conv2d(3, 18, 1), nn.PixelShuffle(3), nn.Conv2d(2, 4, 3)),
        (2, 3, 3, 2),
    ),
    "pixel, one channel": (lambda: nn.PixelShuffle(2), (2, 4, 3, 2)),
    "pixel, back": (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 2)), (2, 3, 4, 6)),
    "pixel, there and back": (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), (2, 3, 4, 6)),
    "pixel, by one": (lambda: nn.Sequential(nn.PixelShuffle(1), nn.PixelUnshuffle(1)), (2, 3, 4, 6)),
    "channel": (lambda: nn.ChannelShuffle(3), (2, 12, 3, 2)),
    "channel, convolutions around": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.ChannelShuffle(3), nn.Conv2d(6, 4, 1, groups=2)),
        (2, 3, 3, 2),
    ),
    "channel, twice": (lambda: nn.Sequential(nn.ChannelShuffle(2), nn.ChannelShuffle(3)), (2, 12, 3)),
    "pixel of shuffled channels": (lambda: nn.Sequential(nn.ChannelShuffle(3), nn.PixelShuffle(2)), (2, 12, 3, 2)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", SHUFFLES)
def test_shuffles(case: str) -> None:
    factory, shape = SHUFFLES[case]
    assert_ports(factory(), torch.randn(shape))


@pytest.mark.parametrize("shape", [(12, 3, 2), (2, 5, 12, 3, 2)])
def test_pixel_shuffle_of_any_rank(shape: tuple[int, ...]) -> None:
    assert_ports(nn.PixelShuffle(2), torch.randn(shape), batch_axis=None)
    assert_ports(nn.PixelUnshuffle(2), torch.randn(*shape[:-2], 4, 6), batch_axis=None)


WINDOWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unfold": (lambda: nn.Unfold((2, 3)), (2, 3, 5, 6)),
    "unfold, every option": (lambda: nn.Unfold((2, 3), (2, 1), (1, 0), (1, 2)), (2, 3, 5, 6)),
    "unfold to one": (lambda: nn.Unfold((5, 6)), (2, 1, 5, 6)),
    "patches embedded": (lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Conv1d(12, 4, 1)), (2, 3, 4, 6)),
    "fold": (lambda: nn.Fold((4, 5), (2, 3)), (2, 18, 9)),
    "fold, every option": (lambda: nn.Fold((5, 6), (2, 3), (2, 1), (1, 0), (1, 2)), (2, 18, 10)),
    "there and back": (lambda: nn.Sequential(nn.Unfold(3, padding=1), nn.Fold((4, 5), 3, padding=1)), (2, 2, 4, 5)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case: str) -> None:
    factory, shape = WINDOWS[case]
    assert_ports(factory(), torch.randn(shape))


def test_windows_unbatched() -> None:
    assert_ports(nn.Unfold(2, padding=1), torch.randn(3, 4, 5), batch_axis=None)
    assert_ports(nn.Fold((4, 5), (2, 3)), torch.randn(18, 9), batch_axis=None)


def test_members_as_a_leading_axis() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 2, 5, 6, 3))

    def everything(x: jax.Array) -> list[jax.Array]:
        columns = ops.patches(x, (2, 3), strides=(1, 2))
        return [
            columns,
            ops.overlap_add(columns, (5, 6), strides=(1, 2)),
            ops.resize(x, (7, 12)),
            ops.resize(x, (7, 4), "cubic"),
        ]

    mapped = jax.jit(jax.vmap(everything))(x)
    for together, mapped_over in zip(jax.jit(everything)(x), mapped, strict=True):
        np.testing.assert_allclose(together, mapped_over, rtol=1e-6, atol=1e-6)
