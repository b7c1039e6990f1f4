"""Wrong arguments of every public function raise short errors of the project's own."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxensemble import Ensemble, Plan, TrainState, fit, train_step, verify
from jaxensemble.errors import (
    FIRST,
    LINES,
    POINTER,
    InputError,
    MemberError,
    MemberIndexError,
    describe_error,
    first_line,
)
from tests.helpers.refusing import refusal

X, Y = np.ones((4, 3), "float32"), np.zeros((4, 2), "float32")
ENSEMBLE = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(2)])
STATE = TrainState.create(ENSEMBLE, optax.sgd(0.1), jax.random.key(0))


def mse(outputs: Any, targets: Any) -> Any:
    return jnp.mean((outputs - targets) ** 2)


def fitted(**options: Any) -> Any:
    return fit(STATE, **{"inputs": X, "targets": Y, "loss": mse, "epochs": 1, "batch": 2, "progress": False} | options)


def created(**options: Any) -> Any:
    return TrainState.create(**{"ensemble": ENSEMBLE, "optimizer": optax.sgd(0.1), "key": jax.random.key(0)} | options)


def options(**values: list[Any]) -> list[dict[str, Any]]:
    """One value at a time."""
    return [{name: value} for name, several in values.items() for value in several]


NO_ARRAYS = [None, "a", object(), np.array([["a"] * 3]), jax.random.key(0)]
NO_PATHS = [None, 3, b"x", [], object(), "a\0b"]
NO_ENSEMBLES = [None, 3, "a", [ENSEMBLE], nnx.Linear]

WRONG: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "call": (lambda x: ENSEMBLE(x), NO_ARRAYS),
    "each": (lambda x: ENSEMBLE.each(x), NO_ARRAYS),
    "update": (lambda x: ENSEMBLE.update(x), NO_ARRAYS),
    "predict": (lambda x: ENSEMBLE.predict(x), NO_ARRAYS),
    "tune": (lambda x: ENSEMBLE.tune(x), NO_ARRAYS),
    "explain": (lambda x: ENSEMBLE.explain(x), NO_ARRAYS),
    "options of a call": (lambda o: ENSEMBLE(X, **o), options(key=[3, "a", object()], plan=[3, "fast", Plan, {}])),
    "options of predict": (
        lambda o: ENSEMBLE.predict(X, **o),
        options(task=["no", None, 3], outputs_are=["x"], class_axis=["a", 9]),
    ),
    "index": (lambda k: ENSEMBLE[k], [9, -9, "a", None, 1.5, object(), [0, 9], [True], [[0]], [], slice("a")]),
    "astype": (lambda dtype: ENSEMBLE.astype(dtype), [None, 3, "no", "int32", object, "float128", "float64"]),
    "with_params": (lambda params: ENSEMBLE.with_params(params), [None, 3, {}, {"a": 1}, "a", ENSEMBLE, [1]]),
    "concatenate": (Ensemble.concatenate, [None, 3, [], [3], [ENSEMBLE, None], ENSEMBLE, "ab"]),
    "from_modules": (Ensemble.from_modules, [None, 3, [], [3], "ab", [ENSEMBLE]]),
    "save": (ENSEMBLE.save, [*NO_PATHS, Path("no") / "such" / "place", __file__]),
    "load": (Ensemble.load, [*NO_PATHS, "no/such/place", __file__, Path(__file__).parent]),
    "verify": (verify, [*NO_PATHS, "no/such/place"]),
    "create": (
        lambda o: created(**o),
        options(
            ensemble=NO_ENSEMBLES,
            optimizer=[None, 3, optax.sgd],
            key=[None, "a"],
            randomness=["x"],
            frozen=[3, "kernel", ["no"]],
            dropout=["a", 2.0, {"a": 1}],
            hyperparams=[3, {"a": 1}],
        ),
    ),
    "step": (lambda state: train_step(state, X, Y, loss=mse), NO_ENSEMBLES),
    "step of inputs": (lambda x: train_step(STATE, x, Y, loss=mse), NO_ARRAYS),
    "step of targets": (lambda y: train_step(STATE, X, y, loss=mse), [None, "a", (), {"a": Y}, [Y], Y[:3]]),
    "step with a loss": (
        lambda loss: train_step(STATE, X, Y, loss=loss),
        [None, "a", lambda o: o, lambda o, t: o, lambda o, t: 1 / 0, lambda o, t: "a", lambda o, t: float(o.sum())],
    ),
    "fit": (
        lambda o: fitted(**o),
        options(
            inputs=NO_ARRAYS[:2],
            targets=[None, "a"],
            loss=[None, lambda o: o],
            epochs=[0, "a", 1.5, None],
            batch=[0, "a", -1, None],
            shuffle=["x", 3],
            validation=[3, (X,), (X, "a")],
            metrics=[3, {"a": 3}],
            patience=[3],
            checkpoints=[3],
            plan=[3, "auto"],
        ),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_told_of(what: str) -> None:
    call, arguments = WRONG[what]
    for argument in arguments:
        refusal(lambda argument=argument: call(argument))


def test_an_index_that_is_not_there_is_an_index_error_too() -> None:
    assert isinstance(refusal(lambda: ENSEMBLE[9]), IndexError) and issubclass(MemberIndexError, InputError)


def test_a_loss_that_fails_is_named_with_what_it_was_given() -> None:
    error = refusal(lambda: train_step(STATE, X, np.zeros((4, 5), "float32"), loss=mse))
    assert "mse cannot be called with outputs and targets float32[4,2] and float32[4,5]" in str(error)
    assert isinstance(error.__cause__, TypeError)


ROWS = [f"  layer{k}.weight: expected [3], got [4]" for k in range(50)]
MESSAGES = {
    "one sentence": ("it is wrong.", ["it is wrong."]),
    "rows that fit": ("\n".join(["wrong:", *ROWS[:9]]), ["wrong:", *ROWS[:9]]),
    "rows": ("\n".join(["wrong:", *ROWS, "Mend it."]), ["wrong:", *ROWS[:4], "  ... and 46 more", "Mend it.", POINTER]),
    "two lists": (
        "\n".join(["wrong:", "a:", *ROWS, "b:", *ROWS[:2]]),
        ["wrong:", "a:", *ROWS[:2], "  ... and 48 more", "b:", *ROWS[:2], POINTER],
    ),
    "a long sentence": (f"{'a' * 150}: {'b' * 40}. {'c' * 60}", [f"{'a' * 150}: {'b' * 40}.", "c" * 60]),
    "no sentence": ("a" * 250, ["a" * 200, "a" * 50]),
    "a long text": ("\n".join(map(str, range(30))), [*map(str, range(6)), "28", "29", POINTER]),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_are_short_and_details_whole(case: str) -> None:
    message, lines = MESSAGES[case]
    error = MemberError(message)
    assert str(error).splitlines() == lines and error.details == message
    for again in (pickle.loads(pickle.dumps(error)), MemberError(str(error))):
        assert str(again) == str(error)
    assert pickle.loads(pickle.dumps(error)).details == message


def test_many_lists_and_foreign_words() -> None:
    lists = "\n".join(line for name in "abcdef" for line in (f"{name}:", *ROWS))
    error = InputError(f"{'x' * 190}. wrong:\n{lists}", details="Traceback\n  more")
    assert len(str(error).splitlines()) <= LINES and len(str(error).splitlines()[0]) <= FIRST
    assert error.details.endswith("Traceback\n  more") and str(error).endswith(POINTER)
    assert first_line(ValueError("\n  a\nb")) == "a" and describe_error(KeyError()) == "KeyError"
