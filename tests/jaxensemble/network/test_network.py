"""A network as data: through JSON and back, and data that is inconsistent."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxensemble import Ensemble
from jaxensemble.errors import InputError
from jaxensemble.modules.classes import load_class
from jaxensemble.network import json_format
from jaxensemble.network.inputs import check_inputs
from jaxensemble.network.json_format import from_json, to_json
from jaxensemble.network.network import (
    Call,
    Dtype,
    Fixed,
    Func,
    Layer,
    Network,
    Record,
    Ref,
    Sizes,
    Slice,
    Var,
    Variable,
)
from jaxensemble.network.validation import validate_network
from jaxensemble.source import print_source
from tests.helpers.networks.cases import CASES
from tests.helpers.networks.plain import trees

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


def records() -> Network:
    """Everything that may be in inputs and outputs besides references."""
    inner = Record("Pair", "namedtuple", {"first": Ref("y"), "second": Fixed(math.inf)})
    outer = Record("Output", "mapping", {"loss": None, "logits": Ref("y"), "more": (inner, [Fixed("text"), Fixed(1j)])})
    inputs = (Ref("x"), Fixed(True), None, [Fixed(2.5), {"a": Fixed('"""')}])
    outputs = {"z": outer, "a": Record("Result", "dataclass", {"y": Ref("y")})}
    return dataclasses.replace(SIMPLE, inputs=inputs, outputs=outputs, arguments=("x", "flag", "mask", ""))


@pytest.mark.parametrize("case", [*CASES, "trees", "simple", "records"])
def test_json_gives_back_an_equal_network(case: str) -> None:
    network = {"trees": trees, "simple": lambda: SIMPLE, "records": records}.get(case, lambda: CASES[case][0]())()
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
    assert repr(json_format._network(fields)) == repr(network)  # repr: NaNs are equal, and 1 is not True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "no network in JSON"),
        ("3", "no network in JSON"),
        ("{}", "no network in JSON"),
        ('{"format": 1}', "no network in JSON"),
        ('{"format": 2}', "no network in JSON"),
        ("[" * 100_000, "no JSON"),
        (to_json(SIMPLE).replace("[\n", "[NaN,\n", 1), "NaN is no number of JSON"),
        (to_json(SIMPLE).replace('"name":', '"name": "Other", "name":', 1), "'name' appears twice in one object"),
        (to_json(SIMPLE).replace('"options": {', '"options": {"use_bias": true, "use_bias": false, ', 1), "'use_bias'"),
    ],
    ids=["nothing", "cut", "list", "number", "empty", "bare", "format", "deep", "nan", "two names", "two options"],
)
def test_what_is_no_network_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
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
    "no layer at this path": broken(layers=()),
    "no variable 'enc.scale'": broken(variables=()),
    "expected a kind in": broken(variables=(Variable("enc.scale", "weight", (2,), "float32"),)),  # type: ignore[arg-type]
    "a shape is a tuple of sizes": broken(variables=(Variable("enc.scale", "param", (-2,), "float32"),)),
    "`sizes` does not say what 'length'": broken(input_shapes={"x": (None, "length")}),
    "None for the batch, and names": broken(input_shapes={"x": (None, "a length")}, sizes={"a length": Sizes()}),
    "numbers above 0": broken(input_shapes={"x": (None, "length")}, sizes={"length": Sizes(multiple=0)}),
    "with numbers above 0": broken(sizes={"length": Sizes(most="8")}),  # type: ignore[arg-type]
    "`training` names 'enc'": broken(training=("enc",)),
    "expected 2 operands; got 1": broken(calls=(Call("y", "+", (Ref("x"),)),)),
    "the number of an axis": broken(calls=(Call("y", ".shape", (Ref("x"), 0.5)),)),
    "first argument of a method": broken(calls=(Call("y", ".sum", (3,)),)),
    "is no argument": broken(calls=(Call("y", "jnp.add", (b"", {1})),)),  # type: ignore[arg-type]
    "is no option": broken(layers=(Layer("enc.fc", "nnx.Linear", {"in_features": object()}),)),  # type: ignore[dict-item]
    "must be a tree of references": broken(outputs=("y",)),
    "must be a string; got 3": broken(name=3),
    "`arguments` must name each of 1 inputs": broken(arguments=("x", "y")),
    "`arguments` must be names; got 'x, *y'": broken(arguments=("x, *y",)),
    "`arguments` must be names; got 'class'": broken(arguments=("class",)),
    "`arguments` has 'x' twice": broken(inputs=(Ref("x"), Ref("z")), arguments=("x", "x")),
    "`inputs` must not hold records": broken(inputs=(Ref("x"), Record("R", "dataclass", {"z": Ref("z")}))),
    "expected a kind in ('dataclass', 'namedtuple', 'mapping'); got 'exec'": broken(
        outputs=Record("R", "exec", {"y": Ref("y")})  # type: ignore[arg-type]
    ),
    "record 'R()': 'R()' cannot be a name in it": broken(outputs=[Record("R()", "mapping", {"y": Ref("y")})]),
    "'__class__' cannot be a name in it": broken(outputs=Record("R", "dataclass", {"__class__": Ref("y")})),
    "'_y' cannot be a name in it": broken(outputs=Record("R", "namedtuple", {"_y": Ref("y")})),
    "Fixed(value=b'')": broken(inputs=(Ref("x"), Fixed(b""))),  # type: ignore[arg-type]
    "names joined by dots; got 'enc..fc'": broken(layers=(dataclasses.replace(LINEAR, path="enc..fc"),)),
}


