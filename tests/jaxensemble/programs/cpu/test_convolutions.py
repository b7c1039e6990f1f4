"""Every form of a convolution gives XLA's results and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxensemble import Plan
from jaxensemble.ensemble import Ensemble
from jaxensemble.ops import conv
from jaxensemble.programs.cpu.convolutions import FORMS, ConvolutionSizes, convolution, form_alone, form_under_vmap
from jaxensemble.programs.forms import use_forms
from jaxensemble.programs.rewrite import primitives

# input shape, kernel shape, strides, padding, dilation, groups
CASES = {
    "plain": ((2, 5, 6, 3), (3, 2, 3, 4), (1, 1), "VALID", (1, 1), 1),
    "same, even": ((2, 5, 6, 3), (2, 4, 3, 4), (1, 1), "SAME", (1, 1), 1),
    "strided, uneven pads": ((2, 7, 6, 3), (3, 3, 3, 4), (2, 3), ((1, 2), (0, 1)), (1, 1), 1),
    "dilated": ((1, 9, 8, 2), (3, 2, 2, 4), (1, 2), ((2, 2), (1, 1)), (2, 3), 1),
    "groups": ((2, 5, 5, 6), (3, 3, 2, 9), (1, 1), "SAME", (1, 1), 3),
    "depthwise": ((2, 5, 6, 4), (3, 3, 1, 4), (2, 1), "SAME", (1, 1), 4),
    "depthwise, multiplied": ((2, 5, 6, 4), (3, 3, 1, 8), (1, 1), "SAME", (1, 1), 4),
    "depthwise, a long sum": ((1, 9, 8, 2), (7, 5, 1, 2), (1, 1), "SAME", (1, 1), 2),
    "pointwise": ((2, 5, 6, 4), (1, 1, 4, 3), (1, 1), "VALID", (1, 1), 1),
    "pointwise, strided and padded": ((2, 5, 6, 4), (1, 1, 4, 3), (2, 2), ((1, 1), (0, 0)), (1, 1), 1),
    "1-D": ((2, 9, 3), (4, 3, 5), (2,), ((1, 2),), (1,), 1),
    "3-D": ((1, 4, 5, 3, 2), (2, 3, 2, 2, 3), (1, 2, 1), "SAME", (1, 1, 1), 1),
    "cropped": ((1, 6, 6, 2), (3, 3, 2, 2), (1, 1), ((-1, 0), (0, 0)), (1, 1), 1),
}


def _numbers(ndim):
    spatial = "DHW"[5 - ndim :]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


@pytest.mark.thinned
@pytest.mark.parametrize("name", CASES)
def test_forms_agree_with_xla_in_float64(name, x64):
    shape, kernel_shape, strides, padding, dilation, groups = CASES[name]
    generator = np.random.default_rng(0)
    x, kernel = jnp.asarray(generator.normal(size=shape)), jnp.asarray(generator.normal(size=kernel_shape))
    numbers = lax.conv_dimension_numbers(shape, kernel_shape, _numbers(len(shape)))

    def in_form(form, x, kernel):
        return convolution(
            x,
            kernel,
            strides,
            padding,
            choose=lambda case: form,
            rhs_dilation=dilation,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    def objective(form, x, kernel):
        y = in_form(form, x, kernel)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    for form in FORMS:
        built_in = "conv_general_dilated" in primitives(
            lambda x, kernel, form=form: in_form(form, x, kernel), x, kernel
        )
        assert built_in == (form == "built-in" or name == "cropped"), form
    run = jax.jit(lambda *xs: {form: jax.grad(objective, (1, 2), has_aux=True)(form, *xs) for form in FORMS})
    results = run(x, kernel)
    gradients, expected = results["built-in"]
    reference = lax.conv_general_dilated(x, kernel, strides, padding, None, dilation, numbers, groups)
    np.testing.assert_allclose(expected, reference, atol=1e-13)
    for form in FORMS:
        np.testing.assert_allclose(results[form][1], expected, atol=1e-13, err_msg=form)
        for got, want in zip(results[form][0], gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12, err_msg=form)


def test_dtypes_are_those_of_xla():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, _numbers(4))
    for form in FORMS:
        for wanted in (None, jnp.float32):
            result = convolution(
                x,
                kernel,
                (1, 1),
                "SAME",
                choose=lambda case, form=form: form,
                dimension_numbers=numbers,
                feature_group_count=2,
                preferred_element_type=wanted,
            )
            assert result.dtype == (wanted or jnp.bfloat16), form


def test_half_precision_is_rounded_once():
    """Sums of many taps in bfloat16 would be four times as far off as XLA's own."""
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(1, 9, 9, 8)), generator.normal(size=(7, 7, 1, 8))
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, _numbers(4))
    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)

    def rounding(form):
        @jax.jit
        def run(x, kernel):
            return convolution(
                x,
                kernel,
                (1, 1),
                "SAME",
                choose=lambda case: form,
                dimension_numbers=numbers,
                feature_group_count=8,
                precision="highest",
            )

        exact = run(x.astype(jnp.float32), kernel.astype(jnp.float32))
        return float(jnp.std(run(x, kernel).astype(jnp.float32) - exact))

    built_in = rounding("built-in")
    for form in ("grouped", "shifted", "im2col"):
        assert rounding(form) <= 1.1 * built_in, form


