"""Random PyTorch networks: layers, functions, branches, in-place operations, one to three inputs.

A network is drawn step by step. What a step makes is found by running it, so that shapes need no second account of
what PyTorch does; a step that PyTorch refuses for these shapes is drawn again.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trust import published
from torch_bridge.graph.settings import disable_fast_paths
from torch_bridge.members.finite import has_fractions

T = TypeVar("T")


class Choices(Protocol):
    """A source of random decisions: a seed, or Hypothesis."""

    def pick(self, options: Sequence[T]) -> T:
        """Picks one of several values."""
        ...


class Seeded:
    """Random decisions from a seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


class Function(nn.Module):
    """A function of tensors as a module; its name is that of the step in errors."""

    def __init__(self, name: str, function: Callable[..., Any]):
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)

    def extra_repr(self) -> str:
        return self.name


class Network(nn.Module):
    """Steps, each of which takes some of the earlier values; the first values are the inputs."""

    def __init__(self, steps: Sequence[nn.Module], taken: Sequence[tuple[int, ...]], outputs: Sequence[int]):
        super().__init__()
        self.steps, self.taken, self.outputs = nn.ModuleList(steps), tuple(taken), tuple(outputs)

    def forward(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for step, taken in zip(self.steps, self.taken, strict=True):
            values.append(step(*[values[k] for k in taken]))
        found = [values[k] for k in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Draws members of one random network in evaluation mode, inputs for them, and the names of its steps.

    `batch_axis` is None for one network in four, whose batch is fixed: of one row, or of several.
    """

    models: list[nn.Module]
    inputs: tuple[Tensor, ...]
    steps: list[str]
    batch_axis: int | None = 0


def drawn(choices: Choices, members: int = 2) -> Drawn:
    """Draws a random network of two to ten steps, or more until one has weights.

    The same decisions give the same network, weights and inputs.
    """
    torch.manual_seed(0)
    batch_axis, batch = choices.pick(((0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (None, 1), (None, 3)))
    kinds = choices.pick(_INPUTS)
    inputs = tuple(_input(choices, kind, batch) for kind in kinds)
    values, steps, taken = list(inputs), [], []
    count = choices.pick(range(2, 11))
    with torch.no_grad(), disable_fast_paths():  # their results have another layout
        while len(steps) < count or not any(step.state_dict() for step in steps):
            step, where, value = _step(choices, values, len(inputs))
            steps.append(step)
            taken.append(where)
            values.append(value)
    outputs = [len(values) - 1, *([choices.pick(range(len(inputs), len(values)))] if choices.pick(_SELDOM) else [])]
    network = Network(steps, taken, list(dict.fromkeys(outputs))).eval()
    names = [getattr(step, "name", type(step).__name__) for step in steps]
    return Drawn([_varied(network, seed) for seed in range(members)], inputs, names, batch_axis)


_INPUTS = (("image",), ("image",), ("sequence",), ("vector",), ("ids",), ("image", "vector"), ("sequence", "vector"),
           ("sequence", "sequence"), ("ids", "vector"), ("image", "sequence", "vector"))  # fmt: skip
_SELDOM = (False, False, False, True)
_OFTEN = (True, True, True, False)


def _input(choices: Choices, kind: str, batch: int) -> Tensor:
    match kind:
        case "image":
            return torch.randn(batch, choices.pick((1, 3, 4, 6)), choices.pick((7, 8, 9, 12)), choices.pick((7, 8, 11)))
        case "sequence":
            return torch.randn(batch, choices.pick((3, 5, 6)), choices.pick((4, 6, 8)))
        case "ids":
            return torch.randint(11, (batch, choices.pick((3, 5))))
    return torch.randn(batch, choices.pick((3, 4, 8)))


def _step(choices: Choices, values: list[Tensor], inputs: int) -> tuple[nn.Module, tuple[int, ...], Tensor]:
    """Returns the next step, its values (mostly the last one), and its results."""
    while True:
        first = len(values) - 1 if choices.pick(_OFTEN) else choices.pick(range(len(values)))
        x = values[first]
        kind = "ids" if not x.is_floating_point() else {4: "image", 3: "sequence", 2: "vector"}.get(x.ndim)
        if kind is None:
            continue
        makers = _BY_KIND[kind] + (_OF_ANY if kind != "ids" else [])
        if choices.pick(_SELDOM) and kind != "ids":
            makers = _IN_PLACE if first >= inputs else _OF_TWO
        try:
            made = choices.pick(makers)(choices, x)
        except ValueError:  # for example, groups that do not divide the channels
            continue
        others = [k for k, other in enumerate(values) if other.is_floating_point()]
        where = (first,)
        if isinstance(made, _Two):
            fitting = [k for k in others if made.fits(x, values[k])]
            if not fitting:
                continue
            where, made = (first, choices.pick(fitting)), made.module
        try:
            value = made.eval()(*copy.deepcopy([values[k] for k in where]))  # strides included
        except (RuntimeError, ValueError, IndexError):  # for example, a kernel larger than the image
            continue
        if not isinstance(value, Tensor) or not 0 < value.numel() <= 20_000 or value.shape[:1] != x.shape[:1]:
            continue
        if not value.isfinite().all() or value.abs().max() > 1e4:
            continue
        return made, where, value


def _varied(network: nn.Module, seed: int) -> nn.Module:
    """Returns a copy with new random weights: none is constant, and variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if has_fractions(tensor):
                scale, shift = (torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) for _ in range(2))
                tensor.mul_(0.6 + 0.8 * scale).add_(0.1 * shift)
    return network


Maker = Callable[[Choices, Tensor], Any]


@dataclasses.dataclass(frozen=True)
class _Two:
    """A step of two values; `fits` says which second one goes with a first."""

    module: nn.Module
    fits: Callable[[Tensor, Tensor], bool]


def _activation(choices: Choices, x: Tensor) -> nn.Module:
    return choices.pick(
        (
            nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ELU(0.7), nn.LeakyReLU(0.2),
            nn.Softplus(2.0), nn.Hardswish(), nn.Hardsigmoid(), nn.ReLU6(), nn.Mish(), nn.SELU(), nn.CELU(1.3),
            nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(0.3), nn.Hardtanh(-0.5, 0.8), nn.LogSigmoid(), nn.PReLU(),
            nn.Threshold(0.1, -0.2), nn.Dropout(0.3),
        )
    )  # fmt: skip


def _function(choices: Choices, x: Tensor) -> nn.Module:
    dim = choices.pick(range(1, x.ndim))
    size = x.shape[dim]
    shift = choices.pick((-2, 1, 3))
    named: dict[str, Callable[[Tensor], Any]] = {
        "softmax": lambda x: x.softmax(dim),
        "log_softmax": lambda x: F.log_softmax(x, dim),
        "square": lambda x: x * x - 1,
        "rsqrt": lambda x: (x.abs() + 0.5).rsqrt(),
        "exp": lambda x: x.clamp(max=2).exp(),
        "log1p": lambda x: x.abs().log1p(),
        "sin_cos": lambda x: x.sin() + x.cos(),
        "where": lambda x: torch.where(x > 0.1, x, 0.3 * x - 1),
        "masked_fill": lambda x: x.masked_fill(x < -0.4, 0.25),
        "clamp": lambda x: x.clamp(-0.7, 0.9),
        "pow": lambda x: x.abs().pow(1.5),
        "maximum": lambda x: torch.maximum(x, -0.5 * x),
        "cumsum": lambda x: x.cumsum(dim),
        "flip": lambda x: x.flip(dim),
        "roll": lambda x: x.roll(shift, dim),
        "sort": lambda x: x.sort(dim).values,
        "topk": lambda x: x.topk(min(2, size), dim).values,
        "logsumexp": lambda x: x.logsumexp(dim, keepdim=True),
        "mean": lambda x: x.mean(dim, keepdim=True),
        "spread": lambda x: x.mean(dim, keepdim=True).expand_as(x),
        "amax": lambda x: x.amax(dim, keepdim=True),
        "var": lambda x: x.var(dim, keepdim=True, correction=min(1, size - 1)),
        "std_biased": lambda x: (x.var(dim, keepdim=True, correction=0) + 1e-3).sqrt(),
        "normalize": lambda x: F.normalize(x, dim=dim),
        "norm": lambda x: x.norm(dim=dim, keepdim=True),
        "slice": lambda x: x.narrow(dim, size // 3, size - size // 3),
        "stride": lambda x: x.index_select(dim, torch.arange(0, size, 2)),
        "chunk": lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
        "repeat": lambda x: x.repeat_interleave(2, dim),
        "stack": lambda x: torch.stack([x, -x], dim).flatten(dim, dim + 1),
        "unbind": lambda x: torch.stack(x.unbind(dim)[::-1], dim),
        "prod": lambda x: x.narrow(dim, 0, min(3, size)).prod(dim, keepdim=True),
        "lerp": lambda x: x.lerp(x.tanh(), 0.3),
        "einsum_square": lambda x: torch.einsum("n...d,n...e->n...e", x, x.softmax(-1)),
        "glu": lambda x: F.glu(x, dim),
        "spectrum": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=dim, norm="ortho")).sum(-1),
        "sizes_of_spectrum": lambda x: (torch.fft.fft(x, dim=dim) / size).abs(),
        "delay": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=dim) * 1j, n=size, dim=dim),
        "conjugate": lambda x: torch.fft.ifft(torch.fft.fft(x, dim=dim).conj(), dim=dim).real,
        "turned": lambda x: (torch.polar(torch.ones_like(x), x) * torch.complex(x, x.flip(dim))).imag,
    }  # fmt: skip
    name = choices.pick(sorted(named))
    return Function(name, named[name])


