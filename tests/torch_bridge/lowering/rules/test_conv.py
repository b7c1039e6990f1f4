"""Convolutions and transposed convolutions, with every option of torch.nn and in every way of writing them."""

from collections.abc import Callable

import jax
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.helpers.porting import Fn, assert_ports, randomised
from torch_bridge.porting.port import convert

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9)),
    "conv1d-wide": (lambda: nn.Conv1d(4, 4, 4, padding="same"), (2, 4, 7)),
    "conv2d-square": (lambda: nn.Conv2d(4, 4, 3), (2, 4, 5, 4)),
    "conv2d-stem": (lambda: nn.Conv2d(3, 5, 7, stride=2, padding=3, bias=False), (2, 3, 12, 9)),
    "conv2d-uneven": (lambda: nn.Conv2d(3, 5, (2, 3), (1, 2), (0, 2), (2, 1)), (2, 3, 7, 6)),
    "conv2d-same-even": (lambda: nn.Conv2d(3, 5, (4, 2), padding="same", dilation=(1, 3)), (2, 3, 7, 6)),
    "conv2d-valid": (lambda: nn.Conv2d(3, 5, 2, padding="valid"), (2, 3, 4, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 12, 3, groups=4, padding=1), (2, 4, 5, 6)),
    "conv2d-pointwise-one-channel": (lambda: nn.Conv2d(1, 1, 1), (2, 1, 5, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 5, 6)),
    "conv2d-replicate-same": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="replicate"), (2, 3, 5, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 4, (2, 3, 4), stride=(1, 2, 1), padding=(1, 0, 2)), (2, 4, 4, 5, 3)),
    "conv-channels-last-weights": (
        lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        (2, 3, 5, 6),
    ),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 5)),
    "transpose1d-groups": (lambda: nn.ConvTranspose1d(4, 6, 4, groups=2, dilation=2), (2, 4, 5)),
    "transpose2d-square": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 3, 5)),
    "transpose2d-kernel-is-stride": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False), (2, 3, 3, 4)),
    "transpose2d-gap": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=3, output_padding=(0, 2)), (2, 3, 3, 4)),
    "transpose2d-cropped": (lambda: nn.ConvTranspose2d(3, 2, (1, 2), stride=2, padding=(1, 2)), (2, 3, 4, 5)),
    "transpose2d-all": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (2, 4, 5, 3),
    ),
    "transpose2d-depthwise": (lambda: nn.ConvTranspose2d(4, 8, (3, 2), groups=4, stride=(1, 2)), (2, 4, 3, 4)),
    "transpose2d-unpadded": (lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, padding=1, groups=2), (2, 4, 5, 6)),
    "transpose2d-one-channel": (lambda: nn.ConvTranspose2d(1, 1, (2, 3)), (2, 1, 3, 4)),
    "transpose2d-one-wide": (lambda: nn.ConvTranspose2d(1, 3, (1, 3), groups=1), (2, 1, 3, 4)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 4, (2, 3, 1), (1, 2, 3), (0, 1, 0), groups=2), (2, 2, 3, 2, 4)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_layers(case: str) -> None:
    factory, shape = CASES[case]
    assert_ports(factory(), torch.randn(shape))


def test_layers_are_those_of_flax() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 2, 2), nn.ConvTranspose2d(4, 2, 3, groups=2))
    network = convert(model, (torch.randn(2, 4, 5, 6),)).network
    assert [layer.type for layer in network.layers] == ["nnx.Conv", "nnx.ConvTranspose", "nnx.Conv"]
    assert [call.target for call in network.calls].count("jnp.transpose") == 2  # in and out, none between


UNBATCHED = {
    "conv1d": (nn.Conv1d(3, 5, 3, padding=1), (3, 6)),
    "conv2d": (nn.Conv2d(3, 5, 3, groups=1, bias=False), (3, 6, 5)),
    "transpose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (4, 3, 5)),
    "transpose3d": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 2, 4)),
}


@pytest.mark.parametrize("case", UNBATCHED)
def test_unbatched(case: str) -> None:
    model, shape = UNBATCHED[case]
    assert_ports(model, torch.randn(shape), batch_axis=None)


