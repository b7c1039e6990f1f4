"""`torch.func` and ours side by side: the tutorial with changed imports, and the same errors for the same mistakes."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxensemble
from jaxensemble import combine_state_for_ensemble, functional_call, stack_module_state, unstack_module_state
from jaxensemble.modules.state import merge, unflatten

torch = pytest.importorskip("torch")

MEMBERS, BATCH = 3, 4


# The tutorial ("Model ensembling"): its two networks, smaller, written by hand for both.


class FlaxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(36, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 8, rngs=rngs)
        self.fc3 = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        return self.fc3(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


class FlaxCnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(6, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 5, rngs=rngs)
        self.pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.transpose(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, C]
        x = self.pool(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


class TorchCnn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3)
        self.conv2 = torch.nn.Conv2d(4, 6, 3)
        self.fc1 = torch.nn.Linear(6, 8)
        self.fc2 = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = torch.nn.functional.max_pool2d(self.conv2(self.conv1(x).relu()).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class TorchMlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(36, 8)
        self.fc2 = torch.nn.Linear(8, 8)
        self.fc3 = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


def _flax_twin(module: Any, twin: Callable[..., nnx.Module]) -> Any:
    arrays = {}
    for name, tensor in module.named_parameters():
        array = tensor.detach().numpy()
        axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim]  # [O, I] -> [I, O]; [O, I, H, W] -> [H, W, I, O]
        arrays[name.replace("weight", "kernel")] = jnp.array(array.transpose(axes))
    return merge(nnx.graphdef(twin(rngs=nnx.Rngs(0))), unflatten(arrays))


NETWORKS = [(TorchMlp, FlaxMlp, (6, 6)), (TorchCnn, FlaxCnn, (6, 6))]


@pytest.mark.thinned
@pytest.mark.parametrize(("theirs", "ours", "size"), NETWORKS, ids=["mlp", "cnn"])
@pytest.mark.parametrize("each", [False, True], ids=["the same minibatch", "a minibatch each"])
def test_the_tutorial_with_changed_imports(theirs: Any, ours: Any, size: tuple[int, int], each: bool) -> None:
    """test_correctness_mnist"""
    torch_models = [theirs() for _ in range(MEMBERS)]
    flax_models = [_flax_twin(model, ours) for model in torch_models]
    data = torch.randn(*((MEMBERS, BATCH) if each else (BATCH,)), 1, *size)
    in_dims = (0, 0, 0 if each else None)

    torch_params, torch_buffers = torch.func.stack_module_state(torch_models)
    expected = torch.func.vmap(
        lambda p, b, x: torch.func.functional_call(torch_models[0], (p, b), (x,)), in_dims=in_dims
    )(torch_params, torch_buffers, data)

    def wrapper(params: Any, buffers: Any, x: Any) -> Any:
        return functional_call(flax_models[0], (params, buffers), (x,))

    params, buffers = stack_module_state(flax_models)
    output = jax.jit(jaxensemble.vmap(wrapper, in_dims=in_dims))(params, buffers, data.numpy())
    np.testing.assert_allclose(output, expected.detach().numpy(), atol=1e-6)

    func, params, buffers = combine_state_for_ensemble(flax_models)
    combined = jax.jit(jaxensemble.vmap(func, in_dims))(params, buffers, data.numpy())
    np.testing.assert_allclose(combined, output, atol=1e-6)

    one = jax.jit(wrapper)
    minibatches = data.numpy() if each else [data.numpy()] * MEMBERS
    loop = [one(*state, x) for state, x in zip(unstack_module_state(params, buffers), minibatches, strict=True)]
    np.testing.assert_allclose(output, np.stack(loop), atol=1e-6)


# One mistake, written once for both: `lib` has `ones`, `vmap` and so on.


class Torch:
    ones = staticmethod(torch.ones)
    vmap = staticmethod(torch.func.vmap)
    functional_call = staticmethod(torch.func.functional_call)
    stack = staticmethod(torch.func.stack_module_state)

    @staticmethod
    def linear() -> Any:
        return torch.nn.Linear(1, 1)

    @staticmethod
    def dropout(*, training: bool) -> Any:
        return torch.nn.Sequential(torch.nn.Dropout()).train(training)


class Jax:
    ones = staticmethod(lambda *shape: jnp.ones(shape))
    vmap = staticmethod(jaxensemble.vmap)
    functional_call = staticmethod(functional_call)
    stack = staticmethod(stack_module_state)

    @staticmethod
    def linear() -> Any:
        return Linear()

    @staticmethod
    def dropout(*, training: bool) -> Any:
        return nnx.Sequential(nnx.Dropout(0.5, deterministic=not training, rngs=nnx.Rngs(0)))


class Linear(nnx.Module):
    """Linear(1, 1) with PyTorch's names."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((1, 1)))
        self.bias = nnx.Param(jnp.ones(1))
        self.in_features = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight.T + self.bias