@pytest.mark.parametrize("match", BROKEN)
def test_what_does_not_hold_together_is_refused(match: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_network(BROKEN[match])
    assert match in str(caught.value)


def test_networks_of_the_first_layout_are_read() -> None:
    fields = json.loads(to_json(SIMPLE)) | {"format": 1}
    del fields["arguments"]
    assert repr(from_json(json.dumps(fields))) == repr(SIMPLE)


def test_a_network_of_every_kind_is_called_by_name_and_returns_what_it_says() -> None:
    """Without PyTorch: the arguments that are fixed, and objects made of the network's own data."""
    network = records()
    module = load_class(network)(rngs=nnx.Rngs(0))
    ensemble = Ensemble.from_modules([module, module], network=network)
    x = np.ones((3, 2), np.float32)
    outputs = ensemble(x=x, flag=True)
    assert list(outputs) == ["z", "a"]
    assert (type(outputs["z"]).__name__, type(outputs["a"]).__name__) == ("Output", "Result")
    assert outputs["z"].more[0].second == math.inf
    assert outputs["z"]["more"][1] == ["text", 1j]
    assert outputs["a"].y.shape == outputs["z"].more[0].first.shape == (2, 3, 2)
    np.testing.assert_array_equal(ensemble(x, True, None, [2.5, {"a": '"""'}])["a"].y, outputs["a"].y)
    with pytest.raises(InputError) as caught:
        ensemble(x, 1, x, [2.5, {"a": "b"}])
    assert str(caught.value).count("was fixed to") == 3
    assert network.fixed == {"flag": True, "mask": None, "inputs[3][0]": 2.5, "inputs[3][1]['a']": '"""'}


def test_all_that_is_wrong_is_listed() -> None:
    with pytest.raises(InputError) as caught:
        validate_network(broken(layers=(), outputs=Ref("z"), modules={}))
    assert str(caught.value).count("\n") >= 5


def test_json_is_validated() -> None:
    with pytest.raises(InputError, match="does not hold together"):
        from_json(to_json(broken(outputs=Ref("z"))))


def test_sizes_of_inputs_that_are_open_by_name() -> None:
    """Sizes are the same for all inputs, within their limits, and survive JSON."""
    network = broken(
        inputs=(Ref("x"), Ref("mask")),
        input_shapes={"x": (None, "length", 2), "mask": (None, "length")},
        sizes={"length": Sizes(4, 12, 2)},
    )
    assert from_json(to_json(network)) == network
    check_inputs(network, (np.ones((3, 6, 2)), np.ones((3, 6))), each=False)
    check_inputs(network, (np.ones((5, 3, 6, 2)), np.ones((5, 3, 6))), each=True)
    for shapes, text in (
        (((3, 6, 2), (3, 8)), "one batch size N, one length; got `x`: length of 6; `mask`: length of 8"),
        (((3, 5, 2), (3, 5)), "`x`, `mask`: length of 5, which must be a multiple of 2, at least 4, at most 12"),
        (((3, 14, 2), (4, 14)), "`x`: batch of 3; `mask`: batch of 4; `x`, `mask`: length of 14, which must be"),
        (((3, 6), (3, 6)), "`x`: expected [N, length, 2], got [3, 6]"),
    ):
        with pytest.raises(InputError) as caught:
            check_inputs(network, tuple(map(np.ones, shapes)), each=False)
        assert text in " ".join(str(caught.value).split())


def test_two_axes_of_one_input_may_have_one_size() -> None:
    network = broken(input_shapes={"x": (None, 1, "side", "side")}, sizes={"side": Sizes()})
    check_inputs(network, (np.ones((2, 1, 8, 8)),), each=False)
    with pytest.raises(InputError, match="`x`: side of 16; `x`: side of 32"):
        check_inputs(network, (np.ones((2, 1, 16, 32)),), each=False)


def test_numbers_keep_their_signs() -> None:
    call = Call("y", "*", (Ref("x"), complex(-0.0, math.inf)))
    again = from_json(to_json(broken(calls=(call,), layers=(), variables=(), training=())))
    assert repr(again.calls[0].args[1]) == repr(complex(-0.0, math.inf))
