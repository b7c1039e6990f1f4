"""Forms by device: a platform with an entry gets its forms, every other platform keeps XLA's own steps."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxensemble.programs.forms import FORMS, use_call_forms, use_loss_forms, use_step_forms
from jaxensemble.programs.rewrite import primitives


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)


X, KERNEL = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_platforms_without_forms_keep_xlas_own_steps(platform: str) -> None:
    assert platform not in FORMS
    assert use_call_forms(depthwise, platform, vmapped=True) is depthwise
    assert use_loss_forms(depthwise, platform) is depthwise
    assert use_step_forms(depthwise, platform) is depthwise


def test_a_platform_with_forms_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = use_call_forms(depthwise, "cpu", vmapped=True)
    assert primitives(depthwise, X, KERNEL)["conv_general_dilated"] == 1
    assert primitives(ours, X, KERNEL)["conv_general_dilated"] == 0
    monkeypatch.setitem(FORMS, "new", FORMS["cpu"]._replace(steps={"tanh": lambda x, **_: lax.sin(x)}))
    found = primitives(use_step_forms(lax.tanh, "new"), X)
    assert (found["sin"], found["tanh"]) == (1, 0)
