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
    """The function that replaces one primitive of JAX on a device, by JAX's name of the platform; None for all.

    `function` takes the operands and the parameters of the step. `measured` says what shows the reason.
    """

    primitive: str
    device: str | None
    places: tuple[Place, ...]
    function: Function
    why: str
    measured: str


_EXTREMES = "gradients are lost where the compiler computes an operand twice and rounds it differently"
_ROUNDING = "XLA's own has a larger rounding error than PyTorch's"
_FORMS, _TRAINING, _TEST = "make bench-lowering", "make bench-training", "tests/jaxensemble/programs/test_extrema.py"

REPLACEMENTS: tuple[Replacement, ...] = (
    *(Replacement(name, None, ("member",), form, _EXTREMES, _TEST) for name, form in EXTREMES.items()),
    Replacement(CONVOLUTION, "cpu", ("call",), convolution_alone, "few outputs and narrow groups are slow", _FORMS),
    Replacement(CONVOLUTION, "cpu", ("call under vmap",), convolution_under_vmap, "a kernel a member is slow", _FORMS),
    Replacement(CONVOLUTION, "cpu", ("loss",), convolution_of_products, "gradients under vmap are slow", _FORMS),
    Replacement(CONVOLUTION, "cpu", ("loss by eigen",), convolution_for_training, "gradients are slow", _FORMS),
    Replacement(MAXIMA, "cpu", ("loss", "loss by eigen"), maxima, "the gradient is a loop over windows", _TRAINING),
    Replacement(PRODUCT, "cpu", ("all members",), product, _ROUNDING, _FORMS),
    Replacement("reduce_sum", "cpu", ("all members",), total, _ROUNDING, _FORMS),
    Replacement("tanh", "cpu", ("all members",), tanh, _ROUNDING, _FORMS),
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
