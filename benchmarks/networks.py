"""The networks that suites time: those of PyTorch's model ensembling tutorial, and torchvision's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import networks


class MLP(nn.Module):
    """The tutorial's: 784-128-128-10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)


class CNN(nn.Module):
    """The convolutional network of the tutorial's first version, PyTorch's MNIST example without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return F.log_softmax(self.fc2(torch.relu(self.fc1(x))), dim=1)


TUTORIAL: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "cnn": CNN}


def make(name: str, members: int, batch: int) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Members in evaluation mode, and a minibatch: digits of 28 x 28 for the tutorial's, else images of 64 x 64."""
    torch.manual_seed(0)
    if name in TUTORIAL:
        return [TUTORIAL[name]().eval() for _ in range(members)], (torch.randn(batch, 1, 28, 28),)
    models, _ = networks.make("torchvision", name, members)
    return models, (torch.randn(batch, 3, 64, 64),)
