"""Products of matrices in their forms for CPUs: the numbers are XLA's, with less rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxensemble import Ensemble, Plan
from jaxensemble.programs.cpu.matmuls import product
from jaxensemble.programs.rewrite import PRODUCT, primitives, rewrite_steps


def with_products(function):
    return rewrite_steps(function, {PRODUCT: product})


def _normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("subscripts", "x", "y"),
    [
        ("k,kf->f", (3024,), (3024, 5)),
        ("nk,kf->nf", (1, 514), (514, 5)),
        ("nk,kf->nf", (1, 131), (131, 5)),  # a prime: no equal blocks
        ("nk,kf->nf", (7, 1021), (1021, 5)),
        ("nk,kf->nf", (0, 1024), (1024, 5)),
        ("nk,kf->nf", (4, 1024), (1024, 1)),
        ("nk,nk->nk", (3, 1024), (3, 1024)),
        ("nk,fk->fn", (3, 2048), (4, 2048)),
        ("bnk,bkf->bnf", (2, 3, 1500), (2, 1500, 4)),
        ("hbnk,bkhf->bhnf", (2, 3, 4, 1024), (3, 1024, 2, 5)),
        ("nij,ijf->nf", (3, 3, 1024), (3, 1024, 5)),
        ("nk,mkf->mnf", (3, 40), (6, 40, 5)),  # a shared minibatch of few rows
        ("nk,mkf->mnf", (20, 40), (6, 40, 300)),  # and one of many, by wide weights
        ("nk,mkf->mnf", (20, 40), (6, 40, 5)),
        ("nhk,mkf->mnhf", (2, 4, 1024), (6, 1024, 5)),
    ],
)
def test_products_agree_in_float64_and_so_do_gradients(subscripts, x, y, x64):
    x, y = _normal(*x), _normal(*y)
    plain = lambda x, y: jnp.einsum(subscripts, x, y)  # noqa: E731
    ours = with_products(plain)
    np.testing.assert_allclose(ours(x, y), plain(x, y), rtol=0, atol=1e-11)

    def slopes(function):
        return jax.grad(lambda x, y: (function(x, y) * jnp.cos(jnp.arange(y.shape[-1])[0])).sum(), (0, 1))(x, y)

    for got, expected in zip(slopes(ours), slopes(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)


def test_what_is_no_floating_product_is_left_alone():
    integers = jnp.full((4, 2000), 3, jnp.int32), jnp.full((2000, 2), 5, jnp.int32)
    assert with_products(jnp.matmul)(*integers).tolist() == [[30000, 30000]] * 4


def test_programs_within_a_program_are_looked_into(x64):
    x, kernel = _normal(3, 1024), _normal(1024, 1024) / 32

    def function(x, kernel):
        looped, _ = lax.scan(lambda x, _: (jax.nn.relu(x @ kernel), None), x, None, length=2)
        branch = lax.cond(x.sum() > 0, lambda x: x @ kernel, lambda x: -x @ kernel, x)
        return looped + branch + jax.checkpoint(jnp.dot)(x, kernel)

    ours = with_products(function)
    assert primitives(ours, x, kernel)["slice"] == 8  # the two blocks of four products
    np.testing.assert_allclose(ours(x, kernel), function(x, kernel), rtol=0, atol=1e-11)
    np.testing.assert_allclose(jax.vmap(ours, (0, None))(x[None], kernel)[0], ours(x, kernel), rtol=0, atol=1e-11)


def test_a_product_of_very_many_terms_is_no_long_program(x64):
    x, kernel = _normal(1, 100_000), _normal(100_000, 2)
    assert sum(primitives(with_products(jnp.matmul), x, kernel).values()) < 20
    np.testing.assert_allclose(with_products(jnp.matmul)(x, kernel), x @ kernel, rtol=0, atol=1e-9)


def test_half_precision_rounds_once():
    x, kernel = jnp.full((1, 256), 1.0, jnp.bfloat16), jnp.full((256, 3), 1.01, jnp.bfloat16)
    y = with_products(jnp.matmul)(x, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.bfloat16(256 * float(jnp.bfloat16(1.01))))


@pytest.mark.parametrize(("rows", "features", "apart"), [(4, 8, True), (4, 512, True), (64, 512, False)])
def test_members_share_a_few_rows_without_transposing_their_weights(rows, features, apart):
    ensemble = Ensemble.from_modules([nnx.Linear(32, features, rngs=nnx.Rngs(seed)) for seed in range(3)])
    x = np.ones((rows, 32), "float32")
    text = str(jax.make_jaxpr(lambda ensemble, x: ensemble(x, plan=Plan()))(ensemble, x))
    assert ("([0], [0])" in text) == apart  # the members as a batch axis of the product


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("float32", "complex64"), ("float32", "float64"), ("bfloat16", "float32"), ("float16", "bfloat16"),
        ("float8_e4m3fn", "float8_e4m3fn"),
    ],
)  # fmt: skip
def test_products_of_two_kinds_of_numbers_are_left_to_xla(left, right, x64):
    x, y = _normal(3, 1024).astype(left), _normal(1024, 2).astype(right)
    if right == "complex64":
        y = y * (1 + 2j)
    plain = lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ())))  # noqa: E731
    got, expected = with_products(plain)(x, y), plain(x, y)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.astype("complex128"), expected.astype("complex128"))


def test_ensembles_run_without_jit_and_export_with_an_open_batch():
    ensemble = Ensemble.from_modules([nnx.Linear(1024, 3, rngs=nnx.Rngs(seed)) for seed in range(3)])
    x = jnp.ones((5, 1024))
    with jax.disable_jit():
        np.testing.assert_allclose(ensemble(x), ensemble.eval()(x), rtol=1e-5)
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(lambda x: ensemble(x, plan=Plan())))(
        jax.ShapeDtypeStruct((batch, 1024), "float32")
    )
    np.testing.assert_allclose(exported.call(x), ensemble(x), rtol=1e-5)


def test_collectives_within_a_program_are_left_as_they_are():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    summed = jax.shard_map(
        lambda x, y: lax.psum(x @ y, "i"), mesh=mesh, in_specs=(spec(None, "i"), spec("i", None)), out_specs=spec()
    )
    x, y = jnp.ones((2, 2000)), jnp.ones((2000, 2))
    np.testing.assert_array_equal(jax.jit(with_products(summed))(x, y), 2000)


def test_what_is_called_twice_is_rewritten_once():
    def doubled(function):
        return jax.jit(lambda x: function(function(x)))

    function = jax.jit(lambda x: x @ jnp.ones((1024, 1024)))
    for _ in range(12):
        function = doubled(function)
    program = jax.make_jaxpr(with_products(function))(jnp.ones((2, 1024)))
    programs = set()

    def collect(program):
        for step in program.eqns:
            inner = step.params.get("jaxpr")
            if inner is not None and id(inner) not in programs:
                programs.add(id(inner))
                collect(inner)

    collect(program)
    assert len(programs) < 20
