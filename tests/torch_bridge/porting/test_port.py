"""Porting whole modules: inputs and outputs of every form, state both ways, and what is refused."""

import copy
import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import torch_bridge
from jaxensemble.errors import (
    InputError,
    MemberError,
    NarrowIntegerWarning,
    ParityError,
    StateError,
    TrainingModeWarning,
    UnsupportedError,
)
from jaxensemble.modules.state import flatten
from jaxensemble.training import TrainState
from tests.helpers.porting import assert_close, assert_ports, assert_trains, randomised
from torch_bridge.graph.capture import capture
from torch_bridge.lowering import OPERATIONS
from torch_bridge.members import stack


class Two(nn.Module):
    """Two inputs, one of them integers; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        h = self.fc(x) + self.embed(ids)
        return {"sum": h, "both": (h.tanh(), [h * 2]), "nothing": None}


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

    allocated = stack._aligned
    monkeypatch.setattr(stack, "_aligned", spied)
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


def test_everything_without_a_rule_is_listed_at_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_y0(x) + torch.special.airy_ai(self.inner(x))

    with pytest.raises(UnsupportedError) as caught:
        torch_bridge.to_ensemble([Odd()], (torch.randn(4, 4),), batch_axis=None)
    text = str(caught.value)
    assert "special_bessel_y0" in text and "special_airy_ai" in text
    assert "test_port.py" in text and "torch_bridge.register" in text


def test_control_flow_on_values_is_refused_with_torchs_reason() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        UnsupportedError, match=r"(?s)cannot follow Branch\.forward, which decides by values .*x.sum\(\) > 0"
    ):
        torch_bridge.to_flax(Branch(), (torch.randn(2, 2),))


def test_a_forward_that_leaves_pytorch_is_refused_with_its_line() -> None:
    class Leaves(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            scale = input.numpy().mean()
            return super().forward(input) * float(scale)

    with pytest.raises(UnsupportedError, match=r"test_convert\.py:\d+: scale = input\.numpy\(\)\.mean\(\)"):
        torch_bridge.to_flax(Leaves(3, 2), (torch.randn(2, 3),))


def test_objects_that_a_forward_returns_beside_arrays_are_refused_by_name() -> None:
    class Cache:
        pass

    class Caching(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Cache]:  # type: ignore[override]
            return super().forward(input), Cache()

    with pytest.raises(UnsupportedError, match=r"(?s)Caching\.forward returns an object of \S*Cache;.*use_cache=False"):
        torch_bridge.to_flax(Caching(3, 2), (torch.randn(2, 3),))


def test_a_batch_size_that_the_forward_fixes_is_told_as_such() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).reshape(3, 2)

    x = torch.randn(3, 4)
    with pytest.raises(UnsupportedError, match=r"(?s)with an open batch size.*pass batch_axis=None"):
        torch_bridge.to_flax(Fixed(4, 2), (x,))
    assert torch_bridge.to_flax(Fixed(4, 2), (x,), batch_axis=None)(x.numpy()).shape == (3, 2)


class _Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("trouble of its own")


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        (
            nn.Linear(3, 4),
            (torch.ones(2, 5),),
            r"Linear on the example inputs \(float32 \[2, 5\]\): .*cannot be multiplied",
        ),
        (nn.Bilinear(3, 3, 2), (torch.ones(2, 3),), "missing 1 required positional argument: 'input2'"),
        (nn.Linear(3, 4), (torch.ones(2, 3), torch.ones(2, 3)), "takes 2 positional arguments but 3 were given"),
        (_Raises(), (torch.ones(2, 3),), "ValueError: trouble of its own"),
    ],
    ids=["size", "too few", "too many", "raises"],
)
def test_what_pytorch_itself_refuses_is_told_in_its_words(
    model: nn.Module, inputs: tuple[Tensor, ...], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=text):
        torch_bridge.to_flax(model, inputs)
    assert capfd.readouterr() == ("", "")


def test_a_value_taken_as_a_number_is_told_as_such() -> None:
    class Item(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * input.mean().item()

    with pytest.raises(UnsupportedError, match=r"value as a number \(\.item\(\)\)"):
        torch_bridge.to_flax(Item(3, 2), (torch.ones(2, 3),))


def test_one_module_is_no_ensemble() -> None:
    with pytest.raises(InputError, match=r"got one Sequential\. Pass \[model\]"):
        torch_bridge.to_ensemble(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.ones(2, 3),))  # pyright: ignore


class Halved(nn.Linear):
    """A layer and a factor, which depends on the mode in a class below."""

    factor = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class BySwitch(Halved):
    def train(self, mode: bool = True) -> nn.Module:
        self.factor: float = 0.5 if mode else 1.0
        return super().train(mode)


class BySetting(Halved):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            super().__setattr__("factor", 0.5 if value else 1.0)  # type: ignore[arg-type]


class ByDict(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (0.5 if self.__dict__["training"] else 1.0)


class ByCopy(nn.Linear):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.drop = nn.Dropout()

    def forward(self, input: Tensor) -> Tensor:
        return copy.copy(self.drop)(super().forward(input))


def by_instance(before: int, after: int) -> nn.Module:
    model: Any = Halved(before, after)

    def train(mode: bool = True) -> nn.Module:
        model.factor = 0.5 if mode else 1.0
        return nn.Module.train(model, mode)

    model.train = train
    return model


@pytest.mark.parametrize(
    ("make", "exports", "training"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4)), 1, True),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.LayerNorm(4)), 2, True),
        (lambda: ByCopy(3, 4), 2, True),
        *((functools.partial(kind, 3, 4), 2, True) for kind in (BySwitch, BySetting, ByDict, by_instance)),
    ],
    ids=["no mode", "dropout", "copied", "by its class", "by setting", "by its dict", "by its instance"],
)
def test_a_forward_is_exported_once_where_no_mode_is_read(
    make: Any, exports: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, calls = torch.export.export, []
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: calls.append(1) or export(*args, **options))
    graph = capture(make().eval(), (torch.randn(2, 3),), OPERATIONS)
    assert len(calls) == exports
    assert (graph.evaluation_only is None) == training
    assert "training" not in vars(nn.Module)


def test_a_forward_that_returns_more_in_training_is_ported_for_evaluation_only() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return (y, x) if self.training else y

    model = Deep().eval()
    module = torch_bridge.to_flax(model, (torch.randn(2, 3),))
    assert_close(module(np.ones((2, 3), "float32")), model(torch.ones(2, 3)), 1e-6)
    with pytest.raises(Exception, match="training mode"):
        module.train()
    with pytest.raises(UnsupportedError, match=r"(?s)is in training mode.*\.eval\(\)"):
        torch_bridge.to_flax(model.train(), (torch.randn(2, 3),))


def test_mutated_buffers_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(UnsupportedError, match="writes into calls"):
        torch_bridge.to_flax(Counting(), (torch.randn(2, 2),))


@pytest.mark.parametrize("inputs", [torch.ones(2, 3), [torch.ones(2, 3)], ()], ids=["tensor", "list", "nothing"])
def test_example_inputs_are_a_tuple(inputs: Any) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        torch_bridge.to_flax(nn.Linear(3, 2), inputs)


def test_lazy_and_meta_modules_are_refused() -> None:
    with pytest.raises(InputError, match="uninitialised"):
        torch_bridge.to_ensemble([nn.LazyLinear(3)], (torch.ones(2, 3),))
    with pytest.raises(InputError, match="meta"):
        torch_bridge.to_ensemble([nn.Linear(3, 3, device="meta")], (torch.ones(2, 3),))


def test_a_failed_proof_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxensemble.network.weight_map import Rearrangement

    wrong = lambda self, array: np.ascontiguousarray(array.reshape(self.shape))  # noqa: E731
    monkeypatch.setattr(Rearrangement, "apply", wrong)
    with pytest.raises(ParityError, match=r"(?s)float64, each its own, loop: .*First difference: 0 ") as caught:
        torch_bridge.to_ensemble([nn.Sequential(nn.Linear(4, 4))], (torch.randn(3, 4),))
    assert "FAIL" in caught.value.details


def test_weights_that_are_not_finite_are_refused_all_at_once() -> None:
    members = stateful_members()
    members[1].get_parameter("conv.weight").data[2, 0, 1, 2] = torch.nan
    members[2].get_parameter("scale").data[:2] = torch.inf
    members[2].get_buffer("norm.running_var")[1] = torch.nan
    members[0].get_buffer("offset")[0] = -torch.inf  # as masks have it
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


def test_members_that_differ_are_refused_before_anything_is_built() -> None:
    with pytest.raises(MemberError, match=r"p: 0\.2 in member 1, 0\.1 in member 0"):
        torch_bridge.to_ensemble([nn.Dropout(0.1), nn.Dropout(0.2)], (torch.ones(2, 3),))


def test_one_trace_per_shape() -> None:
    traces = []

    class Traced(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            traces.append(x.shape)
            return self.fc(x)

    from jaxensemble import Ensemble

    ensemble = Ensemble.from_modules([Traced(rngs=nnx.Rngs(k)) for k in range(3)])
    for size in (4, 4, 5, 4, 5):
        ensemble(np.ones((size, 2), "float32"))
    assert traces == [(4, 2)] * 2 + [(5, 2)] * 2  # one to plan by, one to compile


def test_the_printed_source_is_what_runs() -> None:
    module = torch_bridge.to_flax(Two(), (torch.randn(2, 4), torch.tensor([1, 2])))
    assert "self.fc(x)" in inspect.getsource(type(module))


class Residual(nn.Module):
    """Functional calls, in-place operations, residual adds, concatenation and reshapes, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.gate = nn.Linear(6, 6)
        self.fc = nn.Linear(12 * 3 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        y = self.conv2(x)
        y += x
        y.relu_()
        y = y * torch.sigmoid(self.gate(y.mean(dim=(2, 3))))[:, :, None, None]
        z = torch.cat([x, y], dim=1)
        z = F.max_pool2d(z, 2)
        return self.fc(z.view(z.size(0), -1))


def test_user_written_forward_is_exact_with_gradients() -> None:
    assert_ports(Residual(), torch.randn(2, 3, 6, 8))


def test_a_randomised_float64_copy_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.clone()
    assert randomised(model).weight.dtype == torch.float64
    assert torch.equal(model.weight, weight)


class Mean(nn.Module):
    """Sizes of its inputs are part of what it computes."""

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


class Switched(nn.Module):
    """What differs between the modes is no operation but a tensor, or the names of the outputs."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.what = what
        self.k, self.q = torch.ones(3), torch.full((3,), 2.0)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        match self.what:
            case "literal":
                return y * torch.tensor(0.5 if self.training else 1.0)
            case "attribute":
                return y * (self.k if self.training else self.q)
        return {"train": y} if self.training else {"eval": y}


@pytest.mark.parametrize("what", ["literal", "attribute"])
def test_tensors_that_depend_on_the_mode_are_seen(what: str) -> None:
    assert_trains(lambda: Switched(what), torch.randn(2, 3))


def test_outputs_of_other_names_in_training_are_for_evaluation_only() -> None:
    ensemble = torch_bridge.to_ensemble([Switched("names").eval()], (torch.randn(2, 3),))
    assert "returns something else in training mode" in ensemble.network.evaluation_only
    with pytest.raises(Exception, match="training mode"):
        ensemble.train()


def test_a_train_method_of_the_models_own_is_followed() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    model = Frozen().train()
    ensemble = torch_bridge.to_ensemble([model], (torch.randn(4, 3),))
    x = torch.randn(6, 3)
    assert_close(ensemble.train()(x)[0], model(x), 1e-6)


def test_squeezing_an_open_batch_is_refused() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True).squeeze()

    with pytest.raises(UnsupportedError, match="drop a batch of one"):
        torch_bridge.to_flax(Squeezed(), (torch.randn(4, 2),))


def test_a_dropout_of_constants_is_a_dropout_of_constants() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.dropout(torch.arange(3.0).cos())

    torch_bridge.to_ensemble([Positions().eval()], (torch.randn(4, 3),))


def test_detached_values_have_no_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).detach())

    models = [Detached(), Detached()]
    x = torch.randn(4, 3)
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,)).passed


def test_members_whose_submodules_are_in_another_order_differ() -> None:
    def keyed(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    with pytest.raises(MemberError, match="order of modules"):
        torch_bridge.to_ensemble([keyed("a", "b"), keyed("b", "a")], (torch.randn(2, 2),))


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


class _Hash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table((ids * 1000003) % 1000)


class _Offsets(nn.Module):
    """Integers that stay small whatever comes in: none of this is worth a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids.ne(1).long()
        positions = torch.cumsum(mask, dim=1) * mask + 2
        rolled = torch.cat([mask[:, 1:], mask[:, :1]], 1)
        return (
            self.table(positions % 1000) + self.table(ids % 10 * 7 + 1) + self.table(ids + 1 - 1) + self.table(rolled)
        )


def test_integers_that_may_not_fit_into_32_bits_are_warned_of() -> None:
    with pytest.warns(NarrowIntegerWarning, match=r"aten\.mul\.Tensor \(test_convert\.py:\d+: .*1000003"):
        torch_bridge.to_flax(_Hash(), (torch.zeros(2, 3, dtype=torch.int64),))
    torch_bridge.to_flax(_Offsets(), (torch.zeros(2, 3, dtype=torch.int64),))
    ids = torch.randint(2000, 50000, (8, 3))
    with jax.enable_x64(True):
        model = _Hash().double()
        module = torch_bridge.to_flax(model, (ids,))
        assert_close(module(ids.numpy()), model(ids))


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
    "layers",
    [(nn.ReLU(), nn.Linear(3, 3)), (nn.Identity(), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()), (nn.ReLU(), nn.Tanh())],
    ids=["one", "identity", "functions alone"],
)
def test_sequences_that_begin_with_a_function(layers: tuple[nn.Module, ...]) -> None:
    """A root that loops over its children must call each of them, and not what the first one is."""
    assert_ports(nn.Sequential(*layers), torch.randn(2, 3))


