"""What is timed: a suite is a list of cases, a case one ensemble on one minibatch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """`members` networks on `batch` rows; `variants` are PyTorch's ways to be timed, None for all.

    With `train`, a training step is timed in place of a prediction.
    """

    network: str
    members: int
    batch: int
    variants: tuple[str, ...] | None = None
    train: bool = False

    @property
    def name(self) -> str:
        """`cnn, 10 x 64`."""
        return f"{self.network}, {self.members} x {self.batch}"


# Compiling four large networks as one graph in every mode takes an hour: the modes are compared in the first suite.
_LOOPS = ("loop", "loop, channels_last", "compile(loop, default)", "compile(loop, channels_last, default)")
_MAPS = ("torch.func.vmap", "compile(torch.func.vmap, default)")
_SCALED = ("loop, channels_last", "torch.func.vmap")
_GRAPHS = ("compile(loop, channels_last, reduce-overhead)", "compile(torch.func.vmap, reduce-overhead)")

SUITES: dict[str, list[Case]] = {
    "tutorial": [Case("mlp", 10, 64), Case("cnn", 10, 64)],
    "zoo": [
        *(Case(name, 4, 16, _LOOPS) for name in ("resnet18", "mobilenet_v2", "resnext50_32x4d", "efficientnet_b0")),
        Case("vgg11", 4, 16, ("loop, channels_last", "compile(loop, channels_last, default)")),  # a process has 4 GB
    ],
    "zoo-gpu": [
        Case(name, 10, 64, ("loop", "loop, channels_last", "torch.func.vmap", *_GRAPHS))
        for name in ("resnet18", "mobilenet_v2")
    ],
    "training": [
        *(Case(name, 10, 64, (*_LOOPS, *_MAPS), train=True) for name in ("mlp", "digits", "cnn")),
        Case("resnet18", 4, 16, _LOOPS, train=True),
    ],
    "scaling": [
        *(Case(name, members, 64, _SCALED) for name in ("mlp", "cnn") for members in (1, 10, 100)),
        Case("mlp", 1000, 64, _SCALED),
        *(Case(name, 10, batch, _SCALED) for name in ("mlp", "cnn") for batch in (1, 512)),
        Case("mlp", 10, 4096, _SCALED),
    ],
}