def _conv(choices: Choices, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    groups = choices.pick((1, 1, channels, 2))
    padding: Any = choices.pick((0, 1, 2, (1, 0)))
    return nn.Conv2d(
        channels,
        choices.pick((2, 4, 6)) * (groups if groups == channels else 1),
        choices.pick((1, 2, 3, (3, 2))),
        stride=choices.pick((1, 1, 2, (1, 2))),
        padding=padding,
        dilation=choices.pick((1, 1, 2)),
        groups=groups,
        bias=choices.pick(_OFTEN),
        padding_mode=choices.pick(("zeros", "zeros", "reflect", "replicate", "circular")),
    )


def _transposed(choices: Choices, x: Tensor) -> nn.Module:
    stride = choices.pick((1, 2, (2, 1)))
    return nn.ConvTranspose2d(
        x.shape[1], choices.pick((2, 4)), choices.pick((2, 3)), stride=stride, padding=choices.pick((0, 1)),
        output_padding=choices.pick((0, 0, 1)), groups=choices.pick((1, 1, 2)), bias=choices.pick(_OFTEN),
    )  # fmt: skip


def _image_norm(choices: Choices, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    eps = choices.pick((1e-5, 1e-3))
    return choices.pick(
        (
            nn.BatchNorm2d(channels, eps, momentum=choices.pick((0.1, 0.3, None)), affine=choices.pick(_OFTEN)),
            nn.GroupNorm(choices.pick([g for g in (1, 2, 3, channels) if channels % g == 0]), channels, eps),
            nn.InstanceNorm2d(channels, eps, affine=choices.pick((True, False))),
            nn.LocalResponseNorm(2, alpha=0.1),
            nn.LayerNorm(x.shape[1:], eps),
        )
    )


def _pool(choices: Choices, x: Tensor) -> nn.Module:
    size, padding, ceil = choices.pick((2, 3, (3, 2))), choices.pick((0, 0, 1)), choices.pick((True, False))
    stride = choices.pick((1, 2, 3))
    return choices.pick(
        (
            nn.MaxPool2d(size, stride, padding, ceil_mode=ceil),
            nn.AvgPool2d(size, stride, padding, ceil_mode=ceil, count_include_pad=choices.pick((True, False))),
            nn.LPPool2d(2, size, stride),
            nn.AdaptiveAvgPool2d(choices.pick((1, 3, (2, 4)))),
            nn.AdaptiveMaxPool2d(choices.pick((1, 2))),
        )
    )


def _image_function(choices: Choices, x: Tensor) -> nn.Module:
    channels, align = x.shape[1], choices.pick((True, False))
    scale = choices.pick((2, 1.5, 0.6))
    mode = choices.pick(("constant", "reflect", "replicate", "circular"))
    named: dict[str, Callable[[Tensor], Any]] = {
        "flatten": lambda x: x.flatten(1),
        "pooled": lambda x: x.mean((2, 3)),
        "tokens": lambda x: x.flatten(2).transpose(1, 2),
        "channels_last": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2),
        "rows": lambda x: x.mean(3).transpose(1, 2),
        "bilinear": lambda x: F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=align),
        "bicubic": lambda x: F.interpolate(x, size=(6, 5), mode="bicubic", align_corners=align),
        "nearest": lambda x: F.interpolate(x, scale_factor=scale, mode="nearest"),
        "pad": lambda x: F.pad(x, (1, 2, 0, 1), mode=mode),
        "crop": lambda x: x[:, :, 1:-1, ::2],
        "shuffle": lambda x: F.channel_shuffle(x, 2 if channels % 2 == 0 else 1),
        "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2], 2),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
        "unfold": lambda x: F.unfold(x, 2, stride=2).transpose(1, 2),
        "transpose": lambda x: x.transpose(2, 3),
        "gram": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2) / x[0, 0].numel(),
    }
    name = choices.pick(sorted(named))
    return Function(name, named[name])


