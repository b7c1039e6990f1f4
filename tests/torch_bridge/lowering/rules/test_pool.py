"""Pooling of every rank with every option, in every way of writing it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from jaxensemble import ops
from jaxensemble.errors import UnsupportedError
from tests.helpers.porting import assert_ports
from torch_bridge.graph.sizes.open_axes import OpenAxes
from torch_bridge.porting.port import convert

Op = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


class Each(nn.Module):
    """The results of several operations on one input, by name."""

    def __init__(self, **operations: Op):
        super().__init__()
        self.operations = operations

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        return {name: operation(x) for name, operation in self.operations.items()}


CASES: dict[str, tuple[dict[str, Op], tuple[int, ...]]] = {
    "max1d": (
        {
            "plain": nn.MaxPool1d(2),
            "overlapping": nn.MaxPool1d(3, 1, 1),
            "dilated": nn.MaxPool1d(2, 3, 1, dilation=3),
            "indices": nn.MaxPool1d(3, 2, 1, ceil_mode=True, return_indices=True),
        },
        (2, 3, 8),
    ),
    "max2d": (
        {
            "plain": nn.MaxPool2d(2),
            "stem": nn.MaxPool2d(3, 2, 1),
            "uneven": nn.MaxPool2d((2, 3), (1, 2), (1, 0)),
            "dilated": nn.MaxPool2d(2, 2, 1, dilation=(1, 2)),
        },
        (2, 3, 7, 6),
    ),
    "max2d-ceil": (
        {
            "right pad": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            "drops a window": nn.MaxPool2d(1, 2, 0, ceil_mode=True),
            "keeps a window": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
            "dilated": nn.MaxPool2d(2, 2, 1, dilation=2, ceil_mode=True),
        },
        (2, 3, 6, 7),
    ),
    "max2d-indices": (
        {
            "plain": nn.MaxPool2d(2, return_indices=True),
            "dilated": nn.MaxPool2d((2, 3), 2, 1, dilation=(2, 1), return_indices=True),
            "ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True),
            "values only": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        },
        (2, 3, 7, 5),
    ),
    "max3d": (
        {
            "plain": nn.MaxPool3d(2),
            "ceil": nn.MaxPool3d((1, 2, 3), 2, (0, 1, 1), ceil_mode=True),
            "dilated": nn.MaxPool3d(2, 1, dilation=2),
            "indices": nn.MaxPool3d((2, 1, 3), return_indices=True),
        },
        (2, 3, 4, 5, 6),
    ),
    "avg1d": (
        {
            "plain": nn.AvgPool1d(2),
            "padded": nn.AvgPool1d(3, 2, 1),
            "uncounted": nn.AvgPool1d(3, 2, 1, count_include_pad=False),
            "ceil": nn.AvgPool1d(3, 2, 1, ceil_mode=True),
        },
        (2, 3, 8),
    ),
    "avg2d": (
        {
            "plain": nn.AvgPool2d((2, 3)),
            "padded": nn.AvgPool2d(3, 2, (1, 0)),
            "uncounted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            "divisor": nn.AvgPool2d(2, divisor_override=3),
        },
        (2, 3, 7, 6),
    ),
    "avg2d-ceil": (
        {
            "plain": nn.AvgPool2d(3, 2, ceil_mode=True),
            "padded": nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True),
            "uncounted": nn.AvgPool2d((2, 3), 3, 1, ceil_mode=True, count_include_pad=False),
            "divisor": nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2),
        },
        (2, 3, 6, 8),
    ),
    "avg3d": (
        {
            "plain": nn.AvgPool3d(2),
            "ceil": nn.AvgPool3d((1, 3, 2), 2, (0, 1, 1), ceil_mode=True),
            "uncounted": nn.AvgPool3d(2, 2, 1, count_include_pad=False),
            "divisor": nn.AvgPool3d((2, 1, 3), divisor_override=5),
        },
        (2, 3, 4, 5, 6),
    ),
    "adaptive-avg1d": ({"even": nn.AdaptiveAvgPool1d(4), "uneven": nn.AdaptiveAvgPool1d(5)}, (2, 3, 8)),
    "adaptive-avg2d": (
        {
            "one": nn.AdaptiveAvgPool2d(1),
            "one, flat": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
            "same": nn.AdaptiveAvgPool2d((7, 6)),
            "uneven": nn.AdaptiveAvgPool2d((5, 4)),
            "kept": nn.AdaptiveAvgPool2d((None, 3)),  # type: ignore[arg-type]
            "more": nn.AdaptiveAvgPool2d((9, 1)),
        },
        (2, 3, 7, 6),
    ),
    "adaptive-avg3d": ({"one": nn.AdaptiveAvgPool3d(1), "uneven": nn.AdaptiveAvgPool3d((2, 3, 5))}, (2, 3, 3, 4, 6)),
    "adaptive-max1d": (
        {"uneven": nn.AdaptiveMaxPool1d(5), "indices": nn.AdaptiveMaxPool1d(4, return_indices=True)},
        (2, 3, 8),
    ),
    "adaptive-max2d": (
        {
            "one": nn.AdaptiveMaxPool2d(1),
            "even": nn.AdaptiveMaxPool2d((7, 2)),
            "uneven": nn.AdaptiveMaxPool2d((5, None)),  # type: ignore[arg-type]
            "indices": nn.AdaptiveMaxPool2d((5, 4), return_indices=True),
            "even indices": nn.AdaptiveMaxPool2d((1, 3), return_indices=True),
        },
        (2, 3, 7, 6),
    ),
    "adaptive-max3d": (
        {
            "uneven": nn.AdaptiveMaxPool3d((2, 3, 4)),
            "indices": nn.AdaptiveMaxPool3d((2, 3, 5), return_indices=True),
        },
        (2, 3, 3, 4, 6),
    ),
    "lp": (
        {
            "2": nn.LPPool2d(2, 2),
            "ceil": nn.LPPool2d(3, (2, 3), 2, ceil_mode=True),
        },
        (2, 3, 5, 6),
    ),
    "lp1d": ({"1.5": lambda x: F.lp_pool1d(x.abs() + 0.5, 1.5, 3, 2)}, (2, 3, 8)),
    "lp3d": ({"2": nn.LPPool3d(2, 2)}, (2, 3, 2, 4, 5)),
    "unpool": (
        {
            "plain": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
            "size": lambda x: nn.MaxUnpool2d(2)(*F.max_pool2d(x, 2, return_indices=True), output_size=(5, 7)),
            "overlapping": lambda x: F.max_unpool2d(
                *F.max_pool2d(x, 3, 2, 1, return_indices=True), [3, 3], [2, 2], [1, 1], (4, 6)
            ),
        },
        (2, 3, 4, 6),
    ),
    "unpool1d": ({"plain": lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), [2])}, (2, 3, 6)),
    "unpool3d": (
        {"plain": lambda x: F.max_unpool3d(*F.max_pool3d(x, (2, 1, 2), return_indices=True), (2, 1, 2))},
        (2, 3, 4, 3, 6),
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_pooling(case: str) -> None:
    operations, shape = CASES[case]
    assert_ports(
        Each(**operations), torch.randn(shape) - 2, batches=(1,)
    )  # nearly all negative: zeros from padding would win


def test_gradient_goes_to_the_first_of_equal_entries() -> None:
    model = Each(
        plain=nn.MaxPool2d(3, 2, 1),
        dilated=nn.MaxPool2d(2, 2, dilation=2),
        adaptive=nn.AdaptiveMaxPool2d((3, 4)),
        one=nn.AdaptiveMaxPool2d(1),
        relu=lambda x: F.max_pool2d(F.relu(x), 2, ceil_mode=True),
        indices=nn.MaxPool2d(2, return_indices=True),
    )
    assert_ports(model, torch.randint(-1, 2, (2, 3, 7, 6)).float())


def test_unbatched() -> None:
    model = Each(
        max=nn.MaxPool2d(3, 2, 1),
        ceil=nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True),
        avg=nn.AvgPool2d(3, 2, 1),
        adaptive=nn.AdaptiveAvgPool2d((5, 1)),
        one=nn.AdaptiveAvgPool2d(1),
        adaptive_max=nn.AdaptiveMaxPool2d((5, 3)),
    )
    assert_ports(model, torch.randn(3, 7, 6), batch_axis=None)


def test_batch_fixed_to_one() -> None:
    model = Each(lp=nn.LPPool2d(2, 2), max=lambda x: F.max_pool2d(F.relu(x), 2).tanh(), one=nn.AdaptiveAvgPool2d(1))
    assert_ports(model, torch.randn(1, 3, 5, 6), batch_axis=None)


def test_one_channel_and_one_pixel() -> None:
    model = Each(
        max=nn.MaxPool2d((5, 1)),
        avg=nn.AvgPool2d((5, 1)),
        adaptive=nn.AdaptiveAvgPool2d((5, 1)),
        one=lambda x: nn.AdaptiveAvgPool2d(1)(x) + x,
    )
    assert_ports(model, torch.randn(2, 1, 5, 1))


def test_not_a_number_and_infinity() -> None:
    x = torch.randn(2, 3, 6, 7)
    x[0, 0, 2, 3] = x[0, 0, 3, 3] = float("nan")
    x[1, 1, 4, :], x[1, 2] = float("inf"), float("-inf")
    model = Each(
        plain=nn.MaxPool2d(2),
        padded=nn.MaxPool2d(3, 2, 1, return_indices=True),
        avg=nn.AvgPool2d(2),
        uneven=nn.AdaptiveAvgPool2d((4, 5)),
        uneven_max=nn.AdaptiveMaxPool2d((4, 5)),
    )
    assert_ports(model, x, gradients=False)


def test_whole_numbers() -> None:
    model = Each(plain=nn.MaxPool2d(2, padding=1), indices=nn.MaxPool2d(3, ceil_mode=True, return_indices=True))
    assert_ports(model, torch.randint(-9, 0, (2, 3, 5, 6)))
    with pytest.raises(UnsupportedError, match="rounded"):
        convert(nn.AvgPool2d(2), (torch.ones(2, 3, 4, 4, dtype=torch.int64),))


def test_no_transposes_between() -> None:
    model = nn.Sequential(
        nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    targets = [call.target for call in convert(model, (torch.randn(2, 3, 9, 8),)).network.calls]
    assert targets == ["jnp.transpose", "nnx.max_pool", "nnx.avg_pool", "ops.max_pool", "jnp.mean"]


def test_random_windows_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"fractional_max_pool2d|aten\.rand"):
        convert(nn.FractionalMaxPool2d(2, output_size=3), (torch.randn(2, 3, 5, 6),))
    samples = torch.rand(2, 3, 2)
    model = Each(given=lambda x: F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=samples))
    with pytest.raises(UnsupportedError, match="at random"):
        convert(model, (torch.randn(2, 3, 5, 6),), opened=OpenAxes(None))


def test_float32_stays_float32_where_float64_is_allowed() -> None:
    x = jnp.asarray(np.ones((2, 5, 4, 3), "float32"))
    with jax.enable_x64(True):
        for y in (
            ops.avg_pool(x, (2, 2), 2, 1, count_include_pad=False),
            ops.adaptive_avg_pool(x, (3, 3)),
            ops.max_pool(x, (2, 2), 2, dilation=2),
            ops.adaptive_max_pool(x, (3, 3)),
        ):
            assert y.dtype == jnp.float32


def test_members_as_a_leading_axis() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 2, 5, 6, 3))

    def everything(x: jax.Array) -> list[jax.Array]:
        values, indices = ops.max_pool_with_indices(x, (2, 3), 2, 1)
        return [
            values,
            ops.max_pool(x, (2, 2), 2, dilation=2),
            ops.max_unpool(values, indices, (5, 6)),
            ops.avg_pool(x, (3, 2), 2, ceil_mode=True),
            ops.adaptive_avg_pool(x, (3, 4)),
            *ops.adaptive_max_pool_with_indices(x, (3, 4)),
        ]

    mapped = jax.jit(jax.vmap(everything))(x)
    for together, mapped_over in zip(jax.jit(everything)(x), mapped, strict=True):
        np.testing.assert_array_equal(together, mapped_over)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(2), nn.MaxPool2d(2)])
def test_positions_that_nobody_reads_are_not_computed(pool: nn.Module) -> None:
    """PyTorch's own MaxPool1d computes them wherever a gradient is possible, and drops them."""
    layer: type[nn.Module] = nn.Conv2d if isinstance(pool, nn.MaxPool2d) else nn.Conv1d
    model = nn.Sequential(layer(2, 3, 1), pool).eval()
    x = torch.randn(4, 2, 8, 8)[..., 0, :] if layer is nn.Conv1d else torch.randn(4, 2, 8, 8)
    ensemble = torch_bridge.to_ensemble([model], (x,), check=False)
    assert "with_indices" not in ensemble.source()
    assert ensemble(x[:0].numpy()).shape == (1, 0, *model(x).shape[1:])
    np.testing.assert_allclose(ensemble.padded()(x[:3].numpy())[0], model(x[:3]).detach(), rtol=1e-5, atol=1e-6)
