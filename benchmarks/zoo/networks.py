"""Networks of a library by name, and inputs for them."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results import ROOT
from benchmarks.zoo import families
from torch_bridge.graph.examples import Arguments
from torch_bridge.members.constant_weights import randomise_constants

ADDED = ROOT / "build" / "zoo"
"""Where `make zoo` installs libraries that have no build for plain CPU torch."""

_FIXED = {"vit_": 224, "maxvit_": 224, "inception_v3": 96, "googlenet": 96, "alexnet": 80, "swin": 96}
"""Input sizes of torchvision's families that cannot take images of 64 x 64, or hardly."""

_NARROWER = {
    "beit_base_patch16_224": ("depth=3",),
    "deepseek_vit_412m": ("depth=3",),
    "gemma4_vit_167m": ("depth=3",),
    "naflexvit_base_patch16_parfac_gap": ("depth=3",),
    "qwen3_vit_88m": ("depth=3",),
    "samvit_base_patch16_224": ("depth=3",),
}
"""Options of timm's networks of which even the smallest is large: fewer blocks."""


def names(library: str) -> list[str]:
    """Returns the name of every classification network of a library."""
    return _LIBRARIES[library][0]()


def make(library: str, name: str, members: int) -> tuple[list[nn.Module], Arguments]:
    """Returns members of a network in evaluation mode, all of whose weights differ, and a batch of two inputs."""
    models = varied(model_of(library, name), members)
    return models, _LIBRARIES[library][2](models[0], name)


def model_of(library: str, name: str) -> nn.Module:
    """Returns a network by name, with the same random weights every time."""
    torch.manual_seed(0)
    return _LIBRARIES[library][1](name)


def varied(model: nn.Module, members: int) -> list[nn.Module]:
    """Returns members in evaluation mode, all of whose weights differ; the first is the model itself."""
    randomise_constants(model.eval(), seed=0)
    return [model, *(_varied(model, seed) for seed in range(1, members))]


def _varied(model: nn.Module, seed: int) -> nn.Module:
    """Returns a copy with every weight a little larger or smaller."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2, generator=generator))
    return model


def _torchvision_names() -> list[str]:
    models = _torchvision()
    return models.list_models(module=models)


def _torchvision_model(name: str) -> nn.Module:
    return _torchvision().get_model(name, weights=None)


def _torchvision_inputs(model: nn.Module, name: str) -> Arguments:
    size = next((size for start, size in _FIXED.items() if name.startswith(start)), 64)
    return Arguments((torch.randn(2, 3, size, size),), {})


def importable() -> None:
    """Makes installed libraries importable. torchvision's definitions need no operators, only two declared schemas."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for schema in ("nms", "qnms"):
            _LIBRARY.define(f"{schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if str(ADDED) not in sys.path:
        sys.path.append(str(ADDED))


def _torchvision():
    return _added("torchvision.models")


def _timm_names() -> list[str]:
    """Returns each module's published network with the fewest parameters, the smallest first. Counts are cached."""
    timm = _timm()
    kept = ADDED / f"smallest-{timm.__version__}.json"
    if not kept.exists():
        smallest = [
            min((_timm_parameters(name), name) for name in timm.list_models(module=module, exclude_filters="test_*"))
            for module in timm.list_modules()
        ]
        kept.write_text(json.dumps([name for _, name in sorted(smallest)]))
    return [" ".join([name, *_NARROWER.get(name, ())]) for name in json.loads(kept.read_text())]


def _timm_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _timm().create_model(name).parameters())


def _timm_model(name: str) -> nn.Module:
    name, *options = name.split()
    return _timm().create_model(name, **{key: json.loads(value) for key, value in (one.split("=") for one in options)})


def _timm_inputs(model: nn.Module, name: str) -> Arguments:
    """Returns images of 96 x 96, or of the size that the network asks for."""
    images = torch.randn(2, 3, 96, 96)
    try:
        with torch.no_grad():
            model(images)
    except (AssertionError, RuntimeError, ValueError):
        config: Any = model.default_cfg
        images = torch.randn(2, *(config.get("min_input_size") or config["input_size"]))
    return Arguments((images,), {})


def _timm():
    return _added("timm")


def _transformers_model(name: str) -> nn.Module:
    importable()
    return families.model_of(name)


def _transformers_inputs(model: nn.Module, name: str) -> Arguments:
    return Arguments((), families.inputs_of(name))


def _added(module: str):
    importable()
    return __import__(module, fromlist=["_"])


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_Library = tuple[Callable[[], list[str]], Callable[[str], nn.Module], Callable[[nn.Module, str], Arguments]]
_LIBRARIES: dict[str, _Library] = {
    "torchvision": (_torchvision_names, _torchvision_model, _torchvision_inputs),
    "timm": (_timm_names, _timm_model, _timm_inputs),
    "transformers": (lambda: list(families.FAMILIES), _transformers_model, _transformers_inputs),
}
LIBRARIES = tuple(_LIBRARIES)
