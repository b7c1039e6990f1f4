"""Networks without source: unsafe names, and functions that a network may not call."""

import pytest

from jaxensemble.errors import InputError
from jaxensemble.network.network import Call, Dtype, Func, Layer, Network, Ref
from jaxensemble.source import print_source
from tests.helpers.sketch import Sketch, X, assert_same, draw, run_both


def refuse(network: Network, match: str) -> None:
    with pytest.raises(InputError, match=match):
        print_source(network)


@pytest.mark.parametrize("name", ["train", "_pytree__state", "__init__", "set_attributes"])
def test_names_of_nnx_module_are_refused(name: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.linear(name, X, 4, 4)), name)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "jnp.save",
        "jnp.load",
        "jax.pure_callback",
        "jnp.a b",
        "jnp._src.x",
        *(f"jnp.{name}" for name in "apply_along_axis apply_over_axes vectorize piecewise frompyfunc ufunc".split()),
        *(f"jnp.{name}" for name in "fromfunction mask_indices fromfile frombuffer savez printoptions".split()),
        *(f"lax.{name}" for name in "map scan fori_loop while_loop switch cond associative_scan reduce".split()),
        *(f"lax.{name}" for name in "composite platform_dependent reduce_window custom_root scatter_apply".split()),
        *(f"lax.{name}" for name in "psum all_gather axis_index rng_uniform create_token stage".split()),
        *(f"jax.{name}" for name in "scipy.linalg.funm vmap lax.map lax.add experimental.io_callback".split()),
        ".tofile",
        ".x; y",
        "nnx.x()",
        "import",
    ],
)
def test_functions_that_are_none_on_arrays_are_refused(target: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call(target, X)), "a network may call|names nothing")


@pytest.mark.parametrize("nested", [False, True])
def test_functions_are_handed_to_recurrent_functions_alone(nested: bool) -> None:
    s = Sketch("Net")
    function = Func("jnp.add")
    out = s.call("jnp.pad", X, 1, mode=[function, X] if nested else function)
    refuse(s.network((X,), out), "may pass functions only to ops.rnn and ops.rnn_cell; got jnp.add as an argument")


@pytest.mark.parametrize(
    "type_", ["nnx.relu", "os.PathLike", "nnx.Linear(1, 2)", "nnx.NoSuchLayer", "nnx.Param", "jnp.ndarray"]
)
def test_types_that_are_no_layers_are_refused(type_: str) -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", type_, X)), "layer|names nothing")


def test_unknown_options_are_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", "nnx.Linear", X, in_features=1, out_features=1, bogus=1)), "'bogus'")


def test_hostile_names_of_arguments_and_dtypes_are_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call("jnp.add", X, 1, **{"x=print())#": 1})), "identifier")
    s = Sketch("Net")
    refuse(s.network((X,), s.call("+", X, s.variable("w", (1,), dtype="float32)#"))), "dtype")
    s = Sketch("Net")
    refuse(s.network((X,), s.layer("fc", "nnx.Linear", X, in_features=1, out_features=1, **{"a=1": 1})), "'a=1'")


def test_hostile_names_of_classes_and_inputs_are_made_safe() -> None:
    s = Sketch('A"""\nimport os\n')
    x = Ref("x, y=print()")
    with s.inside("inner", "B:\n    pass\nprint()"):
        y = s.linear("inner.fc", x, 4, 4)
    model, actual, expected = run_both(s.network((x,), y), draw(2, 4))
    assert_same(actual, expected)
    assert type(model).__name__ == "A_import_os"


def test_a_dtype_that_is_none_is_refused() -> None:
    s = Sketch("Net")
    refuse(s.network((X,), s.call(".astype", X, Dtype("load"))), "dtype")


def test_missing_modules_are_refused() -> None:
    layer = Layer("a.fc", "nnx.Linear", {"in_features": 1, "out_features": 1})
    network = Network("Net", (X,), Ref("y"), (layer,), (), (Call("y", "layer:a.fc", (X,)),), {"": ("Net", "module")})
    refuse(network, "'a' is missing")


def test_lists_that_would_be_huge_are_refused() -> None:
    s = Sketch("Net")
    s.module("blocks", "ModuleList", "sequence")
    refuse(s.network((X,), s.linear("blocks.1000000000", X, 4, 4)), "too high")
