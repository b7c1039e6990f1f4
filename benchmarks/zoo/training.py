"""Ten training steps of timm's networks next to PyTorch's, in float64, with the same random numbers on both sides."""

import dataclasses

import jax
import torch

import torch_bridge
from benchmarks.zoo import networks
from benchmarks.zoo.one import MEMBERS, Result
from jaxensemble import UnsupportedError
from jaxensemble.arrays import as_arrays
from torch_bridge.graph.examples import Arguments
from torch_bridge.parity import precision, steps
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.float64 import convert_to_float64
from torch_bridge.parity.inputs import ensemble_inputs, inputs_per_member, stack_inputs
from torch_bridge.parity.result import Row

OPTIMIZER = "SGD"
ROWS = 4

TRAINED = {
    "beit_base_patch16_224 img_size=64 depth=2 embed_dim=48 num_heads=3 drop_path_rate=0.1": 64,
    "cait_xxs24_224 img_size=64 depth=1 depth_token_only=1 embed_dim=48 drop_path_rate=0.1": 64,
    "deit_tiny_distilled_patch16_224 img_size=64 depth=2 embed_dim=48 drop_path_rate=0.1": 64,
    "densenet121 growth_rate=8 block_config=[2,2,2,2] drop_rate=0.1": 32,
    "edgenext_xx_small dims=[16,24,32,64] depths=[1,1,2,1] drop_path_rate=0.1": 64,
    "eva02_tiny_patch14_224 img_size=56 depth=2 embed_dim=48 drop_path_rate=0.1": 56,
    "levit_128s img_size=64 embed_dim=[32,48,64] num_heads=[2,3,4] drop_path_rate=0.1": 64,
    "mixer_s32_224 img_size=64 mlp_ratio=[0.5,0.5] drop_path_rate=0.1": 64,
    "mobilenetv3_small_050 drop_rate=0.2 drop_path_rate=0.1": 64,
    "mobilevit_xxs drop_path_rate=0.1": 64,
    "poolformer_s12 drop_path_rate=0.1": 32,
    "pvt_v2_b0 depths=[1,1,1,1] embed_dims=[8,16,40,64] drop_path_rate=0.1": 64,
    "regnetx_002 drop_path_rate=0.1": 32,
    "resnet10t drop_path_rate=0.1 drop_block_rate=0.1": 64,
    "swin_tiny_patch4_window7_224 img_size=56 embed_dim=24 depths=[2,2] num_heads=[2,4] drop_path_rate=0.2": 56,
    "swinv2_tiny_window8_256 img_size=64 embed_dim=24 depths=[2,2] num_heads=[2,4] drop_path_rate=0.2": 64,
    "test_coatnet img_size=64 drop_path_rate=0.1": 64,
    "test_convnext drop_path_rate=0.1": 32,
    "test_efficientnet drop_rate=0.2 drop_path_rate=0.2": 32,
    "test_maxvit img_size=64 drop_path_rate=0.1": 64,
    "test_nfnet drop_path_rate=0.1": 32,
    "test_vit img_size=64 drop_rate=0.1 drop_path_rate=0.1": 64,
    "twins_svt_small img_size=64 depths=[1,1,2,1] embed_dims=[16,32,64,128] num_heads=[1,2,4,8] drop_path_rate=0.1": 64,
    "vgg11_bn mlp_ratio=0.0625 drop_rate=0.5": 32,
    "xcit_nano_12_p8_224 depth=1 cls_attn_layers=1 embed_dim=64 drop_path_rate=0.1": 32,
}
"""Networks with options that make them small and random, and the size of their images.

At 32 x 32, BatchNorm over four values makes ten thousand times as much of rounding errors in some.
"""


def prove(name: str) -> Result:
    """Ports a network, and compares losses, parameters and buffers of ten steps in training mode."""
    size = TRAINED[name]
    models = networks.varied(networks.model_of("timm", name), MEMBERS)
    inputs = Arguments((torch.randn(ROWS, 3, size, size),), {})
    known = Result(name, "", sum(p.numel() for p in models[0].parameters()), (3, size, size))
    try:
        ensemble = torch_bridge.to_ensemble(models, *inputs, check=False)
    except UnsupportedError as error:
        return dataclasses.replace(known, status="refused", reason=str(error))
    doubles, wide = precision.double_copies(models), precision.doubled(inputs)
    with precision.equal_precision(), jax.enable_x64(True), precision.double_precision():
        exact = convert_to_float64(ensemble, doubles[0], wide)
        each = inputs_per_member(wide, MEMBERS, 0)
        arrays = as_arrays(stack_inputs([ensemble_inputs(one, "torch") for one in each]), "inputs")
        only = {OPTIMIZER: steps.OPTIMIZERS[OPTIMIZER]}
        rows, notes = steps.compare(exact, doubles, each, arrays, Draws((), jax.random.key(0)), only)
    return _judged(known, [row for row in rows if OPTIMIZER in row.stage], notes)


def _judged(known: Result, rows: list[Row], notes: list[str]) -> Result:
    missed = [note for note in notes if not note.startswith("training not compared with torch.func")]
    wrong = [f"{row.case}: {row.error:.2e} > {row.limit:.2e}, {row.note}" for row in rows if not row.passed]
    error = max((row.error for row in rows), default=None)
    status = "failed" if wrong else "passed" if rows and not missed else "refused"
    return dataclasses.replace(known, status=status, float64=error, reason="; ".join([*wrong, *missed]))