class _Shifts(nn.Module):
    """What goes into a step that some blocks lack, or comes from within such steps, is used after some of the calls."""

    def __init__(self, shift: bool, inner: bool):
        super().__init__()
        self.shift, self.inner = shift, inner
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = y = self.first(x)
        if self.shift:
            y = torch.sin(y)
            before, y = (y, torch.exp(y)) if self.inner else (before, y)
        return self.third(torch.relu(self.second(y))), before


@pytest.mark.parametrize("inner", [False, True])
def test_what_a_later_block_gives_besides_is_not_lost(inner: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (_Shifts(shift, inner) for shift in (True, True, False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.a(x)
            x, before = self.b(x)
            x, _ = self.c(x + before)
            return x

    torch_bridge.to_ensemble([Net().eval() for _ in range(2)], (torch.randn(3, 4),))  # raises unless it agrees


class _Counts(nn.Module):
    """Counts its calls; `factor` says whether it computes with the count."""

    def __init__(self, factor: bool):
        super().__init__()
        self.fc, self.calls, self.factor = nn.Linear(3, 3), 0, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.width = 3  # remembered, but the same at every call
        return self.fc(x) * (self.calls if self.factor else self.width)


def test_a_forward_that_computes_with_what_it_counts_is_refused() -> None:
    model = _Counts(factor=True).eval()
    with pytest.raises(UnsupportedError, match=r"changes what its next call computes with: `calls` from 0 to 1\."):
        torch_bridge.to_flax(model, (torch.ones(2, 3),))
    assert model.calls == 0, "porting leaves models as they are"


def test_a_count_that_nothing_depends_on_is_no_reason_to_refuse() -> None:
    model, x = _Counts(factor=False).eval(), torch.ones(2, 3)
    flax = torch_bridge.to_flax(model, (x,))
    np.testing.assert_allclose(flax(x.numpy()), model(x).detach().numpy(), atol=1e-6)
    assert model.calls == 1


@pytest.mark.parametrize(
    ("batch_axis", "text"), [(2, "no example input has as many axes"), ("0", "got '0'"), (-1, "got -1")]
)
def test_a_batch_axis_that_there_is_not_is_refused(batch_axis: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        torch_bridge.to_flax(nn.Linear(3, 2), (torch.ones(4, 3),), batch_axis=batch_axis)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own import
def test_what_torch_compile_gives_is_ported_as_what_it_was_made_from() -> None:
    models, x = [nn.Linear(3, 2) for _ in range(2)], torch.randn(4, 3)
    compiled: list[Any] = [torch.compile(model) for model in models]
    ensemble = torch_bridge.to_ensemble(compiled, (x,))
    assert list(torch_bridge.to_torch(ensemble)[0]) == ["weight", "bias"]


def test_what_is_no_module_in_python_or_no_ensemble_is_named() -> None:
    models, x = [nn.Linear(3, 2) for _ in range(2)], torch.randn(4, 3)
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = [models[0], torch.jit.script(nn.Linear(3, 2))]
    with pytest.raises(InputError, match=r"not TorchScript's; got such for member 1\. Pass the modules that were"):
        torch_bridge.to_ensemble(scripted, (x,))
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got a list"):
        torch_bridge.to_torch(models)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`ensemble` must be a jaxensemble\.Ensemble; got a list"):
        torch_bridge.check(models, models, (x,))  # type: ignore[arg-type]


class Straight(torch.autograd.Function):
    """A step whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1.0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-0.01, 0.01)


class Swish(torch.autograd.Function):
    """One that only saves memory: its backward is the gradient of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        part = x.sigmoid()
        return grad * part * (1 + x * (1 - part))


class Applying(nn.Sequential):
    def __init__(self, function: Any) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self[1](self.function.apply(self[0](input)))


def test_gradients_of_ones_own_are_refused_where_they_are_not_those_of_the_forward() -> None:
    x = torch.randn(5, 3)
    for function in (Straight, Clipped):
        with pytest.raises(UnsupportedError, match=f"uses {function.__name__}, whose backward"):
            torch_bridge.to_ensemble([Applying(function)], (x,))


def test_gradients_of_ones_own_that_training_alone_has_are_for_evaluation_only() -> None:
    class Twofold(Applying):
        def forward(self, input: Tensor) -> Tensor:
            y = self[0](input)
            return self[1](self.function.apply(y) if self.training else y)

    ensemble = torch_bridge.to_ensemble([Twofold(Clipped).eval()], (torch.randn(5, 3),))
    assert "uses Clipped" in ensemble.network.evaluation_only


def test_gradients_of_ones_own_that_are_those_of_the_forward_are_carried() -> None:
    x = torch.randn(5, 3)
    models = [Applying(Swish).eval() for _ in range(2)]
    assert torch_bridge.check(models, torch_bridge.to_ensemble(models, (x,)), (x,)).passed


def test_every_place_that_cannot_be_ported_is_named() -> None:
    class Many(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            chosen = y[y > 0].sum()
            gammas = torch.distributions.Gamma(torch.ones(3), torch.ones(3)).sample()
            counts = torch.bincount(torch.zeros(3, dtype=torch.int64)).sum()
            return torch.linalg.eig(y[:, None] * y[:, :, None])[1].real + chosen + gammas + counts

    with pytest.raises(
        UnsupportedError, match="Many uses operations that have no rule, or cannot be carried exactly"
    ) as error:
        torch_bridge.to_ensemble([Many(3, 3).eval() for _ in range(2)], (torch.randn(4, 3),))
    for name, line in {
        "index.Tensor": "y[y > 0]",
        "_standard_gamma.default": "Gamma",
        "bincount.default": "bincount",
        "linalg_eig.default": "linalg.eig",
    }.items():
        (told,) = (told for told in error.value.details.splitlines() if told.startswith(f"  aten.{name} in "))
        assert re.fullmatch(rf".* in the root module \(\w+\.py:\d+: .*{re.escape(line)}.*\)(: .*)?", told), told


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_modules_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedError, match=r"Sequential is quantised \(0, .* Port the network as it was before"):
        torch_bridge.to_ensemble([model.eval(), copy.deepcopy(model).eval()], (torch.randn(4, 3),))


# modes


class Noisy(nn.Module):
    """A network that asks for its mode, beside layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.still = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.still(self.bn(self.fc(x)))
        return x + torch.randn_like(x) if self.training else x


def test_training_mode_is_told_unless_it_is_meant() -> None:
    models, x = [Noisy() for _ in range(2)], torch.randn(4, 3)
    with pytest.warns(TrainingModeWarning, match=r"Noisy was ported in training mode \(bn, itself\): mode='eval'"):
        ported = torch_bridge.to_ensemble(models, (x,), check=False)
    assert repr(ported).endswith("; in training mode: bn, itself)")
    with pytest.warns(TrainingModeWarning, match=r"Noisy predicts in training mode \(bn\)"):
        ported.predict(x, key=jax.random.key(0))
    with pytest.warns(TrainingModeWarning, match=r"\(bn, itself\)"):
        torch_bridge.to_flax(models[0], (x,))
    for mode in ("eval", "train", "as_is"):
        told = () if mode == "eval" else ("bn", "itself")
        assert torch_bridge.to_ensemble(models, (x,), mode=mode, check=False).graphdef.training_layers() == told
    assert all(module.training for model in models for module in model.modules())
    report = torch_bridge.check(models, ported, (x,), thorough=False)
    assert report.passed
    assert report.notes[0] == "in training mode, and compared in evaluation mode: bn, itself"


def test_members_may_differ_in_a_mode_that_is_said() -> None:
    models, x = [Noisy(), Noisy().eval()], torch.randn(4, 3)
    models[0].bn.eval()
    with pytest.raises(MemberError, match=r"(?s)mode: evaluation in member 1.*pass mode='eval'"):
        torch_bridge.to_ensemble(models, (x,))
    ensemble = torch_bridge.to_ensemble(models, (x,), mode="eval")
    assert not ensemble.graphdef.training_layers()
    assert [model.training for model in models] == [True, False]
    assert not models[0].bn.training
    with pytest.raises(InputError, match="`mode` must be 'eval', 'train' or 'as_is'; got 'evaluation'"):
        torch_bridge.to_ensemble(models, (x,), mode="evaluation")  # type: ignore[arg-type]


def test_members_may_differ_in_rates_of_dropout_in_evaluation_mode() -> None:
    def members() -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(3, 3), nn.Dropout(rate), nn.Linear(3, 2)) for rate in (0.1, 0.5)]

    x = torch.randn(4, 3)
    models = [model.eval() for model in members()]
    ensemble = torch_bridge.to_ensemble(models, (x,))
    assert_close(ensemble(x), torch.stack([model(x) for model in models]), 1e-6)
    assert torch_bridge.check(models, ensemble, (x,)).passed
    assert ensemble.network.evaluation_only.startswith("members have different rates of dropout (1, p): to train them")
    with pytest.raises(StateError, match="ported for evaluation only, because members have different rates"):
        ensemble.train()
    with pytest.raises(StateError, match=r"ported for evaluation only, because members have different rates"):
        TrainState.create(ensemble, optax.sgd(0.1), key=jax.random.key(0))
    for changed in (members(), [model.train() for model in members()]):
        with pytest.raises(MemberError, match=r"p: 0\.5 in member 1, 0\.1 in member 0"):
            torch_bridge.to_ensemble(changed, (x,), mode="as_is")
    with pytest.raises(MemberError, match=r"p: 0\.5 in member 1"):
        torch_bridge.to_ensemble(models, (x,), check=False)


def test_a_rate_of_dropout_that_a_forward_reads_is_no_member_s_own() -> None:
    class Reading(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(3, 3), nn.Dropout(rate)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.where(x > 100, y * self.drop.p, y)

    with pytest.raises(MemberError, match=r"the forward of 1 computes with it in evaluation mode"):
        torch_bridge.to_ensemble([Reading(rate).eval() for rate in (0.1, 0.9)], (torch.randn(4, 3),))


def test_a_train_method_of_ones_own_is_asked() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[1].eval()
            return self

    ensemble = torch_bridge.to_ensemble(
        [Frozen(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(2)], (torch.randn(4, 3),), mode="train"
    )
    assert ensemble.graphdef.training_layers() == ("2",)
