"""Programs that keep rows apart are distinguished from programs that mix them, step by step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxensemble import ops
from jaxensemble.programs.rows import MixedRows, row_axes

TABLE = np.arange(30.0, dtype=np.float32).reshape(10, 3)
KERNEL: Any = np.ones((2, 2, 4, 5), np.float32)

# x is [N, 6, 4]
APART: dict[str, tuple[Callable[[Any], Any], tuple[int | None, ...]]] = {
    "elementwise": (lambda x: jnp.tanh(x) * 2 + x.astype(jnp.float32), (0,)),
    "a row of its own for each": (lambda x: x + jnp.arange(4.0), (0,)),
    "uniform over rows": (lambda x: x * jnp.ones((x.shape[0], 1, 1)), (0,)),
    "no rows": (lambda x: (x, jnp.arange(3.0)), (0, None)),
    "reductions": (lambda x: (x.sum(1), x.max((1, 2)), jnp.argmin(x, -1), x.var(2)), (0, 0, 0, 0)),
    "softmax": (lambda x: jax.nn.softmax(x, -1), (0,)),
    "transposed": (lambda x: jnp.moveaxis(x, 0, 1), (1,)),
    "merged with what follows": (lambda x: x.reshape(-1, 4), (0,)),
    "merged and apart again": (lambda x: x.reshape(-1, 4).reshape(-1, 3, 8), (0,)),
    "merged behind another axis": (lambda x: jnp.moveaxis(x, 0, 1).reshape(6, -1), (1,)),
    "flattened": (lambda x: x.reshape(x.shape[0], -1), (0,)),
    "repeated": (lambda x: jnp.repeat(x, 2, axis=0), (0,)),
    "squeezed": (lambda x: jnp.squeeze(x[:, :1], 1)[:, None], (0,)),
    "sliced": (lambda x: x[:, 1:-1:2], (0,)),
    "dynamically sliced": (lambda x: lax.dynamic_slice_in_dim(x, jnp.int32(2), 3, 1), (0,)),
    "updated": (lambda x: lax.dynamic_update_slice_in_dim(x, x[:, :2], 3, 1), (0,)),
    "padded": (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))), (0,)),
    "side by side": (lambda x: jnp.concatenate([x, x[:, :2]], 1), (0,)),
    "stacked first": (lambda x: jnp.stack([x, x]), (1,)),
    "split": (lambda x: tuple(jnp.split(x, 3, axis=1)), (0, 0, 0)),
    "flipped": (lambda x: jnp.flip(x, 1), (0,)),
    "sorted": (lambda x: jnp.sort(x, -1), (0,)),
    "largest": (lambda x: lax.top_k(x, 2), (0, 0)),
    "cumulated": (lambda x: jnp.cumsum(x, 1), (0,)),
    "weights": (lambda x: x @ np.ones((4, 5), np.float32), (0,)),
    "weights first": (lambda x: jnp.einsum("oi,nsi->ons", np.ones((5, 4), np.float32), x), (1,)),
    "attention": (lambda x: jax.nn.softmax(x @ x.mT, -1) @ x, (0,)),
    "convolution": (
        lambda x: lax.conv_general_dilated(
            x.reshape(-1, 2, 3, 4), KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (0,),
    ),
    "pooling": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"), (0,)),
    "looked up": (lambda x: jnp.take(TABLE, x[:, 0].astype(jnp.int32), axis=0, mode="clip"), (0,)),
    "the same entries of every row": (lambda x: x[:, jnp.array([3, 1])], (0,)),
    "entries of its own": (lambda x: jnp.take_along_axis(x, x[:, :2].astype(jnp.int32) % 6, 1), (0,)),
    "in time": (lambda x: lax.scan(lambda h, t: (h + t, h), jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0)), (0, 1)),
    "a loop": (lambda x: lax.fori_loop(0, 3, lambda k, y: y * k + x, x), (0,)),
    "while": (lambda x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, x))[1], (0,)),
    "a branch": (lambda x: lax.cond(jnp.float32(1) > 0, jnp.sin, jnp.cos, x), (0,)),
    "programs within": (lambda x: jax.jit(jax.checkpoint(jax.nn.relu))(x), (0,)),
    "activations": (lambda x: jax.nn.relu(x) + jnp.logaddexp(x, 1.0) + ops.hard_sigmoid(x) + ops.celu(x, 0.5), (0,)),
    "a norm": (lambda x: jnp.linalg.norm(x, axis=-1), (0,)),
    "linear algebra": (lambda x: jnp.linalg.qr(x)[1], (0,)),
    "frequencies": (lambda x: jnp.fft.rfft(x).real, (0,)),
}

MIXED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x - x.mean(0),
    "sum of all": lambda x: x.sum(),
    "one row": lambda x: x[0],
    "order of rows": lambda x: x[::-1],
    "some rows": lambda x: x[: x.shape[0] // 2],
    "shifted rows": lambda x: jnp.roll(x, 1, 0),
    "sorted rows": lambda x: jnp.sort(x, 0),
    "cumulated rows": lambda x: jnp.cumsum(x, 0),
    "rows by rows": lambda x: x.reshape(x.shape[0], -1) @ x.reshape(x.shape[0], -1).T,
    "summed product": lambda x: jnp.einsum("nsi,nsj->ij", x, x),
    "interleaved": lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, 4),
    "regrouped": lambda x: x.reshape(2, -1, 6, 4).sum(0),
    "numbered": lambda x: x + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None, None],
    "the size as a number": lambda x: x / x.shape[0],
    "the size as a constant": lambda x: x * np.full(4, x.shape[0], np.float32),
    "the size within": lambda x: jax.jit(lambda y: y * jnp.sin(jnp.float32(x.shape[0])))(x),
    "other steps": lambda x: jnp.sin(x) if x.shape[0] > 4 else x,
    "side by side": lambda x: jnp.concatenate([x, x]),
    "padded": lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0))),
    "pooled": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"),
    "in time": lambda x: lax.scan(lambda h, t: (h + t, h), jnp.zeros((6, 4)), x)[1],
    "as long as a row says": lambda x: lax.while_loop(lambda y: y.max() < 3, lambda y: y + 1, x),
    "as kernels": lambda x: lax.conv_general_dilated(
        x[:1, None], x[:, None], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    ),
    "random": lambda x: x * jax.random.uniform(jax.random.key(0), x.shape),
    "updated by some rows": lambda x: lax.dynamic_update_slice(x, x[:, :3].reshape(-1, 6, 4) * 0, (0, 0, 0)),
    "other strides": lambda x: x[:, : 4 : (2 if x.shape[0] == 6 else 3)],
    "rows of a table": lambda x: x + jnp.asarray(np.arange(80.0, dtype=np.float32))[: x.shape[0], None, None],
    "gradients of its own": lambda x: _centred_gradients(x),
    "tangents of its own": lambda x: _centred_tangents(x),
    "columns first": lambda x: jnp.ravel(x, order="F").reshape(x.shape[0], -1),
    "as many operands as rows": lambda x: x + jnp.concatenate([jnp.ones((1, 6, 4))] * x.shape[0]),
    "as many results as rows": lambda x: jnp.stack(list(jnp.unstack(x))),
    "scattered": lambda x: x.at[jnp.array([0])].set(0.0),
}


@jax.custom_vjp
def _centred_gradients(x: Any) -> Any:
    return x


_centred_gradients.defvjp(lambda x: (x, None), lambda _, g: (g - g.mean(0),))


@jax.custom_jvp
def _centred_tangents(x: Any) -> Any:
    return x


_centred_tangents.defjvp(lambda primals, tangents: (primals[0], tangents[0] - tangents[0].mean(0)))


def _traces(function: Callable[[Any], Any]) -> list[Any]:
    return [jax.make_jaxpr(function)(jax.ShapeDtypeStruct((size, 6, 4), jnp.float32)) for size in (6, 2)]


@pytest.mark.thinned
@pytest.mark.parametrize("name", APART)
def test_rows_that_stay_apart(name: str) -> None:
    function, axes = APART[name]
    assert row_axes(*_traces(function)) == axes
    x = np.random.default_rng(0).normal(size=(6, 6, 4)).astype(np.float32)
    whole, part = (jax.tree.leaves(jax.jit(function)(rows)) for rows in (x, x[2:4]))
    for all_rows, two_rows, axis in zip(whole, part, axes, strict=True):
        expected = all_rows if axis is None else _rows(all_rows, axis)
        np.testing.assert_allclose(two_rows, expected, atol=1e-5)


def _rows(whole: Any, axis: int) -> Any:
    """Rows 2 and 3 of 6, each of which may be several positions."""
    each = whole.shape[axis] // 6
    return lax.slice_in_dim(whole, 2 * each, 4 * each, axis=axis)


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_meet(name: str) -> None:
    with pytest.raises(MixedRows):
        row_axes(*_traces(MIXED[name]))
