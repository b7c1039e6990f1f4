"""The class of a network: one for equal networks, shown in tracebacks, and quick to make."""

import inspect
import linecache
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble.modules.build import skeleton
from jaxensemble.modules.classes import load_class
from jaxensemble.modules.state import flatten, split
from jaxensemble.source import print_source
from tests.helpers.formatting import ruff_accepts, ruff_finds_nothing
from tests.helpers.networks.plain import lenet, sequential
from tests.helpers.sketch import Sketch, X, draw, made


def test_a_network_without_training_mode_says_why() -> None:
    s = Sketch("Frozen")
    reason = 'captured in "eval" mode, ' + "because the forward does something else in training mode, " * 4
    network = s.network((X,), s.linear("fc", X, 4, 4), evaluation_only=reason)
    model = made(network)
    with pytest.raises(ValueError) as caught:
        model.train()
    assert caught.value.args == (reason,)
    model.eval()
    assert ruff_accepts(print_source(network)) and ruff_finds_nothing(print_source(network))


def test_equal_networks_share_a_class_and_a_structure() -> None:
    cls = load_class(lenet())
    assert cls is load_class(lenet())
    graphs = [nnx.graphdef(made(sequential())) for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_source_shows_in_tracebacks_and_inspect() -> None:
    cls = load_class(lenet())
    model: Any = made(lenet())
    assert inspect.getsource(cls).startswith("class LeNet(nnx.Module):")
    linecache.checkcache()
    with pytest.raises(Exception) as caught:
        model(jnp.ones((2, 3)))
    assert "x = nnx.relu(self.conv1(x))" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_the_class_jits_and_differentiates() -> None:
    model: Any = made(sequential())
    x = draw(2, 4)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), model(x), rtol=1e-5, atol=1e-5)
    gradients = nnx.grad(lambda m: m(x).sum())(model)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_a_long_chain_of_layers_that_differ_takes_little() -> None:
    """Runs of layers that end soon are given up soon: otherwise the time would grow with the third power."""
    s = Sketch("Chain")
    y = X
    for k in range(300):
        y = s.layer(f"b{k}", "nnx.Linear", y, in_features=4, out_features=4, use_bias=bool(k % 2))
    network = s.network((X,), y)
    before, events = sys.getprofile(), 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1

    sys.setprofile(count)
    try:
        text = print_source(network)
    finally:
        sys.setprofile(before)
    assert "self.b299 = nnx.Linear(4, 4, use_bias=True, rngs=rngs)" in text
    assert events < 4_000_000, events


def test_shapes_are_found_without_counting_random_keys() -> None:
    """Layers keep the random streams that they would get without the shortcut."""
    s = Sketch("Net")
    y = s.call("[]", s.layer("rnn", "layers.LSTM", X, in_features=4, hidden_features=4, num_layers=2, rate=0.5), 0)
    network = s.network((X,), s.layer("drop", "nnx.Dropout", y, rate=0.5))
    expected = split(nnx.eval_shape(lambda: load_class(network)(rngs=nnx.Rngs(0))))
    found = skeleton(network)
    for kind in ("params", "rngs"):
        leaves, others = flatten(getattr(found, kind)), flatten(getattr(expected, kind))
        assert [(k, x.shape, x.dtype) for k, x in leaves.items()] == [(k, x.shape, x.dtype) for k, x in others.items()]
    assert "_Uncounted" not in str(found.graphdef)
