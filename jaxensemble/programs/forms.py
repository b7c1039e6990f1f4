"""Forms of operations by device: programs that a device runs faster, or with less rounding, than XLA's own steps.

To add a form, write it in the folder of its device, such as `programs/cpu`, and enter it into `FORMS`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxensemble.programs.cpu.convolutions import choose_forms
from jaxensemble.programs.cpu.matmuls import product
from jaxensemble.programs.cpu.sums import total
from jaxensemble.programs.cpu.tanh import tanh
from jaxensemble.programs.cpu.training import choose_training_forms
from jaxensemble.programs.gpu.packing import pack_members
from jaxensemble.programs.rewrite import PRODUCT, rewrite_steps


def _leave(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return function


class Forms(NamedTuple):
    """The forms of one device.

    - `call`: takes the function of one member's call, and whether it is mapped over kernels (`vmapped`); returns the
      function with its convolutions in the forms of the device.
    - `loss`: does the same for the function of one member's loss, which is differentiated afterwards, under the
      settings of XLA's compiler that a plan names (`compiler`).
    - `steps`: the replacements of steps in the program of all members, by primitive.
    - `evaluation`: takes the function of all members where it is not differentiated, and returns it in another form.
    """

    call: Callable[..., Callable[..., Any]] = _leave
    loss: Callable[..., Callable[..., Any]] = _leave
    steps: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    evaluation: Callable[[Callable[..., Any]], Callable[..., Any]] = _leave


FORMS = {
    "cpu": Forms(
        call=choose_forms,
        loss=choose_training_forms,
        # XLA's own have larger rounding errors on CPUs than PyTorch's.
        steps={PRODUCT: product, "reduce_sum": total, "tanh": tanh},
    ),
    "gpu": Forms(evaluation=pack_members),
}
"""The forms by JAX's name of the platform. All other platforms run XLA's own steps."""


def use_call_forms(function: Callable[..., Any], platform: str, *, vmapped: bool) -> Callable[..., Any]:
    """Returns the function of one member's call, in the forms of a platform.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxensemble.programs.rewrite import primitives
    >>> module = nnx.Conv(2, 4, (1, 1), rngs=nnx.Rngs(0))
    >>> primitives(use_call_forms(module, "cpu", vmapped=True), jnp.ones((1, 5, 5, 2)))["dot_general"]
    1
    """
    return FORMS[platform].call(function, vmapped=vmapped) if platform in FORMS else function


def use_loss_forms(function: Callable[..., Any], platform: str, *, compiler: str | None = None) -> Callable[..., Any]:
    """Returns the function of one member's loss, in the forms of a platform and of a compiler's settings."""
    return FORMS[platform].loss(function, compiler=compiler) if platform in FORMS else function


def use_step_forms(function: Callable[..., Any], platform: str) -> Callable[..., Any]:
    """Returns the function of all members, with its steps in the forms of a platform."""
    steps = FORMS[platform].steps if platform in FORMS else {}
    return rewrite_steps(function, steps) if steps else function


def use_evaluation_forms(function: Callable[..., Any], platform: str) -> Callable[..., Any]:
    """Returns the function of all members, which is not differentiated, in the form of a platform."""
    return FORMS[platform].evaluation(function) if platform in FORMS else function
