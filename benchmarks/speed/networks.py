"""Networks for the suites: from PyTorch's model ensembling tutorial, from an example, and well-known ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.speed.architectures import MobileNetV2, resnet18, vit_ti_16
from benchmarks.zoo import networks
from torch_bridge.demo import DigitCNN, SimpleCNN, SimpleMLP

TUTORIAL: dict[str, Callable[[], nn.Module]] = {"mlp": SimpleMLP, "cnn": SimpleCNN}

OWN: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": MobileNetV2, "vit_ti_16": vit_ti_16}
"""torchvision's networks that need no torchvision; all others do."""


def make(name: str, members: int, batch: int) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Members in evaluation mode, and a minibatch: digits of 28 x 28 for the tutorial's, else images of 64 x 64.

    `digits` are those of `examples/deep_ensemble.py`, for digits of 8 x 8, without the dropout, of which no two ways
    draw the same numbers.
    """
    torch.manual_seed(0)
    if name == "digits":
        digits: list[nn.Module] = [DigitCNN().eval() for _ in range(members)]
        for model in digits:
            model.get_submodule("dropout").p = 0.0  # type: ignore[assignment]
        return digits, (torch.randn(batch, 1, 8, 8),)
    if name in TUTORIAL:
        return [TUTORIAL[name]().eval() for _ in range(members)], (torch.randn(batch, 1, 28, 28),)
    models = networks.varied(OWN[name](), members) if name in OWN else networks.make("torchvision", name, members)[0]
    return models, (torch.randn(batch, 3, 64, 64),)


def setup(name: str) -> Callable[[], object] | None:
    """Returns the function that each of PyTorch's processes has to call before it reads such a network."""
    return None if name in OWN or name in TUTORIAL or name == "digits" else networks.importable
