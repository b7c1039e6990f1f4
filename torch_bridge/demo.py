"""The demo: ensembles trained on real digits in PyTorch, ported, compared with PyTorch, and their uncertainty."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import jaxensemble
from torch_bridge import parity
from torch_bridge.parity import reference
from torch_bridge.porting.port import to_ensemble
from torch_bridge.report import draw_table
from torch_bridge.timing import side_by_side

MEMBERS = 10


class DigitCNN(nn.Module):
    """A small CNN for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = self.pool(F.relu(self.conv2(x)))
        x = self.dropout(x.flatten(1))
        x = F.relu(self.fc1(x))
        return self.fc2(x)


class DigitMLP(nn.Module):
    """A small MLP for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class SimpleMLP(nn.Module):
    """The MLP of PyTorch's tutorial on model ensembling."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class SimpleCNN(nn.Module):
    """The CNN of PyTorch's tutorial on model ensembling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


def run(out: Path, *, epochs: int = 12, rounds: int = 10, quiet: bool = False) -> dict[str, Any]:
    """Runs the demo, prints what it finds, writes pictures to `out`, and returns its figures."""
    console = Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    train, test = digits()
    figures: dict[str, Any] = {}
    ensembles = {}
    for factory in (DigitCNN, DigitMLP):
        models = [trained(factory, train, seed, epochs) for seed in _members(f"training {factory.__name__}s", quiet)]
        ensemble = to_ensemble(models, (test[0][:64],))
        ensembles[factory.__name__] = models, ensemble
        report = parity.check(models, ensemble, (test[0][:64],))
        console.print(f"\n{MEMBERS} x {factory.__name__}, trained on handwritten digits in PyTorch, ported to Flax")
        console.print(str(report))
        figures[factory.__name__] = {"parity": report.passed} | accuracy(ensemble, test, console)
    console.print("\nThe Flax network that DigitCNN became:\n")
    console.print(ensembles["DigitCNN"][1].source())
    figures |= tutorial(console)
    cnn = ensembles["DigitCNN"][1]
    figures["pictures"] = [str(path) for path in pictures(cnn, test, out)]
    console.print("\nPictures: " + ", ".join(figures["pictures"]))
    models, ensemble = ensembles["DigitMLP"]
    figures["timing"] = timing(
        {"DigitMLP": (models, ensemble), "DigitCNN": ensembles["DigitCNN"]}, test[0], rounds, console
    )
    return figures


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scikit-learn's handwritten digits: 1,797 images `[N, 1, 8, 8]` in [0, 1] with labels, one third for testing."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits are scikit-learn's: pip install 'jaxensemble[demo]'", name=error.name) from error

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype("float32")
    x, x_test, y, y_test = train_test_split(images, labels, test_size=1 / 3, random_state=0, stratify=labels)
    return (torch.from_numpy(x), torch.from_numpy(y)), (torch.from_numpy(x_test), torch.from_numpy(y_test))


def trained(factory: Callable[[], nn.Module], data: tuple[Tensor, Tensor], seed: int, epochs: int) -> nn.Module:
    """Trains one member by Adam on minibatches of 64, with its own seed. Returns it in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        images, labels = data
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    return model.eval()


def accuracy(ensemble: jaxensemble.Ensemble, data: tuple[Tensor, Tensor], console: Console) -> dict[str, float]:
    """Measures the accuracy of one member and of the ensemble, and the uncertainty of right and wrong answers."""
    images, labels = data[0], data[1].numpy()
    prediction = ensemble.predict(images)
    single = (np.asarray(prediction.probabilities).argmax(-1) == labels).mean(axis=1)
    right = np.asarray(prediction.soft_vote) == labels
    entropy, information = np.asarray(prediction.predictive_entropy), np.asarray(prediction.mutual_information)
    result = {
        "member_accuracy": float(single.mean()),
        "ensemble_accuracy": float(right.mean()),
        "entropy_right": float(entropy[right].mean()),
        "entropy_wrong": float(entropy[~right].mean()) if (~right).any() else float("nan"),
        "information_right": float(information[right].mean()),
        "information_wrong": float(information[~right].mean()) if (~right).any() else float("nan"),
    }
    rows = [
        (
            "accuracy of one member (mean, worst to best)",
            f"{single.mean():.2%} ({single.min():.2%} to {single.max():.2%})",
        ),
        ("accuracy of the ensemble", f"{right.mean():.2%}"),
        (
            "predictive entropy where right, where wrong (nats)",
            f"{result['entropy_right']:.3f}, {result['entropy_wrong']:.3f}",
        ),
        (
            "mutual information where right, where wrong (nats)",
            f"{result['information_right']:.3f}, {result['information_wrong']:.3f}",
        ),
    ]
    console.print(
        draw_table(f"{len(labels)} test images, {(~right).sum()} answered wrongly by the ensemble", ("", ""), rows)
    )
    return result


