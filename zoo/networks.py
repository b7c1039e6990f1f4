"""The networks of a library by name, and inputs for them."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ADDED = Path(__file__).resolve().parent.parent / "build" / "zoo"
"""Where `make zoo` installs libraries that have no build for plain CPU torch."""

_FIXED = {"vit_": 224, "maxvit_": 224, "inception_v3": 96, "googlenet": 96, "alexnet": 80, "swin": 96}
"""Input sizes of torchvision's families that cannot take images of 64 x 64, or hardly."""


def names(library: str) -> list[str]:
    """Every classification network of a library."""
    return _LIBRARIES[library][0]()


def make(library: str, name: str, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in evaluation mode with weights drawn from a seed, and a batch of two inputs for it."""
    torch.manual_seed(seed)
    model = _LIBRARIES[library][1](name).eval()
    randomise(model, seed)
    size = _LIBRARIES[library][2](model, name)
    return model, (torch.randn(2, *size, generator=torch.Generator().manual_seed(0)),)


def randomise(model: nn.Module, seed: int) -> None:
    """Draws what initialisation leaves constant: in place, running statistics and scales included.

    Zeros and ones hide errors: a last layer of zeros proves nothing of what comes before it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            first = float(tensor.flatten()[0])
            if not bool((tensor == first).all()) or (tensor.numel() == 1 and first not in (0, 1)):
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if first else 0.2 * noise - 0.1)


def _torchvision_names() -> list[str]:
    models = _torchvision()
    return models.list_models(module=models)


def _torchvision_model(name: str) -> nn.Module:
    return _torchvision().get_model(name, weights=None)


def _torchvision_size(model: nn.Module, name: str) -> tuple[int, int, int]:
    size = next((size for start, size in _FIXED.items() if name.startswith(start)), 64)
    return 3, size, size


def _torchvision():
    """Its model definitions need no compiled operators, only that two schemas are declared."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for schema in ("nms", "qnms"):
            _LIBRARY.define(f"{schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _added("torchvision.models")


def _timm_names() -> list[str]:
    """One network of each family, the first by name."""
    timm = _timm()
    families = [timm.list_models(module=module, exclude_filters="*in21k*") for module in timm.list_modules()]
    return sorted(family[0] for family in families if family)


def _timm_model(name: str) -> nn.Module:
    return _timm().create_model(name, pretrained=False)


def _timm_size(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(model.default_cfg["input_size"])  # type: ignore[index]


def _timm():
    _torchvision()
    return _added("timm")


def _added(module: str):
    if str(ADDED) not in sys.path:
        sys.path.append(str(ADDED))
    return __import__(module, fromlist=["_"])


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_Library = tuple[Callable[[], list[str]], Callable[[str], nn.Module], Callable[[nn.Module, str], tuple[int, ...]]]
_LIBRARIES: dict[str, _Library] = {
    "torchvision": (_torchvision_names, _torchvision_model, _torchvision_size),
    "timm": (_timm_names, _timm_model, _timm_size),
}
LIBRARIES = tuple(_LIBRARIES)
