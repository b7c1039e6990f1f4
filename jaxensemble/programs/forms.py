"""Steps of programs that are replaced by device: by what the device runs faster, or with less rounding, than XLA's own.

To add one, write it in the folder of its device, such as `programs/cpu`, and enter it into `REPLACEMENTS`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxensemble.programs.cpu.convolutions import convolution_alone, convolution_under_vmap
from jaxensemble.programs.cpu.matmuls import product
from jaxensemble.programs.cpu.sums import total
from jaxensemble.programs.cpu.tanh import tanh
from jaxensemble.programs.cpu.training import convolution_for_training, convolution_of_products, maxima
from jaxensemble.programs.extrema import EXTREMES
from jaxensemble.programs.gpu.packing import pack_members
from jaxensemble.programs.rewrite import CONVOLUTION, MAXIMA, PRODUCT, rewrite_steps

Function = Callable[..., Any]
Place = Literal["member", "call", "call under vmap", "loss", "loss by eigen", "all members"]
"""The programs whose steps are replaced.

- `"member"`: that of one member, for calls and for training.
- `"call"`, `"call under vmap"`: that of one member's call, alone or mapped over its kernels.
- `"loss"`, `"loss by eigen"`: that of one member's loss, which is differentiated afterwards, as XLA or Eigen runs it.
- `"all members"`: that of all members, for calls and for training.
"""


class Replacement(NamedTuple):
    """What a device runs in place of one primitive of JAX. `device` is JAX's name of the platform; None for all.

    `function` takes the operands and the parameters of the step. `measured` says what shows the reason.
    """

    primitive: str
    device: str | None
    places: tuple[Place, ...]
    function: Function
    why: str
    measured: str


_NOT_EQUAL = "gradients are lost where the compiler computes an operand twice and rounds it differently"
_ROUNDING = "XLA's own has a larger rounding error than PyTorch's"

REPLACEMENTS: tuple[Replacement, ...] = (
    *(
        Replacement(name, None, ("member",), function, _NOT_EQUAL, "tests/jaxensemble/programs/test_extrema.py")
        for name, function in EXTREMES.items()
    ),
    *(
        Replacement(CONVOLUTION, "cpu", (place,), function, why, "make bench-lowering")
        for place, function, why in (
            ("call", convolution_alone, "those of one tap, of few outputs and in narrow groups are slow"),
            ("call under vmap", convolution_under_vmap, "with a kernel for each member it is a slow, grouped one"),
            (
                "loss",
                convolution_of_products,
                "gradients are slow, under vmap even more; those of products are products",
            ),
            ("loss by eigen", convolution_for_training, "Eigen runs gradients in one order of axes alone"),
        )
    ),
    Replacement(
        *(MAXIMA, "cpu", ("loss", "loss by eigen"), maxima),
        why="the gradient is a slow loop over windows",
        measured="make bench-training",
    ),
    *(
        Replacement(name, "cpu", ("all members",), function, _ROUNDING, "make bench-lowering")
        for name, function in ((PRODUCT, product), ("reduce_sum", total), ("tanh", tanh))
    ),
)

EVALUATION: dict[str, Callable[[Function], Function]] = {"gpu": pack_members}
"""Whole programs of all members by device, where they are not differentiated."""


def use_forms(function: Function, platform: str, place: Place) -> Function:
    """Returns the function of a place, with the steps that a platform replaces.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxensemble.programs.rewrite import primitives
    >>> module = nnx.Conv(2, 4, (1, 1), rngs=nnx.Rngs(0))
    >>> primitives(use_forms(module, "cpu", "call under vmap"), jnp.ones((1, 5, 5, 2)))["dot_general"]
    1
    """
    found = [r for r in REPLACEMENTS if place in r.places and r.device in (None, platform)]
    return rewrite_steps(function, {r.primitive: r.function for r in found}) if found else function


def use_evaluation_form(function: Function, platform: str) -> Function:
    """Returns the function of all members, which is not differentiated, in the form of a platform."""
    return EVALUATION[platform](function) if platform in EVALUATION else function
