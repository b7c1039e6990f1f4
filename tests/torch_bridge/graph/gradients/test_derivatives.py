"""Derivatives inside a forward: physics-informed networks, energies and forces, scores, penalties, inner steps."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torch_bridge
from jaxensemble.errors import InputError, UnsupportedError
from tests.helpers.porting import assert_close, compiled
from torch_bridge.graph.forward import call_model
from torch_bridge.parity import gradients, precision
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.inputs import resize_inputs


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]


class Net(nn.Module):
    def __init__(self, inputs: int = 3, outputs: int = 1, activation: type[nn.Module] = nn.Tanh):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(inputs, 5), activation(), nn.Linear(5, outputs))


class Heat(Net):
    """Residual of u_t = u_xx + u_yy, by `torch.autograd.grad` on coordinates."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_(True)
        u = self.f(x)
        du = derivative(u, x)
        second = [derivative(du[:, k : k + 1], x)[:, k : k + 1] for k in (1, 2)]
        return u, du[:, :1] - second[0] - second[1]


class Burgers(Net):
    """Split coordinates, each with a gradient of its own."""

    def forward(self, xt: Tensor) -> Tensor:
        x, t, nu = (xt[:, k : k + 1].clone().requires_grad_() for k in range(3))
        u = self.f(torch.cat([x, t, nu], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        return u_t + u * u_x - nu * derivative(u_x, x)


class Hamiltonian(Net):
    """dq/dt = dH/dp, dp/dt = -dH/dq, and a step of leapfrog."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy = lambda z: self.f(torch.cat([z, z.sum(-1, keepdim=True)], -1)).squeeze(-1)  # noqa: E731
        dq, dp = vmap(grad(energy))(x[:, :2]).chunk(2, 1)
        with torch.enable_grad():
            z = x[:, :2].detach().requires_grad_()
            slope = torch.autograd.grad(energy(z).sum(), z, create_graph=True)[0]
        return torch.cat([dp, -dq], 1), x[:, :2] + 0.1 * slope.flip(1)


class Lagrangian(Net):
    """Accelerations from the Euler-Lagrange equation, with a Hessian in velocities."""

    def __init__(self) -> None:
        super().__init__(4)

    def acceleration(self, q: Tensor, v: Tensor) -> Tensor:
        lagrangian = lambda q, v: self.f(torch.cat([q, v])).squeeze() + (v**2).sum()  # noqa: E731
        mass = hessian(lagrangian, 1)(q, v)
        force = grad(lagrangian, 0)(q, v) - jacrev(grad(lagrangian, 1), 0)(q, v) @ v
        return torch.linalg.solve(mass, force)

    def forward(self, x: Tensor) -> Tensor:
        return vmap(self.acceleration)(x[:, :2], x[:, 2:])


class Divergence(Net):
    """Divergence and Laplacian by forward mode, reverse mode, and both."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scalar = lambda z: self.f(z).sum()  # noqa: E731
        return {
            "reverse": vmap(jacrev(self.f))(x).diagonal(dim1=1, dim2=2).sum(1),
            "forward": vmap(lambda z: jacfwd(self.f)(z).trace())(x),
            "laplacian": vmap(lambda z: hessian(scalar)(z).trace())(x),
            "products": sum(self.second(x, k) for k in range(3)),
        }

    def second(self, x: Tensor, k: int) -> Tensor:
        e = F.one_hot(torch.tensor(k), 3).to(x.dtype).expand_as(x)
        return jvp(lambda z: vjp(self.f, z)[1](torch.ones_like(z))[0], (x,), (e,))[1][:, k]


class Score(Net):
    """An energy's score, implicit score matching, and two steps of gradient descent on the input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = lambda z: -grad(lambda z: self.f(z).squeeze() + (z**2).sum())(z)  # noqa: E731
        s, js = vmap(score)(x), vmap(jacfwd(score))(x)
        for _ in range(2):
            x = x + 0.1 * vmap(score)(x)
        return s, 0.5 * (s**2).sum(1) + torch.einsum("nii->n", js), x


class Penalty(Net):
    """A gradient penalty (WGAN-GP) and the diversity of two outputs' input gradients."""

    def __init__(self) -> None:
        super().__init__(3, 2, nn.Softplus)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        y = self.f(x)
        one, two = (derivative(y[:, k], x) for k in range(2))
        return y, ((one.norm(2, dim=1) - 1) ** 2).mean(), F.cosine_similarity(one, two, dim=1)


class Adapted(Net):
    """MAML: predictions after two inner steps on a support set, by `torch.func` and by `torch.autograd`."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = lambda params: F.mse_loss(functional_call(self.f, params, x), y)  # noqa: E731
        params: dict[str, Tensor] = dict(self.f.named_parameters())
        for _ in range(2):
            slopes = grad(loss)(params)
            params = {name: value - 0.1 * slopes[name] for name, value in params.items()}
        own = dict(self.f.named_parameters())
        slopes = torch.autograd.grad(F.mse_loss(self.f(x), y), list(own.values()), create_graph=True)
        once = {name: value - 0.1 * slope for (name, value), slope in zip(own.items(), slopes, strict=True)}
        return functional_call(self.f, params, x), functional_call(self.f, once, (x,))


class FirstOrder(Net):
    """Gradients that PyTorch lets no further gradient pass through: without a graph, detached, under `no_grad`."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = x.clone().requires_grad_()
        slope = torch.autograd.grad(self.f(z).sum(), z)[0]
        kept = grad(lambda z: self.f(z).sum())(x)
        with torch.no_grad():
            stopped = self.f(x) * kept
        return self.f(x + slope), kept.detach() * self.f(x), stopped + self.f(x), kept + slope


class Forces(nn.Module):
    """Atoms `[B, 4, 3]`: an energy of their distances, and forces."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1))
        self.centres = nn.Buffer(torch.linspace(0.5, 2.5, 4))

    def energy(self, r: Tensor) -> Tensor:
        i, j = torch.triu_indices(4, 4, 1)
        distance = (r[:, i] - r[:, j]).norm(dim=-1)
        features = torch.exp(-((distance.unsqueeze(-1) - self.centres) ** 2))
        return self.pair(features).sum((1, 2))

    def forward(self, r: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            r.requires_grad_(True)
            energy = self.energy(r)
            forces = -torch.autograd.grad(energy.sum(), r, create_graph=self.training, retain_graph=True)[0]
        return energy, forces


class Saliency(nn.Module):
    """Gradients of a CNN's classes by its image: convolutions, pooling, normalisation, and the places of extremes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def scores(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.norm(self.a(x)).relu(), 2)
        return self.fc(F.avg_pool2d(F.gelu(self.b(h)), 2).flatten(1)).log_softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        best = self.scores(x).amax(1)
        return torch.autograd.grad(best.sum(), x, create_graph=True)[0] * x


class Attentive(nn.Module):
    """Gradients through an embedding's neighbour: attention, layer norm, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.head = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def energy(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(F.elu(self.mix(h, h, h)[0]).softmax(-1)).sum()

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * grad(self.energy)(x)


class Jacobians(Net):
    """`torch.autograd.functional`, and a whole batch's Jacobian."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        whole: Any = torch.autograd.functional.jacobian(lambda z: self.f(z).sum(0), x, create_graph=True)
        _, product = torch.autograd.functional.hvp(lambda z: self.f(z).pow(2).sum(), x, torch.ones_like(x), True)
        return whole.squeeze(0), product


class Activations(nn.Module):
    """One derivative of many activations."""

    KINDS = (F.gelu, F.silu, F.softplus, F.elu, torch.sigmoid, F.leaky_relu, F.mish, torch.sin, F.hardtanh, F.selu)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad(lambda z, k=kind: (k(self.fc(z)) ** 2).sum())(x) for kind in self.KINDS)


class Product(nn.Module):
    """`nn.Bilinear`, which is another operation below autograd, and its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return grad(lambda x: self.product(x, x.tanh()).square().sum())(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "heat": (Heat, ((4, 3),)),
    "burgers": (Burgers, ((4, 3),)),
    "hamiltonian": (Hamiltonian, ((4, 3),)),
    "lagrangian": (Lagrangian, ((4, 4),)),
    "divergence": (Divergence, ((4, 3),)),
    "score": (Score, ((4, 3),)),
    "penalty": (Penalty, ((4, 3),)),
    "adapted": (Adapted, ((4, 3), (4, 1))),
    "first-order": (FirstOrder, ((4, 3),)),
    "forces": (Forces, ((4, 4, 3),)),
    "saliency": (Saliency, ((4, 2, 10, 11),)),
    "attentive": (Attentive, ((4, 3, 4),)),
    "jacobians": (Jacobians, ((4, 3),)),
    "activations": (Activations, ((4, 3),)),
    "product": (Product, ((4, 3),)),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", MODELS)
def test_outputs_and_gradients_of_parameters(case: str) -> None:
    make, shapes = MODELS[case]
    torch.manual_seed(0)
    (double,) = precision.double_copies([make()])
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    with jax.enable_x64(True), precision.double_precision():
        ensemble = torch_bridge.to_ensemble([double], inputs, check=False)
        for size in (1, 6):
            now = resize_inputs(inputs, size, 0).positional
            assert_close(compiled(ensemble[0])(*[x.numpy() for x in now]), call_model(double, now))
        found = gradients.compare(ensemble, [double], inputs, inputs, Draws((), jax.random.key(0)))
    assert not isinstance(found, str), found
    assert all(row.passed for row in found), found


class Derived(Net):
    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"slope": scale * vmap(jacrev(self.f))(x).squeeze(1)}


@pytest.mark.thinned
@pytest.mark.parametrize("make", [Derived, Heat])
def test_the_proof_runs(make: type[nn.Module]) -> None:
    models = [make(), make()]
    x = torch.randn(4, 3)
    ensemble = torch_bridge.to_ensemble(models, (x,))
    report = torch_bridge.check(models, ensemble, (x,))
    assert report.passed, str(report)
    assert {"float64, batch of 1", "gradients, float64", "float32, same for all"} <= {row.stage for row in report.rows}


def test_shapes_may_be_fixed_and_the_module_keeps_its_forward() -> None:
    model, x = Burgers(), torch.randn(4, 3)
    forward = model.forward
    with pytest.raises(InputError, match="expected"):
        torch_bridge.to_ensemble([model], (x,), batch_axis=None)(x[:2].numpy())
    assert model.forward == forward
    assert "forward" not in vars(model)


class Larger(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = derivative(self.f(x.requires_grad_()), x)
        return y if x.shape[0] > 6 else -y


class Several(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = derivative(self.f(x.requires_grad_()), x)
        return y if x.shape[0] > 1 else -y


class Rows(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([grad(lambda z: self.f(z).sum())(x[k]) for k in range(x.shape[0])])


class ByValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = grad(lambda z: self.f(z).sum())(x)
        return y if float(y.sum()) > 0 else -y


class Unruled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(derivative(self.f(x.requires_grad_()), x))


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.grad(self.f(x).sum(), x.clone())[0]


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Larger, r"takes derivatives, and .*open batch size: .*batch_axis=None"),
        (Several, r"another way for a batch of one \(test_derivatives\.py:\d+: return y if"),
        (Rows, r"takes derivatives, and .*open batch size: .*batch_axis=None"),
        (ByValue, r"takes derivatives \(test_derivatives\.py:\d+: .*cannot be written out .*jax\.grad"),
        (Unruled, r"special_airy_ai.* \(test_derivatives\.py:\d+: return torch\.special\.airy"),
        (Broken, r"PyTorch itself cannot run Broken .*does not require grad"),
    ],
)
def test_what_cannot_be_carried_says_so(make: type[nn.Module], text: str) -> None:
    with pytest.raises((UnsupportedError, InputError), match=f"(?s){text}"):
        torch_bridge.to_flax(make(), (torch.randn(4, 3),))


class Counting(Net):
    """BatchNorm in training mode, and an example that the forward writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return derivative(self.f(self.norm(x.requires_grad_())), x)


def test_tracing_leaves_modules_and_examples_alone() -> None:
    model, x = Counting(), torch.randn(4, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = torch_bridge.to_ensemble([model.eval()], (x,)).network
    assert network is not None
    assert network.evaluation_only is not None
    assert not x.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
