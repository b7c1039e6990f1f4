"""Settings of XLA that plans name: known ones reach the compiler, others are refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxensemble import Ensemble, InputError, Plan
from jaxensemble.running import compilers
from jaxensemble.running.compilers import COMPILERS, compile_with, compiler_names, compiler_options, has_compiler
from jaxensemble.running.members import call_members

UNKNOWN: dict[str, Any] = {"xla_no_such_option": 1}


def scale(x: Any, by: int) -> Any:
    return x * by


def test_names_belong_to_platforms() -> None:
    assert compiler_names() == ["eigen", "graphs"]
    assert has_compiler("eigen", "cpu") and compiler_options("eigen", "cpu") == COMPILERS["cpu"]["eigen"]
    for name, platform in (("llvm", "cpu"), ("graphs", "cpu"), ("eigen", "gpu"), ("eigen", "tpu")):
        assert not has_compiler(name, platform)
        with pytest.raises(InputError, match=f"{name!r}, but on {platform} there are"):
            compiler_options(name, platform)
    assert compiler_options(None, "tpu") == {}
    with pytest.raises(InputError, match="none: leave it out"):
        compiler_options("eigen", "tpu")


def test_the_table_cannot_be_changed_by_what_is_returned() -> None:
    compiler_options("eigen", "cpu").clear()
    assert compiler_options("eigen", "cpu")


def test_options_that_xla_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "COMPILERS", {"cpu": {"newer": UNKNOWN}})
    assert compiler_names() == ["newer"] and not has_compiler("newer", "cpu")
    with pytest.raises(InputError, match="lacks it: leave it out"):
        compile_with(scale, "newer", "cpu", "by")


def test_equal_arguments_give_the_same_object() -> None:
    eigen, plain = (compile_with(scale, name, "cpu", "by") for name in ("eigen", None))
    assert eigen is compile_with(scale, "eigen", "cpu", "by")
    assert plain is compile_with(scale, None, "cpu", "by") and plain is not eigen
    assert float(eigen(2.0, by=3)) == float(plain(2.0, by=3)) == 6


def test_options_hold_where_programs_cannot_be_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy arrays as weights: the call is traced, with the options of its plan."""
    given: dict[Any, Any] = {}
    plain = jax.jit
    compilers._jit.cache_clear()

    def jit(function: Any, **settings: Any) -> Any:
        given[function] = settings.get("compiler_options")
        return plain(function, **settings)

    monkeypatch.setattr(jax, "jit", jit)
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    ensemble = jax.tree.map(np.asarray, Ensemble.from_modules([module]))
    x = jnp.ones((4, 3))
    np.testing.assert_allclose(ensemble(x, plan=Plan(compiler="eigen"))[0], module(x), rtol=1e-6)
    assert given[call_members] == COMPILERS["cpu"]["eigen"]
    with pytest.raises(InputError, match="NumPy arrays as weights"):
        ensemble.prepare(x)