def _of_last(choices: Choices, x: Tensor) -> nn.Module:
    features = x.shape[-1]
    return choices.pick(
        (
            nn.Linear(features, choices.pick((2, 4, 6, 8)), bias=choices.pick(_OFTEN)),
            nn.Linear(features, features),
            nn.LayerNorm(features, choices.pick((1e-5, 1e-3)), elementwise_affine=choices.pick(_OFTEN)),
            nn.RMSNorm(features, eps=1e-5),
            Filter(features),
        )
    )


def _published(choices: Choices, x: Tensor) -> nn.Module:
    return choices.pick(published.MAKERS)(x.shape[-1])


class Filter(nn.Module):
    """A product of frequencies and complex weights, along the last dimension."""

    def __init__(self, features: int):
        super().__init__()
        self.weight, self.name = nn.Parameter(torch.randn(features // 2 + 1, dtype=torch.cfloat)), "filter"

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=x.shape[-1])


class First(nn.Module):
    """The outputs of a recurrent layer, without its last state."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.name = layer, type(layer).__name__

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attending(nn.Module):
    """Self-attention, causal or not, with or without the last position, by either of PyTorch's two ways."""

    def __init__(self, features: int, heads: int, causal: bool, padded: bool = False, weights: bool = False):
        super().__init__()
        self.layer, self.name = nn.MultiheadAttention(features, heads, batch_first=True), "attention"
        self.causal, self.padded, self.weights = causal, padded, weights

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        padding = (torch.arange(length) > max(0, length - 2)).expand(x.shape[:2]) if self.padded else None
        return self.layer(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=self.weights)[0]


def _sequence_layer(choices: Choices, x: Tensor) -> nn.Module:
    features = x.shape[2]
    heads = choices.pick([h for h in (1, 2, 4) if features % h == 0])
    options: dict[str, Any] = {
        "batch_first": True,
        "bidirectional": choices.pick((True, False)),
        "num_layers": choices.pick((1, 1, 2)),
        "bias": choices.pick(_OFTEN),
    }
    makers: tuple[Callable[[], nn.Module], ...] = (
        lambda: First(nn.GRU(features, 4, **options)),
        lambda: First(nn.LSTM(features, 4, **options, proj_size=choices.pick((0, 0, 2)))),
        lambda: First(nn.RNN(features, 4, **options, nonlinearity=choices.pick(("tanh", "relu")))),
        lambda: Attending(features, heads, *(choices.pick((True, False)) for _ in range(3))),
        lambda: nn.TransformerEncoderLayer(
            features, heads, 8, activation=choices.pick(("relu", "gelu")), batch_first=True,
            norm_first=choices.pick((True, False)),
        ),
        lambda: nn.Conv1d(x.shape[1], choices.pick((2, 4)), choices.pick((1, 2, 3)), padding=choices.pick((0, 1))),
        lambda: nn.BatchNorm1d(x.shape[1]),
        lambda: nn.AvgPool1d(2, stride=choices.pick((1, 2)), padding=choices.pick((0, 1))),
    )  # fmt: skip
    return choices.pick(makers)()


def _sequence_function(choices: Choices, x: Tensor) -> nn.Module:
    named: dict[str, Callable[[Tensor], Any]] = {
        "last": lambda x: x[:, -1],
        "average": lambda x: x.mean(1),
        "maximum_over_time": lambda x: x.amax(1),
        "flatten": lambda x: x.flatten(1),
        "transpose": lambda x: x.transpose(1, 2),
        "as_image": lambda x: x.unsqueeze(1),
        "attention": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x.flip(1)),
        "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)) / x.shape[2],
        "crossed": lambda x: x[:, :1].expand(-1, x.shape[2], -1).transpose(1, 2) + x[:, -1:],
        "tril": lambda x: x.tril(),
        "gather": lambda x: x.gather(1, x[:, :2].argsort(1)),
        "pool_pairs": lambda x: F.max_pool1d(x, 2),
    }
    name = choices.pick(sorted(named))
    return Function(name, named[name])


