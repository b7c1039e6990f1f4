"""Forms by device: a platform with an entry gets its forms, every other platform keeps XLA's own steps."""

import typing

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxensemble.programs import forms
from jaxensemble.programs.forms import EVALUATION, REPLACEMENTS, Place, Replacement, use_evaluation_form, use_forms
from jaxensemble.programs.rewrite import primitives


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)


X, KERNEL = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))


PLACES = typing.get_args(Place)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_platforms_without_forms_keep_xlas_own_steps(platform: str) -> None:
    assert platform not in EVALUATION and use_evaluation_form(depthwise, platform) is depthwise
    assert all(use_forms(depthwise, platform, place) is depthwise for place in PLACES if place != "member")


def test_a_platform_with_forms_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = use_forms(depthwise, "cpu", "call under vmap")
    assert primitives(depthwise, X, KERNEL)["conv_general_dilated"] == 1
    assert primitives(ours, X, KERNEL)["conv_general_dilated"] == 0
    new = Replacement("tanh", "new", ("all members",), lambda x, **_: lax.sin(x), "why", "how")
    monkeypatch.setattr(forms, "REPLACEMENTS", (*REPLACEMENTS, new))
    found = primitives(use_forms(lax.tanh, "new", "all members"), X)
    assert (found["sin"], found["tanh"]) == (1, 0)


def test_no_step_is_replaced_twice_in_one_place() -> None:
    devices = {replacement.device for replacement in REPLACEMENTS} - {None}
    for device in devices:
        for place in PLACES:
            found = [r.primitive for r in REPLACEMENTS if place in r.places and r.device in (None, device)]
            assert found and len(found) == len(set(found)), (device, place)