class Functional(nn.Module):
    """Weights that belong to no convolution: bare parameters, one used twice, one computed, one constant."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(4, 2, 3, 3))
        self.bias = nn.Parameter(torch.empty(4))
        self.down = nn.Parameter(torch.empty(4, 3, 3, 2))
        self.up = nn.Parameter(torch.empty(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.bias, stride=(2, 1), padding=1, groups=2)
        x = x + F.conv2d(x, self.kernel.tanh(), padding="same", groups=2)
        x = F.conv_transpose2d(x, self.down, stride=2, output_padding=1)
        x = torch.conv2d(x, torch.linspace(-1, 1, 27, dtype=x.dtype).reshape(3, 1, 3, 3), groups=3)
        x = torch.conv_transpose1d(x.flatten(2), self.up.abs(), self.bias, groups=1, dilation=3)
        return torch.convolution(x, self.up, None, [2], [1], [1], True, [1], 1) if x.shape[1] == 3 else x


def test_functional() -> None:
    assert_ports(Functional(), torch.randn(2, 4, 5, 4))


def test_convolution_by_its_general_name() -> None:
    kernel = torch.randn(4, 2, 3, 3, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        x = torch.convolution(x, kernel, None, [1, 2], [1, 1], [1, 1], False, [0, 0], 2)
        return torch.convolution(x, kernel, None, [2, 1], [0, 1], [1, 1], True, [1, 0], 2)

    assert_ports(Fn(forward), torch.randn(2, 4, 5, 6))


def test_kernels_that_the_batch_makes() -> None:
    """Features of kernels, and groups, are as many as the batch has rows."""

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        rows, images = x.shape[0], x.reshape(1, -1, 5, 6)
        kernels = x[:, :, :3, :3].repeat(1, 2, 1, 1)
        down = F.conv2d(images, kernels.reshape(-1, 2, 3, 3), groups=rows)
        up = F.conv_transpose2d(images, kernels.reshape(-1, 2, 3, 3)[: 2 * rows], groups=rows)
        each = F.conv2d(x, x[..., :3, :3])
        joined = F.conv_transpose1d(x[:, 0, 0][None], x[:, :, 0, :3])
        return down.reshape(rows, 2, 3, 4), up.reshape(rows, 2, 7, 8), each, joined.sum() + x

    assert_ports(Fn(forward), torch.randn(3, 2, 5, 6))


class SizesOfOne(nn.Module):
    """Weights with dimensions of size one, broadcast against more dimensions than they have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.scale = nn.Parameter(torch.empty(1, 3, 1))
        self.shift = nn.Parameter(torch.empty(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.conv(x.relu() * self.scale) + self.shift).tanh(), self.shift * 2, x.sum() * self.shift


def test_weights_with_sizes_of_one() -> None:
    assert_ports(SizesOfOne(), torch.randn(2, 3, 5))
    assert_ports(SizesOfOne(), torch.randn(1, 3, 5), batch_axis=None)


class Twice(nn.Module):
    """One layer called twice, and one kernel used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.conv(self.up(self.up(x))))


def test_layer_called_twice_and_kernel_used_both_ways() -> None:
    assert_ports(Twice(), torch.randn(2, 4, 3, 4))


def test_output_size_at_the_call() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(8, 9)) + self.up(x, output_size=(8, 10))[..., :9]

    assert_ports(Up(), torch.randn(2, 3, 3, 4))


def test_flipped_kernels_come_back_bit_for_bit() -> None:
    model = randomised(nn.Sequential(nn.ConvTranspose2d(1, 3, (3, 2)), nn.ConvTranspose2d(3, 6, (1, 3), groups=3)))
    lowered = convert(model, (torch.randn(2, 1, 4, 5, dtype=torch.float64),))
    for key, tensor in model.state_dict().items():
        entry = lowered.weights.by_key[key]
        stored = entry.rearrangement.apply(tensor.numpy())
        assert (entry.rearrangement.invert(stored, entry.shape) == tensor.numpy()).all()


def test_computed_kernel_of_weight_norm() -> None:
    assert_ports(weight_norm(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 5, 6))
    assert_ports(weight_norm(nn.ConvTranspose2d(3, 4, 3), dim=1), torch.randn(2, 3, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_weights_is_kept(dtype: torch.dtype) -> None:
    from torch_bridge.porting.port import to_flax

    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 3, groups=2), nn.Conv1d(2, 3, 3)).to(dtype)
    x = torch.ones(2, 2, 4, dtype=dtype)
    y = to_flax(model, (x,))(jax.numpy.ones((2, 2, 4), str(dtype).removeprefix("torch.")))
    assert str(y.dtype) == str(dtype).removeprefix("torch.")
