"""Suites to time: a suite is a list of cases, a case is one ensemble on one minibatch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """`members` networks on `batch` rows; `variants` are PyTorch's ways to be timed, None for all that a device has.

    With `train`, a training step is timed instead of a prediction.
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
_SCALED = ("loop, channels_last", "torch.func.vmap", "compile(torch.func.vmap, default)")
# What fits into minutes on a GPU: the plain ways, compiled ones, and CUDA graphs of both.
_PLAIN = ("loop", "torch.func.vmap")
_SHORT = (
    *(*_PLAIN, "compile(loop, default)", "compile(torch.func.vmap, default)"),
    *("graph(loop)", "graph(loop, channels_last)", "graph(torch.func.vmap)"),
    *("graph(compile(loop, default))", "graph(compile(torch.func.vmap, default))"),
    "compile(torch.func.vmap, reduce-overhead)",
)
_IMAGES = (
    *("loop, channels_last", "torch.func.vmap", "graph(loop)", "graph(loop, channels_last)", "graph(torch.func.vmap)"),
    *("compile(member, channels_last, default)", "graph(compile(member, default))"),
    *("graph(compile(member, channels_last, default))", "graph(compile(torch.func.vmap, default))"),
)
_STEPS = (
    *(*_PLAIN, "compile(torch.func.vmap, default)", "graph(loop)", "graph(torch.func.vmap)"),
    *("graph(compile(member, default))", "graph(compile(torch.func.vmap, default))"),
)

SUITES: dict[str, list[Case]] = {
    "tutorial": [Case("mlp", 10, 64), Case("cnn", 10, 64)],
    "zoo": [
        *(Case(name, 4, 16, _LOOPS) for name in ("resnet18", "mobilenet_v2", "resnext50_32x4d", "efficientnet_b0")),
        Case("vit_ti_16", 4, 16, _LOOPS),
        Case("resnet18", 10, 1, _LOOPS),  # one request
        Case("vgg11", 4, 16, ("loop, channels_last", "compile(loop, channels_last, default)")),  # a process has 4 GB
    ],
    "tutorial-short": [Case(name, 10, 64, _SHORT) for name in ("mlp", "cnn")],
    "images": [Case(name, 10, 64, _IMAGES) for name in ("resnet18", "mobilenet_v2")],
    "training-short": [Case(name, 10, 64, _STEPS, train=True) for name in ("mlp", "cnn")],
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
