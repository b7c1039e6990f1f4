"""Arguments of every kind: by name, flags, numbers, strings and None, lists and dicts of tensors."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble import Ensemble, InputError, TrainState, fit, train_step
from jaxensemble.network.arguments import ENSEMBLE_ARGUMENTS

X = torch.linspace(-1, 1, 24).reshape(6, 4)
MASK = torch.arange(6 * 3).reshape(6, 3) % 2 == 0


class Net(nn.Module):
    """A linear layer, and a forward of any signature that takes the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)


def made(forward: Callable[..., Any], members: int = 2) -> list[nn.Module]:
    """Members of a network with this forward."""
    kind = type("Net", (Net,), {"forward": forward})
    torch.manual_seed(0)
    return [kind().eval() for _ in range(members)]


def assert_gives(ensemble: Ensemble, models: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Checks that the ensemble gives the models' outputs for the same arguments."""
    expected = torch.stack([model(*args, **kwargs) for model in models]).detach().numpy()
    np.testing.assert_allclose(ensemble(*args, **kwargs), expected, rtol=1e-5, atol=1e-6)


def masked(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return self.fc(x) if mask is None else self.fc(x).masked_fill(mask, 0)


def flagged(self: Any, x: Tensor, scale: float = 1.0, double: bool = False, mask: Tensor | None = None) -> Tensor:
    return masked(self, x, mask) * scale * (2 if double else 1)


def alone(self: Any, *, x: Tensor, shift: Tensor) -> Tensor:
    return self.fc(x) + shift


def others(self: Any, x: Tensor, **more: Any) -> Tensor:
    return self.fc(x) * more["by"] + more["shift"]


def starred(self: Any, *xs: Tensor, power: int = 1) -> Tensor:
    return torch.stack([self.fc(x) for x in xs]).sum(0) ** power


def noisy(self: Any, x: Tensor, scale: float = 1.0, text: str = "") -> dict[str, Any]:
    return {"y": self.fc(x) + scale * torch.randn_like(x[:, :3]), "text": text}


def chosen(self: Any, x: Tensor, activation: str = "relu") -> Tensor:
    return getattr(torch, activation)(self.fc(x))


def in_list(self: Any, xs: list[Tensor], weights: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    return torch.stack([self.fc(x) * weight for x, weight in zip(xs, weights, strict=True)]).sum(0)


def in_dict(self: Any, inputs: dict[str, Any]) -> Tensor:
    return self.fc(inputs["x"]) * inputs["by"] + inputs["more"][0]


def cut(self: Any, x: Tensor, columns: int, negative: bool) -> Tensor:
    return (-1 if negative else 1) * self.fc(x)[:, :columns]


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "a mask by name": (masked, (X,), {"mask": MASK}),
    "all by name, in another order": (masked, (), {"mask": MASK, "x": X}),
    "flags by position": (flagged, (X, 2.0, True, None), {}),
    "flags by name": (flagged, (X,), {"double": True, "scale": -0.5, "mask": MASK}),
    "by name only": (alone, (), {"x": X, "shift": X[:, :3]}),
    "any name": (others, (X,), {"by": 3, "shift": X[:, 1:]}),
    "any number": (starred, (X, X.flip(0)), {"power": 2}),
    "a string": (chosen, (X, "tanh"), {}),
    "a list, and a tuple of numbers": (in_list, ([X, X + 1],), {"weights": (2.0, 0.5)}),
    "a dict with a number in it": (in_dict, ({"x": X, "by": 2.5, "more": [X[:, :3], None]},), {}),
    "numbers that shapes depend on": (cut, (X, 2), {"negative": True}),
}


@pytest.mark.thinned
@pytest.mark.parametrize("case", CASES)
def test_arguments(case: str, tmp_path: Path) -> None:
    forward, args, kwargs = CASES[case]
    models = made(forward)
    ensemble = torch_bridge.to_ensemble(models, args, kwargs)  # proves the float64 outputs
    assert_gives(ensemble, models, args, kwargs)
    ensemble.save(tmp_path / "saved")
    loaded = Ensemble.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded(*args, **kwargs), ensemble(*args, **kwargs))
    assert loaded.network == ensemble.network
    for place, value in loaded.network.fixed.items():
        assert f"{place}={value!r}" in ensemble.source() and f"{place}={value!r}" in repr(ensemble)


@pytest.fixture(scope="module")
def ported() -> tuple[list[nn.Module], Ensemble]:
    """`flagged` with a scale, a flag and a mask."""
    models = made(flagged)
    return models, torch_bridge.to_ensemble(models, (X, 2.0), {"double": True, "mask": MASK})


def test_fixed_arguments_may_be_left_out_or_given_again(ported: Any) -> None:
    models, ensemble = ported
    assert ensemble.network.fixed == {"scale": 2.0, "double": True}
    expected = ensemble(X, 2.0, True, MASK)
    for args, kwargs in [
        ((X,), {"mask": MASK}),
        ((), {"mask": MASK, "x": X, "scale": np.float64(2.0)}),
        ((X.numpy(), 2.0), {"mask": MASK.numpy(), "double": np.True_}),
    ]:
        np.testing.assert_array_equal(ensemble(*args, **kwargs), expected)
    module = torch_bridge.to_flax(models[0], (X, 2.0), {"double": True, "mask": MASK})
    np.testing.assert_allclose(module(X.numpy(), mask=MASK.numpy()), expected[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((X, 3.0), {"mask": MASK}, "`scale` was fixed to 2.0 when the network was ported; got 3.0: port it again"),
        ((X, 2), {"mask": MASK}, "`scale` was fixed to 2.0 when the network was ported; got 2:"),
        ((X, X), {"mask": MASK}, "`scale` was fixed to 2.0 when the network was ported; got Tensor"),
        ((X,), {"double": False, "mask": MASK}, "`double` was fixed to True"),
        ((X,), {}, "`mask` is missing"),
        (
            (X,),
            {"mask": MASK, "temperature": 1.0},
            "`temperature` is no argument of the network; .* are x, scale.*left it out, so its default is fixed",
        ),
        ((X, 2.0, True, MASK), {"mask": MASK}, "`mask` is given by position and by name"),
        ((X, 2.0, True, MASK, None), {}, "at most 4 arguments, got 5"),
        ((X,), {"mask": None}, "expected an array, got NoneType"),
        ((X,), {"mask": MASK[:5]}, "batch of 5"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_other_arguments_are_refused(ported: Any, args: tuple[Any, ...], kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        ported[1](*args, **kwargs)


def test_every_way_of_calling_takes_arguments_by_name(ported: Any) -> None:
    models, ensemble = ported
    expected = ensemble(X, mask=MASK)
    both = {"mask": torch.stack([MASK, MASK])}
    np.testing.assert_allclose(ensemble.each(torch.stack([X, X]), **both), expected, rtol=1e-6)
    np.testing.assert_allclose(ensemble.update(X, mask=MASK)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(ensemble.predict(X, task="regression", mask=MASK).mean, expected.mean(0), rtol=1e-6)
    assert ensemble.tune(X, mask=MASK).plan is not None
    assert "plan" in ensemble.explain(X, mask=MASK).lower()
    np.testing.assert_allclose(jax.jit(lambda x, mask: ensemble(x, mask=mask))(X.numpy(), MASK.numpy()), expected)
    assert torch_bridge.check(models, ensemble, (X, 2.0), {"double": True, "mask": MASK}, train=True).passed


def test_training_takes_arguments_as_a_tuple_or_by_name(ported: Any) -> None:
    _, ensemble = ported
    state = TrainState.create(ensemble, optax.sgd(0.1), jax.random.key(0))

    def loss(outputs: Any, targets: Any) -> Any:
        return ((outputs - targets) ** 2).mean()

    targets = np.ones((6, 3), np.float32)
    losses = [
        train_step(state, inputs, targets, loss=loss)[1]
        for inputs in ((X, 2.0, True, MASK), {"x": X, "mask": MASK}, {"x": X, "mask": MASK, "scale": 2.0})
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    np.testing.assert_array_equal(losses[0], losses[2])
    _, history = fit(state, {"x": X, "mask": MASK}, targets, loss=loss, epochs=1, batch=3, progress=False)
    assert np.isfinite(history.loss).all()
    with pytest.raises(InputError, match="`scale` was fixed to 2"):
        train_step(state, {"x": X, "mask": MASK, "scale": 1.0}, targets, loss=loss)


def test_checkpoints_are_loaded_with_arguments_by_name(tmp_path: Path) -> None:
    models = made(flagged)
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)
    ensemble = torch_bridge.load_ensemble(lambda: made(flagged, 1)[0], paths, (X,), {"scale": 0.5, "mask": MASK})
    assert ensemble.proof is not None
    assert_gives(ensemble, models, (X,), {"scale": 0.5, "mask": MASK})


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((X, np.float32(2)), {}, "float32 in input 1"),
        ((X,), {"scale": np.ones(3)}, "ndarray in `scale`"),
        ((X,), {"mask": {"a": object()}}, "object in `mask`"),
        ((X,), {"key": X}, "key: an ensemble has arguments of its own by such names"),
        ((2.0,), {}, "must hold a tensor"),
        ((), {}, "must be a tuple"),
        ((X,), {"unknown": X}, "PyTorch itself cannot run Net on the example inputs"),
        ((X, 1.0), {"scale": 2.0}, "PyTorch itself cannot run Net"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_examples_that_cannot_be_ported_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        torch_bridge.to_flax(made(flagged, 1)[0], args, kwargs)


def test_names_of_an_ensembles_own_are_known() -> None:
    methods = (Ensemble.__call__, Ensemble.each, Ensemble.update, Ensemble.predict, Ensemble.tune, Ensemble.explain)
    kinds = [parameter for method in methods for parameter in inspect.signature(method).parameters.values()]
    assert {p.name for p in kinds if p.kind is p.KEYWORD_ONLY} == ENSEMBLE_ARGUMENTS


def test_forwards_that_draw_numbers_take_arguments_of_every_kind() -> None:
    models = made(noisy)
    ensemble = torch_bridge.to_ensemble(models, (X,), {"scale": 0.1, "text": "noise"})
    assert ensemble.proof is not None
    outputs = ensemble(X, text="noise", key=jax.random.key(0))
    assert (outputs["y"].shape, outputs["text"]) == ((2, 6, 3), "noise")


def test_batch_axes_are_those_of_all_arguments() -> None:
    models = made(lambda self, x, scale, shift: self.fc(x) * scale + shift)
    ensemble = torch_bridge.to_ensemble(
        models, (X.reshape(2, 3, 4), 2.0), {"shift": torch.ones(3)}, batch_axis=(1, 0, None)
    )
    assert ensemble(X.reshape(2, 3, 4)[:, :1], shift=np.ones(3, np.float32)).shape == (2, 2, 1, 3)


def test_strings_cannot_leave_the_docstring() -> None:
    text = '"""\nraise SystemExit  # \\'
    models = made(lambda self, x, text: self.fc(x))
    ensemble = torch_bridge.to_ensemble(models, (X, text), check=False)
    namespace: dict[str, Any] = {}
    exec(ensemble.source(), namespace)
    assert repr(text) in namespace["__doc__"]


FOREIGN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "numpy": ((np.ones((6, 4), "float32"),), {}, r"got ndarray in input 0\.\s.*write torch.from_numpy\(x\)"),
    "numpy by name": ((), {"x": np.ones((6, 4), "float32")}, r"got ndarray in `x`\.\s.*write torch.from_numpy\(x\)"),
    "numpy alone": (np.ones((6, 4), "float32"), {}, r"must be a tuple (?s:.*)write torch.from_numpy\(x\)"),
    "jax": ((jnp.ones((6, 4)),), {}, r"got ArrayImpl in input 0\.\s.*write torch.from_dlpack\(x\)"),
    "a number of numpy": ((torch.ones(6, 4), np.float32(2)), {}, r"got float32 in input 1\.\s.*write x.item\(\)"),
    "a tensor alone": (torch.ones(6, 4), {}, r"For a single tensor x,\spass \(x,\)\.$"),
    "an object": ((torch.ones(6, 4), object()), {}, r"got object in input 1\.\sLeave it out"),
    "no rows": ((torch.ones(0, 4),), {}, "must have at least one row"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_tensor_is_told_with_what_to_write(case: str) -> None:
    inputs, named, match = FOREIGN[case]
    models = made(masked)
    with pytest.raises(InputError, match=match):
        torch_bridge.to_ensemble(models, inputs, named)
    np.testing.assert_array_equal(torch.from_dlpack(jnp.ones(3)).numpy(), np.ones(3))


def test_a_call_without_rows_works_or_says_so() -> None:
    models = made(masked)
    ensemble = torch_bridge.to_ensemble(models, (X,), check=False)
    assert ensemble(X[:0]).shape == (2, 0, 3) and ensemble.predict(X[:0]).mean.shape == (0, 3)
    with pytest.raises(InputError, match="`inputs` must have at least one row"):
        torch_bridge.check(models, ensemble, (X[:0],))
    flat = [nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(flat, (X.reshape(6, 2, 2),), check=False)  # x.reshape(x.shape[0], -1)
    with pytest.raises(InputError, match=r"cannot be called with(?s:.*)An input has no elements,.* at least one row"):
        ensemble(torch.ones(0, 2, 2))
