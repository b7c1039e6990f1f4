"""The source of a network: it computes the network's calls, is formatted, and keeps every path."""

import pytest
from flax import nnx

from jaxensemble.source import print_source
from tests.helpers.formatting import ruff_accepts, ruff_finds_nothing
from tests.helpers.networks.cases import CASES
from tests.helpers.networks.plain import trees
from tests.helpers.sketch import Sketch, X, assert_same, at, draw, made, run_both


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_source_computes_what_the_calls_say(case: str) -> None:
    build, shapes = CASES[case]
    _, actual, expected = run_both(build(), *(draw(*shape) for shape in shapes))
    assert_same(actual, expected)


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_source_is_formatted(case: str) -> None:
    text = print_source(CASES[case][0]())
    assert ruff_accepts(text), text
    if case != "odd_names":  # B009 would have `ﬁ` spelled as an attribute, which Python reads as `fi`
        assert ruff_finds_nothing(text), text
    assert max(map(len, text.splitlines())) <= 120


def test_the_formatting_test_can_fail() -> None:
    assert not ruff_accepts("x = ( 1)\n")
    assert not ruff_finds_nothing("import os\n")


@pytest.mark.parametrize("case", CASES)
def test_every_path_is_kept(case: str) -> None:
    network = CASES[case][0]()
    model = made(network)
    for layer in network.layers:
        assert type(at(model, layer.path)).__name__ == layer.type.partition(".")[2]
    for variable in network.variables:
        assert at(model, variable.path).shape == variable.shape
        assert at(model, variable.path)[...].dtype == variable.dtype
    stored = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    held = [*(layer.path + "." for layer in network.layers), *(variable.path for variable in network.variables)]
    assert all(path.startswith(tuple(held)) for path in stored)


def test_nested_inputs_and_outputs() -> None:
    x = draw(2, 4)
    _, actual, expected = run_both(trees(), x, (x + 1, [x + 2]), {"mask": x, "none": None})
    assert_same(actual, expected)
    assert ruff_accepts(print_source(trees()))


def test_what_is_one_value_in_some_calls_alone_is_skipped_nowhere() -> None:
    """Steps that take two values of one call are kept, even if these are one value in another call."""
    s = Sketch("Pairs")
    y = X
    for k in range(2):
        for other in (y, X) if k else (X, X):
            with s.inside(f"pair{k}", "Pair"):
                y = s.linear(f"pair{k}.fc", y, 4, 4)
                y = s.call("jnp.sin", s.call("*", y, other))
                y = s.call("jnp.square", s.call("+", y, 1)) if k else y
    network = s.network((X,), y)
    _, actual, expected = run_both(network, draw(2, 4))
    assert_same(actual, expected)


def test_what_a_recurrent_layer_gives_stays_whole_where_it_is_read_as_a_whole() -> None:
    s = Sketch("Whole")
    whole = s.layer("rnn", "layers.LSTM", X, in_features=4, hidden_features=4)
    state = s.call("[]", whole, 1)
    _, actual, expected = run_both(s.network((X,), (s.call("[]", state, 0), whole)), draw(3, 4))
    assert_same(actual, expected)
