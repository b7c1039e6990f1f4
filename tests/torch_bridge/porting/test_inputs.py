"""Inputs and outputs of every form, batch sizes, and layouts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    InputError,
    UnsupportedError,
)
from tests.helpers.porting import assert_close


class Two(nn.Module):
    """Two inputs, one of them integers; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        h = self.fc(x) + self.embed(ids)
        return {"sum": h, "both": (h.tanh(), [h * 2]), "nothing": None}


def test_several_inputs_and_nested_outputs() -> None:
    models = [Two().eval() for _ in range(3)]
    x, ids = torch.randn(5, 4), torch.randint(7, (5,))
    ensemble = torch_bridge.to_ensemble(models, (x, ids))
    out = ensemble(x[:2], ids[:2])
    for k, model in enumerate(models):
        expected = dict(sorted(model(x[:2], ids[:2]).items()))  # JAX's trees order dicts by key
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], out), expected, 1e-6)
    assert out["nothing"] is None


def test_inputs_that_are_trees() -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> Tensor:
            return pair[0] * pair[1] + named["bias"]

    inputs = ((torch.randn(3, 2), torch.randn(3, 2)), {"bias": torch.randn(3, 2)})
    module = torch_bridge.to_flax(Pair(), inputs)
    numpy_inputs = jax.tree.map(lambda x: x.numpy(), inputs)
    assert_close(module(*numpy_inputs), Pair()(*inputs), 1e-6)


def test_a_forward_that_takes_any_number_of_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, first: Tensor, *others: Tensor) -> Tensor:
            return first * 2 + sum(others)

    inputs = tuple(torch.randn(3, 2) for _ in range(3))
    module = torch_bridge.to_flax(Sum(), inputs)
    assert_close(module(*[x.numpy() for x in inputs]), Sum()(*inputs), 1e-6)


def test_the_batch_size_is_open_and_one_is_no_special_case() -> None:
    module = torch_bridge.to_flax(nn.Linear(3, 2), (torch.randn(1, 3),))
    assert [module(np.ones((n, 3), "float32")).shape for n in (1, 2, 7)] == [(1, 2), (2, 2), (7, 2)]


def test_a_network_that_fixes_its_batch_size_says_so_and_ports_with_fixed_shapes() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 6) * 2

    with pytest.raises(UnsupportedError, match="batch_axis=None"):
        torch_bridge.to_flax(Fixed(), (torch.randn(4, 2, 3),))
    module = torch_bridge.to_flax(Fixed(), (torch.randn(4, 2, 3),), batch_axis=None)
    assert module(np.ones((4, 2, 3), "float32")).shape == (4, 6)


def test_each_input_may_have_a_batch_axis_of_its_own() -> None:
    class Apply(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x.transpose(0, 1) @ table

    x, table = torch.randn(3, 5), torch.randn(3, 2)
    module = torch_bridge.to_flax(Apply(), (x, table), batch_axis=(1, None))
    assert_close(module(np.ones((3, 8), "float32"), table.numpy()), Apply()(torch.ones(3, 8), table), 1e-6)


def test_nhwc_inputs_need_no_transpose() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 5, 2)).eval()
    x = torch.randn(2, 3, 6, 7)
    module = torch_bridge.to_flax(model, (x,), input_layout="NHWC")
    assert_close(module(x.movedim(1, -1).numpy()), model(x), 1e-6)
    jaxpr = str(jax.make_jaxpr(lambda x: module(x))(jnp.ones((2, 6, 7, 3))))
    assert "transpose" not in jaxpr
    with pytest.raises(InputError, match="input_layout"):
        torch_bridge.to_flax(model, (x,), input_layout="NCWH")


def test_a_batch_size_that_the_forward_fixes_is_told_as_such() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).reshape(3, 2)

    x = torch.randn(3, 4)
    with pytest.raises(UnsupportedError, match=r"(?s)with an open batch size.*pass batch_axis=None"):
        torch_bridge.to_flax(Fixed(4, 2), (x,))
    assert torch_bridge.to_flax(Fixed(4, 2), (x,), batch_axis=None)(x.numpy()).shape == (3, 2)


@pytest.mark.parametrize("inputs", [torch.ones(2, 3), [torch.ones(2, 3)], ()], ids=["tensor", "list", "nothing"])
def test_example_inputs_are_a_tuple(inputs: Any) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        torch_bridge.to_flax(nn.Linear(3, 2), inputs)


class Mean(nn.Module):
    """A forward that computes with the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x).sum(1) / x.shape[1] + y / y.shape[0]


def test_inputs_of_other_shapes_are_refused_since_sizes_are_part_of_the_network() -> None:
    models = [Mean().eval() for _ in range(2)]
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(4, 5, 3), torch.randn(4, 2)))
    x, y = torch.randn(7, 5, 3), torch.randn(7, 2)
    assert_close(ensemble(x, y)[1], models[1](x, y), 1e-6)
    with pytest.raises(InputError, match=r"`x`: expected \[N, 5, 3\], got \[7, 6, 3\]"):
        ensemble(torch.randn(7, 6, 3), y)
    with pytest.raises(InputError, match=r"`x`: batch of 7; `y`: batch of 6"):
        ensemble(x, y[:6])
    with pytest.raises(InputError, match=r"got \[7, 2, 1\]"):
        ensemble.each(torch.stack([x, x]), torch.stack([y, y])[..., None])


def test_squeezing_an_open_batch_is_refused() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True).squeeze()

    with pytest.raises(UnsupportedError, match="drop a batch of one"):
        torch_bridge.to_flax(Squeezed(), (torch.randn(4, 2),))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((np.ones((2, 3), np.int32), np.zeros(2, np.int32)), "`x`: expected float32, got int32"),
        ((np.ones((2, 3), np.complex64), np.zeros(2, np.int32)), "`x`: expected float32, got complex64"),
        ((np.ones((2, 3), np.float32), np.zeros(2, np.float32)), "`ids`: expected int64, got float32"),
        (([[1.0, 2.0, 3.0]], np.zeros(1, np.int32)), r"`inputs\[0\]`: expected an array, got list"),
        ((np.ones((2, 3), np.float32),), "`inputs`: expected 2, got 1"),
    ],
    ids=["integers", "complex", "floats", "lists", "too few"],
)
def test_inputs_of_another_kind_are_refused(inputs: tuple[Any, ...], text: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(5, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.fc(x) + self.table(ids)

    examples = (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    ensemble = torch_bridge.to_ensemble([Two(), Two()], examples, check=False)
    with pytest.raises(InputError, match=text):
        ensemble(*inputs)
    assert ensemble(np.ones((2, 3), np.float16), np.zeros(2, np.uint8)).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("batch_axis", "text"), [(2, "no example input has as many axes"), ("0", "got '0'"), (-1, "got -1")]
)
def test_a_batch_axis_that_there_is_not_is_refused(batch_axis: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        torch_bridge.to_flax(nn.Linear(3, 2), (torch.ones(4, 3),), batch_axis=batch_axis)