def _pair(x: Any) -> Any:
    return x, x


MISTAKES: dict[str, Callable[[Any], Any]] = {
    # vmap, when it is made
    "randomness": lambda lib: lib.vmap(_pair, randomness="random"),
    "chunk_size 0": lambda lib: lib.vmap(_pair, chunk_size=0),
    "chunk_size -1": lambda lib: lib.vmap(_pair, chunk_size=-1),
    # test_in_dims_wrong_type_err_msg
    "in_dims list": lambda lib: lib.vmap(_pair, in_dims=[0])(lib.ones(2)),
    "in_dims dict": lambda lib: lib.vmap(_pair, in_dims={"x": 0})(lib.ones(2)),
    "in_dims str": lambda lib: lib.vmap(_pair, in_dims="a")(lib.ones(2)),
    "in_dims float": lambda lib: lib.vmap(_pair, in_dims=(1.0,))(lib.ones(2)),
    "in_dims None": lambda lib: lib.vmap(_pair, in_dims=None)(lib.ones(2)),
    # test_func_with_no_inputs, test_func_with_no_tensors
    "no inputs": lambda lib: lib.vmap(_pair)(),
    "no inputs to a partial": lambda lib: lib.vmap(functools.partial(_pair, 1))(),
    "nothing mapped": lambda lib: lib.vmap(_pair, in_dims=(None,))(lib.ones(2)),
    "nothing but a number": lambda lib: lib.vmap(_pair, in_dims=(None,))(1),
    # test_not_enough_in_dims_err_msg
    "too few in_dims": lambda lib: lib.vmap(_pair, in_dims=(0,))(lib.ones(2), lib.ones(2)),
    "in_dims too deep": lambda lib: lib.vmap(_pair, in_dims=((0,),))(lib.ones(2)),
    "in_dims of another container": lambda lib: lib.vmap(_pair, in_dims=([0],))((lib.ones(2),)),
    # test_integer_in_dim_but_not_tensor_input_err_msg
    "a number": lambda lib: lib.vmap(_pair)(1.0),
    "a string within": lambda lib: lib.vmap(_pair)((lib.ones(2), "a")),
    "None within": lambda lib: lib.vmap(_pair)((lib.ones(2), None)),
    # test_in_dim_not_in_tensor_err_msg
    "a scalar": lambda lib: lib.vmap(_pair)(lib.ones(2).sum()),
    "in_dim too large": lambda lib: lib.vmap(_pair, in_dims=2)(lib.ones(2, 3)),
    "in_dim too small": lambda lib: lib.vmap(_pair, in_dims=-3)(lib.ones(2, 3)),
    "in_dim within": lambda lib: lib.vmap(_pair, in_dims=({"x": 1},))({"x": lib.ones(2)}),
    # test_different_map_dim_size_raises
    "sizes": lambda lib: lib.vmap(_pair)((lib.ones(2), lib.ones(3))),
    "sizes in other dims": lambda lib: lib.vmap(_pair, in_dims=((0, 1),))((lib.ones(2, 3), lib.ones(2, 3))),
    # test_non_tensor_output_raises
    "a number comes out": lambda lib: lib.vmap(lambda x: 1.0)(lib.ones(2)),
    "None comes out": lambda lib: lib.vmap(lambda x: None)(lib.ones(2)),
    "a number among outputs": lambda lib: lib.vmap(lambda x: (x, 1.0))(lib.ones(2)),
    # test_out_dims_must_be_int_or_collection_of_int_err_msg
    "out_dims str": lambda lib: lib.vmap(_pair, out_dims="a")(lib.ones(2)),
    "out_dims of str": lambda lib: lib.vmap(_pair, out_dims=(0, "a"))(lib.ones(2)),
    "out_dims float": lambda lib: lib.vmap(_pair, out_dims=1.5)(lib.ones(2)),
    # test_out_dims_and_num_outputs_mismatch_err_msg, test_out_dims_edge_case
    "too few out_dims": lambda lib: lib.vmap(_pair, out_dims=(0,))(lib.ones(2)),
    "too many out_dims": lambda lib: lib.vmap(_pair, out_dims=(0, 0, 0))(lib.ones(2)),
    "out_dims for one output": lambda lib: lib.vmap(lambda x: x, out_dims=(0, 0))(lib.ones(2)),
    "out_dims list for one output": lambda lib: lib.vmap(lambda x: x, out_dims=[0])(lib.ones(2)),
    # test_out_dims_none
    "a mapped output apart": lambda lib: lib.vmap(lambda x: x, out_dims=None)(lib.ones(2)),
    "a mapped output among others": lambda lib: lib.vmap(_pair, out_dims=(0, None))(lib.ones(2)),
    # test_out_dim_out_of_bounds_err_msg
    "out_dim too large": lambda lib: lib.vmap(lambda x: x, out_dims=3)(lib.ones(2, 3)),
    "out_dim too small": lambda lib: lib.vmap(lambda x: x, out_dims=-3)(lib.ones(2, 3)),
    # the order of checks
    "out_dims before in_dims": lambda lib: lib.vmap(_pair, in_dims=[0], out_dims="a")(lib.ones(2)),
    "in_dims before no inputs": lambda lib: lib.vmap(_pair, in_dims=[0])(),
    # functional_call
    "not dicts": lambda lib: lib.functional_call(lib.linear(), [1], lib.ones(1)),
    "a set": lambda lib: lib.functional_call(lib.linear(), {"a"}, lib.ones(1)),
    "repeated": lambda lib: lib.functional_call(lib.linear(), ({"bias": lib.ones(1)},) * 2, lib.ones(1)),
    "repeated twice": lambda lib: lib.functional_call(
        lib.linear(), ({"bias": 1, "weight": 2}, {"weight": 1, "bias": 2}), lib.ones(1)
    ),
    "strict, missing": lambda lib: lib.functional_call(lib.linear(), {}, lib.ones(1), strict=True),
    "strict, unexpected": lambda lib: lib.functional_call(
        lib.linear(), {"b": lib.ones(1), "a.c": lib.ones(1), "bias": lib.ones(1)}, lib.ones(1), strict=True
    ),
    "no such submodule": lambda lib: lib.functional_call(lib.linear(), {"l2.bias": lib.ones(1)}, lib.ones(1)),
    "not an array": lambda lib: lib.functional_call(lib.linear(), {"bias": "a"}, lib.ones(1)),
    "not an array there": lambda lib: lib.functional_call(lib.linear(), {"in_features": lib.ones(1)}, lib.ones(1)),
    "not a module there": lambda lib: lib.functional_call(lib.linear(), {"in_features.a": lib.ones(1)}, lib.ones(1)),
    # stack_module_state
    "no models": lambda lib: lib.stack([]),
    "modes": lambda lib: lib.stack([lib.dropout(training=True), lib.dropout(training=False)]),
    "classes": lambda lib: lib.stack([lib.linear(), lib.dropout(training=True)]),
    "modes before classes": lambda lib: lib.stack(
        [lib.dropout(training=True), lib.linear(), lib.dropout(training=False)]
    ),
}

