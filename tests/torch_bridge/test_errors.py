"""Wrong arguments of every public function, and networks that cannot be ported, raise short errors of our own."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import POINTER, InputError, MemberError, StateError, UnsupportedError
from tests.helpers.caching import ByDevice
from tests.helpers.porting import Fn
from tests.helpers.refusing import refusal

X = torch.randn(4, 3)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2)).eval()


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [network() for _ in range(2)]


@pytest.fixture(scope="module")
def ensemble(models: list[nn.Module]) -> Any:
    return torch_bridge.to_ensemble(models, (X,))


@pytest.fixture(scope="module")
def paths(models: list[nn.Module], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    files = [folder / f"{k}.pt" for k in range(2)]
    for file, model in zip(files, models, strict=True):
        torch.save(model.state_dict(), file)
    return files


def anything(*values: Any) -> tuple[Any, ...]:
    """Arguments that no function takes."""
    return values


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in prototype stage
        return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])


NO_INPUTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "a tensor": lambda: X,
    "a list": lambda: [X],
    "nothing": lambda: (),
    "None": lambda: (None,),
    "text": lambda: ("a",),
    "an object": lambda: (object(),),
    "an array": lambda: (X.numpy(),),
    "two": lambda: (X, X),
    "another size": lambda: (torch.randn(4, 5),),
    "integers": lambda: (torch.zeros(4, 3, dtype=torch.int64),),
    "a dict": lambda: {"x": X},
    "meta": lambda: (X.to("meta"),),
    "sparse": lambda: (X.to_sparse(),),
    "nested": lambda: (nested(),),
    "half": lambda: (X.half(),),
}
UNTIL_THE_PROOF = ("integers", "half")
"""Inputs that the exporter takes, and PyTorch does not."""

NO_MODELS: list[Any] = [
    None, 3, "a", [], [None], [1, 2], nn.Linear(3, 2), [nn.Linear(3, 2), None], {"a": 1}, [nn.Linear], [lambda x: x],
    [nn.Sequential(nn.LazyLinear(2))], [nn.Linear(3, 2, device="meta")], [nn.Linear(3, 2), nn.Linear(3, 2).double()],
    np.zeros(3), [nn.Module()],
]  # fmt: skip
NO_ENSEMBLES: list[Any] = [None, 3, "a", [network()], nnx.Linear]


@pytest.mark.parametrize("inputs", NO_INPUTS)
def test_inputs_that_are_none(inputs: str, models: list[nn.Module], ensemble: Any, paths: list[Path]) -> None:
    given = NO_INPUTS[inputs]()
    refusal(lambda: torch_bridge.to_ensemble(models, given))
    if inputs not in UNTIL_THE_PROOF:
        refusal(lambda: torch_bridge.to_flax(models[0], given))
    refusal(lambda: torch_bridge.check(models, ensemble, given))
    refusal(lambda: torch_bridge.load_ensemble(network, paths, given))


@pytest.mark.parametrize("k", range(len(NO_MODELS)))
def test_models_that_are_none(k: int, ensemble: Any) -> None:
    given = NO_MODELS[k]
    refusal(lambda: torch_bridge.to_ensemble(given, (X,)))
    refusal(lambda: torch_bridge.check(given, ensemble, (X,)))
    refusal(lambda: torch_bridge.time(given, ensemble, (X,), variants=["none of these"]))
    refusal(lambda: torch_bridge.train_state(given, [], ensemble, jax.random.key(0)))


def test_ensembles_and_options_that_are_none(models: list[nn.Module], ensemble: Any) -> None:
    optimizers = [torch.optim.SGD(model.parameters()) for model in models]
    for given in NO_ENSEMBLES:
        refusal(lambda given=given: torch_bridge.check(models, given, (X,)))
        refusal(lambda given=given: torch_bridge.time(models, given, (X,), variants=["loop"]))
        refusal(lambda given=given: torch_bridge.to_torch(given))
        refusal(lambda given=given: torch_bridge.train_state(models, optimizers, given, jax.random.key(0)))
    for options in anything({"variants": 3}, {"variants": []}, {"variants": ["no"]}, {"rounds": "a"}, {"rounds": 0}):
        refusal(lambda options=options: torch_bridge.time(models, ensemble, (X,), **{"variants": ["loop"], **options}))
    for axis in anything(3, "a", (1, 2, 3), -1, 1.5, (None, 0), [0]):
        refusal(lambda axis=axis: torch_bridge.to_ensemble(models, (X,), batch_axis=axis))
    for layout in anything(None, 3, "NCHW"):
        refusal(lambda layout=layout: torch_bridge.to_ensemble(models, (X,), input_layout=layout))
    lbfgs = [torch.optim.LBFGS(model.parameters()) for model in models]
    for given in anything(None, [1, 2], optimizers[:1], optimizers[::-1], lbfgs):
        refusal(lambda given=given: torch_bridge.train_state(models, given, ensemble, jax.random.key(0)))
    for given in anything(None, 3, optax.sgd(0.1), lbfgs[0], torch.optim.SGD):
        refusal(lambda given=given: torch_bridge.optimizer(given))


def test_files_and_factories_that_are_none(paths: list[Path], tmp_path: Path) -> None:
    text, other, part = (tmp_path / f"{name}.pt" for name in ("text", "other", "part"))
    text.write_text("hello")
    torch.save([1, 2], other)
    torch.save({"0.weight": torch.zeros(2, 3)}, part)
    for given in anything(
        None, 3, "a", [], [None], ["no.pt"], [tmp_path], [text], [other], [part], [text] * 30, [paths[0], None],
        ["*.pt"],
    ):  # fmt: skip
        refusal(lambda given=given: torch_bridge.load_ensemble(network, given, (X,)))
    for factory in anything(None, 3, network(), lambda: None, lambda a: network(), nn.Linear, lambda: 1 / 0):
        refusal(lambda factory=factory: torch_bridge.load_ensemble(factory, paths, (X,)))


def test_state_dicts_that_are_none() -> None:
    module, fitting = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), [nn.Linear(3, 2).state_dict()]
    ones = np.ones((1, 3), "float32")
    for given in anything(
        None, 3, "a", [], [None], [{}], [{"a": 1}], [{1: X}], [fitting[0], {}], fitting[0], [{"weight": "x"}],
        [network()], [{"weight": torch.zeros(9, 9)}], [{"weight": [1]}],
    ):  # fmt: skip
        refusal(lambda given=given: torch_bridge.stack_state_dicts(given, module, ones))
    for given in anything(None, 3, nnx.Linear, network()):
        refusal(lambda given=given: torch_bridge.stack_state_dicts(fitting, given, ones))
    for given in anything(None, "a", (), np.ones((1, 9), "float32"), (ones, ones)):
        refusal(lambda given=given: torch_bridge.stack_state_dicts(fitting, module, given))
    for options in anything(
        {"names": 3}, {"permutations": 3}, {"permutations": {"a": 3}}, {"permutations": {"a": "b"}}
    ):
        refusal(lambda options=options: torch_bridge.stack_state_dicts(fitting, module, ones, **options))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


def deep(layers: int = 50, rate: float = 0.0) -> nn.Module:
    return nn.Sequential(*(nn.Dropout(rate) for _ in range(layers))).eval()


def with_values(layers: int, value: float) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).eval()
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def stale() -> nn.Module:
    model = nn.Sequential(*(ByDevice() for _ in range(50))).eval()
    with torch.no_grad():
        model(torch.randn(2, 4))
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def saved(folder: Path, model: nn.Module) -> list[Path]:
    torch.save(model.state_dict(), folder / "member.pt")
    return [folder / "member.pt"]


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str, str]] = {
    "values": (lambda _: torch_bridge.to_flax(Branching(), (X,)), UnsupportedError, "decides by values", POINTER),
    "one batch size": (
        lambda _: torch_bridge.to_flax(Fn(lambda x: x + torch.ones(4, 1)), (X,)), UnsupportedError, "batch", POINTER,
    ),
    "the exporter": (
        lambda _: torch_bridge.to_flax(Failing(), (X,)), UnsupportedError, "cannot follow Failing.forward", POINTER,
    ),
    "members": (
        lambda _: torch_bridge.to_ensemble([deep().train(), deep(rate=0.5).train()], (X,)),
        MemberError,
        "... and 46 more",
        "49, p: 0.5 in member 1, 0.0 in member 0",
    ),
    "values that are not finite": (
        lambda _: torch_bridge.to_ensemble([with_values(50, float("nan"))], (X,)),
        InputError,
        "... and 96 more",
        "`49.bias`: 3 of 3 values",
    ),
    "caches": (
        lambda _: torch_bridge.to_flax(stale(), (torch.randn(2, 4),)), UnsupportedError, "`0.cache['cpu']`", "`9.cache",
    ),
    "files": (
        lambda folder: torch_bridge.load_ensemble(network, saved(folder, with_values(50, 1.0)), (X,)),
        MemberError,
        "... and 96 more",
        "`49.bias`: unexpected",
    ),
    "state dicts": (
        lambda _: torch_bridge.stack_state_dicts(
            [with_values(50, 1.0).state_dict()], nnx.Linear(3, 2, rngs=nnx.Rngs(0)), np.ones((1, 3), "float32")
        ),
        StateError,
        "... and 98 more",
        "`49.bias` float32[3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_message_has_the_first_offenders_and_details_all(case: str, tmp_path: Path) -> None:
    call, kind, said, detail = REFUSED[case]
    error = refusal(lambda: call(tmp_path))
    assert type(error) is kind and said in str(error)
    assert str(error).endswith(POINTER) and (detail is POINTER or detail in error.details)
    assert len(error.details) > len(str(error))