def _vector_layer(choices: Choices, x: Tensor) -> nn.Module:
    features = x.shape[1]
    named: dict[str, Callable[[Tensor], Any]] = {
        "as_sequence": lambda x: x.unflatten(1, (-1, 2)),
        "as_column": lambda x: x[:, :, None],
        "outer": lambda x: x[:, :, None] * x[:, None, :4],
        "pairs": lambda x: x[:, None].expand(-1, features, -1).transpose(1, 2) - x[:, None],
    }
    name = choices.pick(sorted(named))
    return choices.pick((nn.BatchNorm1d(features), Function(name, named[name])))


def _of_ids(choices: Choices, x: Tensor) -> nn.Module:
    named: dict[str, Callable[[Tensor], Any]] = {
        "one_hot": lambda x: F.one_hot(x, 11).to(torch.get_default_dtype()),
        "scaled_ids": lambda x: x.to(torch.get_default_dtype()).unsqueeze(-1) / 11,
        "counts": lambda x: (x.unsqueeze(-1) == torch.arange(11)).sum(1).to(torch.get_default_dtype()),
    }
    name = choices.pick(sorted(named))
    size = choices.pick((4, 8))
    return choices.pick((nn.Embedding(11, size), nn.Embedding(11, size, padding_idx=2), Function(name, named[name])))