def test_channels_first_and_dilated_inputs_are_left_to_xla():
    x, kernel = jnp.ones((1, 2, 4, 4)), jnp.ones((3, 2, 3, 3))
    choose = lambda case: pytest.fail("asked for a form")  # noqa: E731
    assert convolution(x, kernel, (1, 1), "SAME", choose=choose).shape == (1, 3, 4, 4)
    numbers = lax.conv_dimension_numbers((1, 4, 4, 2), (3, 3, 2, 3), _numbers(4))
    dilated = convolution(
        jnp.ones((1, 4, 4, 2)),
        jnp.ones((3, 3, 2, 3)),
        (1, 1),
        ((0, 0), (0, 0)),
        choose=choose,
        lhs_dilation=(2, 2),
        dimension_numbers=numbers,
    )
    assert dilated.shape == (1, 5, 5, 3)


def test_an_ensemble_on_a_cpu_runs_no_grouped_convolution(x64):
    ensemble = Ensemble.from_modules([nnx.Conv(16, 4, (3, 3), rngs=nnx.Rngs(seed)) for seed in range(3)])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 16)))
    together, in_turn = (functools.partial(ensemble, plan=plan) for plan in (Plan(), Plan(members=1)))
    found = primitives(together, x)
    assert found["conv_general_dilated"] == 0 and found["dot_general"] == 9
    assert primitives(in_turn, x)["conv_general_dilated"] == 1  # one member after another, each with its own kernel
    for run in (together, in_turn):
        for member, y in zip(ensemble, run(x), strict=True):
            np.testing.assert_allclose(y, member(x), atol=1e-13)


def test_whoever_wrote_a_convolution_it_gets_a_form(x64):
    """Functions and loops, not only Flax's layers; and gradients go through."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 16, 16)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 16)))

    def looped(kernel, x):
        return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(conv(x, kernel, padding=1)), x)

    other = use_forms(looped, "cpu", "call under vmap")
    found = primitives(other, kernel, x)
    assert found["conv_general_dilated"] == 0 and found["dot_general"] == 9
    np.testing.assert_allclose(other(kernel, x), looped(kernel, x), atol=1e-13)
    ours, expected = (jax.grad(lambda *args, f=f: f(*args).sum())(kernel, x) for f in (other, looped))
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "features", "form"), [(96, 96, "grouped"), (32, 128, "grouped"), (32, 512, "built-in")]
)
def test_groups_are_multiplied_out_where_their_weights_stay_in_the_cache(groups, features, form):
    case = ConvolutionSizes(
        (16, 8, 8, features), (3, 3, features // groups, features), (1, 1), ((1, 1), (1, 1)), (1, 1), groups
    )
    assert {form_alone(case), form_under_vmap(case)} == {form}
