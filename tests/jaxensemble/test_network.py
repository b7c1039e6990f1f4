"""A network as data: through JSON and back, and what does not hold together."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxensemble import codec
from jaxensemble.codec import from_json, to_json
from jaxensemble.errors import InputError
from jaxensemble.network import Call, Dtype, Func, Layer, Network, Ref, Slice, Var, Variable
from jaxensemble.source import print_source
from jaxensemble.validation import validate
from tests.jaxensemble.test_source import CASES, trees

SIMPLE = Network(
    name="Net",
    inputs=(Ref("x"),),
    outputs=Ref("y"),
    layers=(Layer("enc.fc", "nnx.Linear", {"in_features": 2, "out_features": 2}),),
    variables=(Variable("enc.scale", "param", (2,), "float32"),),
    calls=(
        Call("h", "layer:enc.fc", (Ref("x"),), {}, ("enc",)),
        Call("y", "*", (Var("enc.scale"), Ref("h")), {}, ("enc",)),
    ),
    modules={"": ("Net", "module"), "enc": ("Encoder", "module")},
    training=("enc.fc",),
)


@pytest.mark.parametrize("case", [*CASES, "trees", "simple"])
def test_json_gives_back_an_equal_network(case: str) -> None:
    network = {"trees": trees, "simple": lambda: SIMPLE}.get(case, lambda: CASES[case][0]())()
    again = from_json(to_json(network))
    assert repr(again) == repr(network)
    assert print_source(again) == print_source(network)


names = st.text(min_size=1, max_size=5)
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), names, st.just(...),
    names.map(Ref), names.map(Var), names.map(Dtype), names.map(Func), st.builds(Slice, st.integers(), st.none()),
)  # fmt: skip
args = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple))


@given(args=st.lists(args, max_size=3), options=st.dictionaries(names, args, max_size=2))
def test_any_argument_survives_json(args: list[Any], options: dict[str, Any]) -> None:
    calls = (Call("y", "jnp.add", tuple(args), options),)
    layers = (Layer("fc", "nnx.Linear", options),)
    network = Network("Net", (), None, layers, (), calls, {"": ("Net", "module")})
    fields = json.loads(to_json(network))
    assert repr(codec._network(fields)) == repr(network)  # repr: NaNs are equal, and 1 is not True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"format": 1}',
        '{"format": 2}',
        "[" * 100_000,
        to_json(SIMPLE).replace("[\n", "[NaN,\n", 1),
    ],
    ids=["nothing", "cut", "list", "number", "empty", "bare", "format", "deep", "nan"],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no network in JSON"):
        from_json(text)


def broken(**changes: Any) -> Network:
    return dataclasses.replace(SIMPLE, **changes)


LINEAR = SIMPLE.layers[0]

BROKEN = {
    "'y' is defined twice": broken(calls=(*SIMPLE.calls, SIMPLE.calls[1])),
    "'x' is defined twice": broken(inputs=(Ref("x"), (Ref("x"),))),
    "uses 'h' before it is defined": broken(calls=SIMPLE.calls[::-1]),
    "the outputs use 'z'": broken(outputs={"z": [Ref("z")]}),
    "the path 'enc.fc'": broken(layers=(LINEAR, LINEAR)),
    "inside the layer 'enc.fc'": broken(variables=(*SIMPLE.variables, Variable("enc.fc.b", "param", (), "float32"))),
    "'enc' is missing": broken(modules={"": ("Net", "module")}),
    "'' is missing": broken(modules={"enc": ("Net", "module")}),
    "'other' is missing": broken(calls=tuple(dataclasses.replace(c, scope=("other",)) for c in SIMPLE.calls)),
    "is in `modules`": broken(modules={**SIMPLE.modules, "enc.fc": ("Linear", "module")}),
    "got 'class'": broken(modules={"": ("Net", "class"), "enc": ("Net", "module")}),
    "no such layer": broken(layers=()),
    "no variable 'enc.scale'": broken(variables=()),
    "expected a kind in": broken(variables=(Variable("enc.scale", "weight", (2,), "float32"),)),  # type: ignore[arg-type]
    "a shape is a tuple of sizes": broken(variables=(Variable("enc.scale", "param", (-2,), "float32"),)),
    "`training` names 'enc'": broken(training=("enc",)),
    "expected 2 operands; got 1": broken(calls=(Call("y", "+", (Ref("x"),)),)),
    "the number of an axis": broken(calls=(Call("y", ".shape", (Ref("x"), 0.5)),)),
    "first argument of a method": broken(calls=(Call("y", ".sum", (3,)),)),
    "is no argument": broken(calls=(Call("y", "jnp.add", (b"", {1})),)),  # type: ignore[arg-type]
    "is no option": broken(layers=(Layer("enc.fc", "nnx.Linear", {"in_features": object()}),)),  # type: ignore[dict-item]
    "must be a tree of references": broken(outputs=("y",)),
    "must be a string; got 3": broken(name=3),
    "names joined by dots; got 'enc..fc'": broken(layers=(dataclasses.replace(LINEAR, path="enc..fc"),)),
}


@pytest.mark.parametrize("match", BROKEN)
def test_what_does_not_hold_together_is_refused(match: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(BROKEN[match])
    assert match in str(caught.value)


def test_all_that_is_wrong_is_listed() -> None:
    with pytest.raises(InputError) as caught:
        validate(broken(layers=(), outputs=Ref("z"), modules={}))
    assert str(caught.value).count("\n") >= 5


def test_json_is_validated() -> None:
    with pytest.raises(InputError, match="does not hold together"):
        from_json(to_json(broken(outputs=Ref("z"))))


def test_numbers_keep_their_signs() -> None:
    call = Call("y", "*", (Ref("x"), complex(-0.0, math.inf)))
    again = from_json(to_json(broken(calls=(call,), layers=(), variables=(), training=())))
    assert repr(again.calls[0].args[1]) == repr(complex(-0.0, math.inf))


def test_a_network_prints_its_own_source() -> None:
    assert SIMPLE.source() == print_source(SIMPLE)