def _same_shape(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape


def _of_two(choices: Choices, x: Tensor) -> _Two:
    dim = choices.pick(range(1, x.ndim))
    joined = lambda x, y: x.ndim == y.ndim and all(a == b or k == dim for k, (a, b) in enumerate(zip(x.shape, y.shape)))  # noqa: E731, B905
    rank = x.ndim
    named: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], bool]]] = {
        "add": (lambda x, y: x + y, _same_shape),
        "sub": (lambda x, y: x - 0.5 * y, _same_shape),
        "mul": (lambda x, y: x * y.tanh(), _same_shape),
        "div": (lambda x, y: x / (1 + y.square()), _same_shape),
        "minimum": (lambda x, y: torch.minimum(x, y), _same_shape),
        "cat": (lambda x, y: torch.cat([x, y], dim), joined),
        "gate": (
            lambda x, y: x * y.sigmoid().reshape(*y.shape, *[1] * (rank - 2)),
            lambda x, y: y.shape == x.shape[:2],
        ),
        "addcmul": (lambda x, y: torch.addcmul(x, y, y, value=0.3), _same_shape),
        "matmul": (
            lambda x, y: x @ y.transpose(-1, -2),
            lambda x, y: x.ndim == y.ndim > 2 and x.shape[-1] == y.shape[-1],
        ),
    }
    name = choices.pick(sorted(named))
    return _Two(Function(name, named[name][0]), named[name][1])


def _bilinear(choices: Choices, x: Tensor) -> Any:
    return _Two(nn.Bilinear(x.shape[-1], x.shape[-1], 3), _same_shape)


def _in_place(choices: Choices, x: Tensor) -> nn.Module:
    def halves(x: Tensor) -> Tensor:
        x[:, : x.shape[1] // 2] *= 0.5
        return x

    named: dict[str, Callable[[Tensor], Any]] = {
        "relu_": lambda x: F.relu_(x),
        "add_": lambda x: x.add_(0.3),
        "mul_": lambda x: x.mul_(0.7),
        "tanh_": lambda x: x.tanh_(),
        "assign": halves,
        "view_add_": lambda x: x.view(x.shape[0], -1).add_(0.2).view(x.shape) * 1.5,
        "clamp_": lambda x: x.clamp_(-0.9, 1.1),
    }
    name = choices.pick(sorted(named))
    return Function(name, named[name])


_OF_ANY: list[Maker] = [_activation, _function, _of_last, _published]
_OF_TWO: list[Maker] = [*[_of_two] * 5, _bilinear]
_IN_PLACE: list[Maker] = [_in_place, _in_place, *_OF_TWO]
_BY_KIND: dict[str, list[Maker]] = {
    "image": [_conv, _conv, _transposed, _image_norm, _pool, _pool, *[_image_function] * 4],
    "sequence": [_sequence_layer, _sequence_layer, _sequence_function],
    "vector": [_vector_layer],
    "ids": [_of_ids],
}
