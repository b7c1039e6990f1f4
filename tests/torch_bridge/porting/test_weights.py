"""Weights, both ways: names, dtypes, ties, memory, and values that are refused."""

import copy
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    InputError,
)
from jaxensemble.modules.state import flatten
from tests.helpers.porting import assert_close
from torch_bridge.members import stack


class Stateful(nn.Module):
    """A BatchNorm, tied weights, a buffer that is not saved, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.zeros(3), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.b(self.a(x)) * self.scale + self.offset


def stateful_members(count: int = 3) -> list[nn.Module]:
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Stateful()
        model(torch.randn(5, 1, 6, 7))  # moves the running statistics
        members.append(model.eval())
    return members


def test_names_and_leaves_are_flaxs() -> None:
    module: Any = torch_bridge.to_flax(stateful_members(1)[0], (torch.randn(2, 1, 6, 7),))
    assert issubclass(type(module), nnx.Module) and type(module).__name__ == "Stateful"
    assert isinstance(module.conv, nnx.Conv) and module.conv.kernel.shape == (3, 3, 1, 3)
    assert isinstance(module.a, nnx.Linear)
    params, buffers = (flatten(tree) for tree in jaxensemble_trees(module))
    assert set(params) == {"conv.kernel", "conv.bias", "norm.scale", "norm.bias", "a.kernel", "scale",
                           "unused.weight", "unused.bias"}  # fmt: skip
    assert set(buffers) == {"norm.mean", "norm.var", "norm.num_batches_tracked", "offset"}


def jaxensemble_trees(module: nnx.Module) -> tuple[Any, Any]:
    from jaxensemble.modules.state import split

    state = split(module)
    return state.params, state.buffers


def test_state_dicts_come_back_bit_for_bit_with_their_dtypes_and_ties() -> None:
    models = stateful_members()
    ensemble = torch_bridge.to_ensemble(models, (torch.randn(2, 1, 6, 7),))
    for model, state in zip(models, torch_bridge.to_torch(ensemble), strict=True):
        expected = model.state_dict()
        assert set(state) == set(expected)
        for key, tensor in expected.items():
            assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
        assert state["a.weight"] is state["b.weight"]
        assert state["norm.num_batches_tracked"].dtype == torch.int64
        fresh = Stateful().eval()
        fresh.load_state_dict(state, strict=True)
        assert torch.equal(fresh(torch.ones(2, 1, 6, 7)), model(torch.ones(2, 1, 6, 7)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(dtype) for _ in range(2)]
    x = torch.randn(5, 4, dtype=dtype)
    with jax.enable_x64(dtype == torch.float64):
        ensemble = torch_bridge.to_ensemble(models, (x,))
        assert str(ensemble(x).dtype) == str(dtype).removeprefix("torch.")
        states = torch_bridge.to_torch(ensemble)
    for model, state in zip(models, states, strict=True):
        for key, tensor in model.state_dict().items():
            assert state[key].dtype == dtype and torch.equal(state[key], tensor)


def test_float64_without_x64_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"enable_x64.*model\.float"):
        torch_bridge.to_ensemble([nn.Linear(2, 2).double()], (torch.randn(2, 2).double(),))


def test_integers_never_wrap() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self, value: int) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor([value]))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.count

    with pytest.raises(InputError, match=r"member 1, `count` holds int64 values outside of int32: 4294967296"):
        torch_bridge.to_ensemble([Counter(1), Counter(2**32)], (torch.randn(2, 1),))


def test_the_stack_is_not_copied_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def spied(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = allocated(shape, dtype)
        places.append(array.ctypes.data)
        return array

    allocated = stack._allocate_aligned
    monkeypatch.setattr(stack, "_allocate_aligned", spied)
    with jax.default_device(jax.devices("cpu")[0]):
        ensemble = torch_bridge.to_ensemble([nn.Linear(3, 2) for _ in range(4)], (torch.ones(1, 3),), check=False)
    assert sorted(places) == sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(ensemble.params))


def test_weights_do_not_share_memory_with_torch() -> None:
    models: list[nn.Module] = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 2)) for _ in range(2)]
    x = torch.randn(3, 2, 2, 2)
    ensemble, module = torch_bridge.to_ensemble(models, (x,)), torch_bridge.to_flax(models[0], (x,))
    before = np.asarray(ensemble(x)).copy(), np.asarray(module(x.numpy())).copy()
    with torch.no_grad():
        for model in models:
            for param in model.parameters():
                param.fill_(torch.nan)
    np.testing.assert_array_equal(ensemble(x), before[0])
    np.testing.assert_array_equal(module(x.numpy()), before[1])


def test_channels_last_weights_are_the_same_weights() -> None:
    model = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 6)
    channels_last: Any = {"memory_format": torch.channels_last}
    ours = torch_bridge.to_flax(copy.deepcopy(model).to(**channels_last), (x,))
    assert_close(ours(x.numpy()), model(x), 1e-6)


def test_porting_leaves_the_models_as_they_were() -> None:
    model = Stateful()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch_bridge.to_ensemble([model, copy.deepcopy(model)], (torch.randn(2, 1, 6, 7),))
    assert [module.training for module in model.modules()] == before[1]
    assert all(torch.equal(tensor, before[0][key]) for key, tensor in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_weights_that_are_not_finite_are_refused_all_at_once() -> None:
    members = stateful_members()
    members[1].get_parameter("conv.weight").data[2, 0, 1, 2] = torch.nan
    members[2].get_parameter("scale").data[:2] = torch.inf
    members[2].get_buffer("norm.running_var")[1] = torch.nan
    members[0].get_buffer("offset")[0] = -torch.inf  # as in masks
    x = torch.randn(2, 1, 6, 7)
    with pytest.raises(InputError) as caught:
        torch_bridge.to_ensemble(members, (x,))
    assert str(caught.value).splitlines() == [
        "weights must be finite; got",
        "  member 1, `conv.weight`: 1 of 27 values, the first at (2, 0, 1, 2): nan",
        "  member 2, `scale`: 2 of 3 values, the first at (0,): inf",
        "  member 2, `norm.running_var`: 1 of 3 values, the first at (1,): nan",
        "Pass allow_nonfinite=True (--allow-nonfinite) to port them as they are.",
    ]
    ensemble = torch_bridge.to_ensemble(members, (x,), allow_nonfinite=True)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
    np.testing.assert_allclose(ensemble(x), expected.numpy(), rtol=1e-5)  # NaN and infinities at the same positions


def test_weights_that_share_memory_without_being_one_are_refused():
    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            both = torch.randn(4, 3)
            self.first = nn.Parameter(both[:3])
            self.second = nn.Parameter(both[2:])
            self.apart = nn.Parameter(both[:1].clone())

        def forward(self, x):
            return x @ self.first.T, x @ self.second.T, x * self.apart

    with pytest.raises(InputError, match=r"share memory without being one tensor:\n  first and second\n"):
        torch_bridge.to_flax(Sharing(), (torch.ones(2, 3),))