def tutorial(console: Console) -> dict[str, bool]:
    """Compares the two untrained networks of PyTorch's tutorial with PyTorch, on noise of MNIST's shape."""
    passed = {}
    for factory in (SimpleMLP, SimpleCNN):
        torch.manual_seed(0)
        models = [factory().eval() for _ in range(MEMBERS)]
        minibatch = torch.randn(64, 1, 28, 28)
        ensemble = to_ensemble(models, (minibatch,), check=False)
        report = parity.check(models, ensemble, (minibatch[:16],))
        console.print(f"\n{MEMBERS} x {factory.__name__}, the tutorial's, 1x28x28")
        console.print(str(report))
        passed[f"tutorial {factory.__name__}"] = report.passed
    return passed


def pictures(ensemble: jaxensemble.Ensemble, data: tuple[Tensor, Tensor], out: Path) -> list[Path]:
    """Draws the most and the least certain digits, and the reliability of the ensemble's confidence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    images, labels = data
    prediction = ensemble.predict(images)
    order = np.argsort(np.asarray(prediction.predictive_entropy))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(2, 8)
    for row, (rows, title) in enumerate([(order[:8], "most certain"), (order[::-1][:8], "least certain")]):
        for axis, k in zip(axes[row], rows, strict=True):
            axis.imshow(images[int(k), 0], cmap="gray_r")
            said = int(prediction.soft_vote[int(k)])
            axis.set_title(f"{said} ({float(prediction.confidence[int(k)]):.0%})\nis {int(labels[int(k)])}", fontsize=9)
            axis.set_axis_off()
        axes[row][0].text(-0.25, 0.5, title, rotation=90, va="center", ha="right", transform=axes[row][0].transAxes)
    saved = [_save(FigureCanvasAgg(figure), out / "digits.png")]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    curve = jaxensemble.reliability_curve(prediction.mean, labels.numpy(), bins=10)
    filled = np.asarray(curve.count) > 0
    axis.plot([0, 1], [0, 1], "--", color="gray", label="perfectly calibrated")
    axis.plot(np.asarray(curve.confidence)[filled], np.asarray(curve.accuracy)[filled], "o-", label="ensemble of 10")
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title="Reliability on test digits")
    axis.legend()
    return [*saved, _save(FigureCanvasAgg(figure), out / "reliability.png")]


def _save(canvas: Any, path: Path) -> Path:
    canvas.print_png(str(path))
    return path


def timing(
    ensembles: dict[str, tuple[list[nn.Module], jaxensemble.Ensemble]], images: Tensor, rounds: int, console: Console
) -> dict[str, dict[str, float]]:
    """Times torch's loop, torch's vmap and the ensemble on one minibatch of 64, in turn, in this process."""
    results = {}
    x = images[:64]
    for name, (models, ensemble) in ensembles.items():
        held = jax.numpy.asarray(x.numpy())
        timed = side_by_side(
            {
                "torch loop": lambda models=models: reference.run_loop(models, (x,)),
                "torch.func.vmap": reference.vmapped_call(models, (x,)),
                "jaxensemble": lambda ensemble=ensemble, held=held: jax.block_until_ready(ensemble(held)),
            },
            rounds=rounds,
        )
        best = min(timed["torch loop"].median, timed["torch.func.vmap"].median)
        rows = [(variant, f"{t.median:.2f} ms", f"{best / t.median:.2f}") for variant, t in timed.items()]
        title = f"{MEMBERS} x {name}, one minibatch of 64 (one process, {torch.get_num_threads()} torch threads)"
        console.print("\n" + draw_table(title, ("", "median", "best eager torch / this"), rows))
        results[name] = {variant: t.median for variant, t in timed.items()}
    return results


def _members(what: str, quiet: bool) -> Any:
    return track(range(MEMBERS), what, console=Console(stderr=True), disable=quiet, transient=True)