# Words that name a thing of PyTorch's own have their counterpart here.
COUNTERPARTS = (
    ("torch.Tensor", "jax.Array"),
    ("torch.nn.modules.module.Module", "flax.nnx.Module"),
    ("torch.nn.Module", "flax.nnx.Module"),
)


def _error(mistake: Callable[[Any], Any], lib: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        mistake(lib)
    return caught.value


def _first_line(text: str) -> str:
    """Without what ours adds on further lines, and without the ways the two libraries print the structure of a tree."""
    return re.sub(r"has structure .*", "has structure ...", text, flags=re.DOTALL)


@pytest.mark.thinned
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_meet_the_same_error(mistake: Callable[[Any], Any]) -> None:
    theirs, ours = _error(mistake, Torch), _error(mistake, Jax)
    assert isinstance(ours, type(theirs))
    expected = str(theirs)
    for word, counterpart in COUNTERPARTS:
        expected = expected.replace(word, counterpart)
    text = str(ours).partition("\n  member")[0]  # ours goes on to say which member
    assert _first_line(text) == _first_line(expected)


def test_what_is_pytorch_s_is_told_where_it_is_ported() -> None:
    class Own(torch.nn.Linear):
        """A class that PyTorch does not have."""

    models: Any = [Own(3, 2) for _ in range(2)]
    params, _ = torch.func.stack_module_state(models)
    for call in (lambda: stack_module_state(models), lambda: jaxensemble.vmap(lambda params: params)(params)):
        with pytest.raises(
            jaxensemble.InputError, match=r"ported by torch_bridge.to_flax and torch_bridge.to_ensemble$"
        ):
            call()
