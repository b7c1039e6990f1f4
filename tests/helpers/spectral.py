"""Networks that compute with complex numbers: spectral layers, state spaces, rotations, complex weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def complex_parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape, dtype=torch.cfloat))


class FourierOperator1d(nn.Module):
    """A layer of a Fourier neural operator: complex weights for the lowest modes (https://arxiv.org/abs/2010.08895)."""

    def __init__(self, channels: int = 3, modes: int = 4):
        super().__init__()
        self.modes, self.lift = modes, nn.Linear(2, channels)
        self.weights, self.skip = complex_parameter(channels, channels, modes), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, length, 2]
        x = self.lift(x).permute(0, 2, 1)
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], 3, x.size(-1) // 2 + 1, device=x.device, dtype=torch.cfloat)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], self.weights)
        return F.gelu(torch.fft.irfft(out, n=x.size(-1)) + self.skip(x))


class FourierOperator2d(nn.Module):
    """A Fourier layer in two dimensions, for low modes of either sign; weights are complex, or real pairs."""

    def __init__(self, pairs: bool, modes: int = 3):
        super().__init__()
        first, second = (torch.randn(2, 3, modes, modes, dtype=torch.cfloat) for _ in range(2))
        self.pairs, self.modes = pairs, modes
        self.first = nn.Parameter(torch.view_as_real(first).clone() if pairs else first)
        self.second = nn.Parameter(torch.view_as_real(second).clone() if pairs else second)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, height, width]
        first, second, k = self.first, self.second, self.modes
        if self.pairs:
            first, second = torch.view_as_complex(first), torch.view_as_complex(second)
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(x.shape[0], 3, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat)
        out[:, :, :k, :k] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :k, :k], first)
        out[:, :, -k:, :k] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -k:, :k], second)
        return torch.fft.irfft2(out, s=(x.size(-2), x.size(-1)))


class ModReLU(nn.Module):
    """`relu(|z| + b) z / |z|` (https://arxiv.org/abs/1511.06464)."""

    def __init__(self, features: int):
        super().__init__()
        self.bias = nn.Parameter(torch.full((features,), -0.1))

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z.abs() + self.bias) * torch.exp(1j * z.angle())


class ComplexBatchNorm(nn.Module):
    """Whitens the two parts together by the root of their covariance (https://arxiv.org/abs/1705.09792)."""

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.gamma, self.beta = complex_parameter(features), complex_parameter(features)
        self.register_buffer("running_mean", torch.zeros(features, dtype=torch.cfloat))
        self.register_buffer("running_covariance", torch.tensor([1.0, 0.0, 1.0])[:, None].repeat(1, features))

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            mean = z.mean(0)
            real, imag = (z - mean).real, (z - mean).imag
            covariance = torch.stack([real.square().mean(0), (real * imag).mean(0), imag.square().mean(0)])
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(mean, alpha=0.1)
                self.running_covariance.mul_(0.9).add_(covariance, alpha=0.1)
        else:
            mean, covariance = self.running_mean, self.running_covariance
        z = z - mean
        rr, ri, ii = covariance
        rr, ii = rr + 1e-5, ii + 1e-5
        s = (rr * ii - ri * ri).sqrt()
        t = 1 / (s * (rr + ii + 2 * s).sqrt())
        real = (ii + s) * t * z.real - ri * t * z.imag
        imag = (rr + s) * t * z.imag - ri * t * z.real
        return torch.complex(real, imag) * self.gamma + self.beta


class ComplexMLP(nn.Module):
    """Complex layers of `torch.nn`, a ReLU of each part, and outputs that are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5, dtype=torch.cfloat), ComplexBatchNorm(5)
        self.second, self.act = nn.Linear(5, 3, bias=False, dtype=torch.cfloat), ModReLU(3)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(self.first(z))
        return self.act(self.second(torch.complex(F.relu(z.real), F.relu(z.imag))))


class ComplexConvolutions(nn.Module):
    """Complex convolutions forth and back, such as an autoencoder's, and the size of the remaining error."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 4, 3, stride=2, padding=1, dtype=torch.cfloat)
        self.up = nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1, dtype=torch.cfloat)
        self.plane = nn.Conv2d(1, 2, (2, 3), groups=1, bias=False, dtype=torch.cfloat)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:  # [N, 2, 8]
        y = self.up(torch.tanh(self.down(z)))
        return (y - z).abs().square().mean((1, 2)), self.plane(y.unsqueeze(1)).flatten(1)


