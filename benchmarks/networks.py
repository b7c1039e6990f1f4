"""The networks that suites time: those of PyTorch's model ensembling tutorial, of an example, and torchvision's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_bridge.demo import DigitCNN, SimpleCNN, SimpleMLP
from zoo import networks

TUTORIAL: dict[str, Callable[[], nn.Module]] = {"mlp": SimpleMLP, "cnn": SimpleCNN}


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
    models, _ = networks.make("torchvision", name, members)
    return models, (torch.randn(batch, 3, 64, 64),)
