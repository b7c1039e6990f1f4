"""Annotated shapes and dtypes are checked while tests run: a wrong one raises, and doctests are still found."""

import doctest
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jaxensemble import layers, ops
from jaxensemble.ops import pointwise
from jaxensemble.training import losses
from jaxensemble.uncertainty import checks
from tests.helpers.shapes import ROOMS

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "jaxensemble.ops": (lambda: ops.embed(jnp.ones((2, 3, 4)), jnp.zeros(2, int)), "parameter 'embedding'"),
    "jaxensemble.layers": (lambda: layers.BatchNorm(2)(jnp.ones((3, 2), int)), "parameter 'x'"),
    "jaxensemble.uncertainty": (lambda: checks.require_labels(jnp.zeros(2), 3), "parameter 'labels'"),
    "jaxensemble.training.losses": (lambda: losses._made_up(jnp.ones(2), 0, 1, 0, 0.5), "parameter 'label'"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_wrong_argument_raises(room: str) -> None:
    call, message = WRONG[room]
    with pytest.raises(TypeCheckError, match=message):
        call()


def test_shapes_are_compared_with_each_other() -> None:
    rows, offsets = jnp.ones((3, 2)), jnp.array([0, 2])
    assert ops.bags(rows, offsets, weights=jnp.ones(3)).shape == (2, 2)
    with pytest.raises(TypeCheckError, match="parameter 'weights'"):
        ops.bags(rows, offsets, weights=jnp.ones(1))  # which would broadcast


def test_examples_of_checked_functions_are_found() -> None:
    assert "jaxensemble.ops.pointwise.clamp" in {example.name for example in doctest.DocTestFinder().find(pointwise)}