class RotaryAttention(nn.Module):
    """Queries and keys turned by angles that grow with the position, as products of complex numbers."""

    turns: Tensor

    def __init__(self, features: int = 8, heads: int = 2, length: int = 6):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(features, 3 * features)
        rate = 1.0 / (100.0 ** (torch.arange(0, features // heads, 2).float() / (features // heads)))
        angles = torch.outer(torch.arange(length).float(), rate)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.turns[: x.shape[1], None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:  # [N, length, features]
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        q, k, v = (part.transpose(1, 2) for part in (self.turned(q), self.turned(k), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class StateSpace(nn.Module):
    """S4D: a convolution whose kernel is a sum of exponentials (https://arxiv.org/abs/2206.11893)."""

    def __init__(self, channels: int = 3, states: int = 4):
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(channels) * math.log(10) - 3)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(channels, states, dtype=torch.cfloat)).clone())
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(channels, states)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(states).expand(channels, states).clone())
        self.D = nn.Parameter(torch.randn(channels))

    def forward(self, u: Tensor) -> Tensor:  # [N, channels, length]
        length = u.size(-1)
        dt, C = self.log_dt.exp(), torch.view_as_complex(self.C)
        A = -self.log_A_real.exp() + 1j * self.A_imag
        powers = (A * dt.unsqueeze(-1)).unsqueeze(-1) * torch.arange(length, device=A.device)
        C = C * (torch.exp(A * dt.unsqueeze(-1)) - 1.0) / A
        kernel = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(powers)).real
        spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.D.unsqueeze(-1)


class LinearRecurrence(nn.Module):
    """LRU: a diagonal complex recurrence, here by powers of its eigenvalues (https://arxiv.org/abs/2303.06349)."""

    def __init__(self, features: int = 3, states: int = 4):
        super().__init__()
        self.nu, self.theta = nn.Parameter(torch.randn(states)), nn.Parameter(torch.randn(states))
        self.B, self.C = complex_parameter(states, features), complex_parameter(features, states)

    def forward(self, u: Tensor) -> Tensor:  # [N, length, features]
        eigenvalues = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        gain = (1 - eigenvalues.abs() ** 2).sqrt()
        steps = torch.arange(u.shape[1])
        age = (steps[:, None] - steps).clamp(min=0)
        decay = torch.where((steps[:, None] >= steps)[..., None], eigenvalues ** age[..., None], 0)
        states = torch.einsum("tsn,bsn->btn", decay, u.to(self.B.dtype) @ self.B.mT * gain)
        return (states @ self.C.T).real


class GlobalFilter(nn.Module):
    """GFNet: a product in the plane of frequencies (https://arxiv.org/abs/2107.00645)."""

    def __init__(self, height: int = 5, width: int = 6, channels: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(height, width // 2 + 1, channels, 2) * 0.02)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:  # [N, height, width, channels]
        spectrum = torch.fft.rfft2(self.norm(x).to(torch.float32), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


class AdaptiveFilter(nn.Module):
    """AFNO: small networks for blocks of channels, in each frequency (https://arxiv.org/abs/2111.13587)."""

    def __init__(self, blocks: int = 2, size: int = 2):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 2, blocks, size, size))
        self.biases = nn.Parameter(torch.randn(2, blocks, size))

    def forward(self, x: Tensor) -> Tensor:  # [N, height, width, blocks * size]
        z = torch.fft.rfft2(x.float(), dim=(1, 2), norm="ortho").unflatten(-1, self.biases.shape[1:])
        (a, b), (c, d) = self.weights
        real = torch.einsum("...bi,bio->...bo", z.real, a) - torch.einsum("...bi,bio->...bo", z.imag, b)
        imag = torch.einsum("...bi,bio->...bo", z.imag, c) + torch.einsum("...bi,bio->...bo", z.real, d)
        y = F.softshrink(torch.stack([F.relu(real + self.biases[0]), imag + self.biases[1]], dim=-1), 0.01)
        return x + torch.fft.irfft2(torch.view_as_complex(y).flatten(-2), s=x.shape[1:3], dim=(1, 2), norm="ortho")


class FourierFeatures(nn.Module):
    """Random waves as features, from a table of complex numbers that is a constant."""

    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(2, 4))
        self.out = nn.Linear(8, 3)
        self.phase = torch.polar(torch.ones(4), torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:  # [N, 2]
        z = torch.exp(2j * math.pi * (x @ self.waves)) * self.phase
        return self.out(torch.cat([z.real, z.imag], -1))


class Rotations(nn.Module):
    """RotatE: entities that are complex, relations that turn them (https://arxiv.org/abs/1902.10197)."""

    def __init__(self) -> None:
        super().__init__()
        self.entities, self.relations = complex_parameter(5, 3), nn.Embedding(4, 3)

    def forward(self, triples: Tensor) -> Tensor:  # [N, 3]
        head, relation, tail = triples.unbind(1)
        turn = self.relations(relation)
        turned = self.entities[head] * torch.polar(torch.ones_like(turn), turn)
        return -(turned - self.entities[tail]).abs().sum(-1)


class ComplexAttention(nn.Module):
    """Attention by the real part of Hermitian products, with conjugate transposes."""

    def __init__(self, features: int = 4):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features, bias=False, dtype=torch.cfloat) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:  # [N, length, features]
        q, k, v = self.q(z), self.k(z), self.v(z)
        weights = torch.softmax((q @ k.mH).real / 2, -1)
        return weights.to(v.dtype) @ v


class Denoiser(nn.Module):
    """A mask on a spectrogram: there by short Fourier transforms, and back."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8))
        self.mask = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:  # [N, length]
        z = torch.stft(x, 8, 2, window=self.window, return_complex=True)
        z = z * torch.sigmoid(self.mask(z.abs().mT)).mT
        return torch.istft(z, 8, 2, window=self.window, length=x.shape[-1])
