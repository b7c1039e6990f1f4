"""Members packed in the channels of convolutions, from one convolution to the next.

`jax.vmap` packs the members for each convolution and unpacks its results. cuDNN adds a bias, adds another array and
applies an activation within the convolution, but XLA gives it these steps only where they follow directly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.compat import JaxprEqn, run_step
from jaxensemble.programs.evaluate import run_program, write_out
from jaxensemble.programs.rewrite import CONVOLUTION


def pack_members(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of all members, with steps between convolutions on packed arrays.

    The numbers are the same. Rules of differentiation are lost: it is for evaluation.

    >>> import jax
    >>> from jaxensemble.programs.rewrite import primitives
    >>> convolve = lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME")
    >>> layers = lambda x, first, second: convolve(jax.nn.relu(convolve(x, first)), second)
    >>> arrays = jnp.ones((2, 8, 3, 5, 5)), jnp.ones((2, 4, 3, 1, 1)), jnp.ones((2, 6, 4, 1, 1))
    >>> members = jax.vmap(layers)
    >>> primitives(members, *arrays)["reshape"], primitives(pack_members(members), *arrays)["reshape"]
    (6, 4)
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.disable_jit(False):
            program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
            program = write_out(program)
        axes = {step.outvars[0]: _features(step) for step in program.eqns if step.primitive.name == CONVOLUTION}
        found = run_program(program, jax.tree.leaves(args), functools.partial(_run, axes))
        return jax.tree.unflatten(jax.tree.structure(shapes), [*map(_unpacked, found)])

    return run


class _Packed(NamedTuple):
    """An array whose axis `axis` holds members and channels.

    Split in two, members first, and with its axes in `order`, it is the array of the program.
    """

    array: Any
    axis: int
    members: int
    order: tuple[int, ...]

    @property
    def split(self) -> tuple[int, ...]:
        """The shape of the array with members and channels apart."""
        shape, axis = self.array.shape, self.axis
        return (*shape[:axis], self.members, shape[axis] // self.members, *shape[axis + 1 :])

    def unpack(self) -> Any:
        return jnp.transpose(jnp.reshape(self.array, self.split), self.order)

    def pack(self, other: Any) -> Any:
        """Another operand in the form of this one; None if it has another."""
        if isinstance(other, _Packed):
            return other.array if other[1:] == self[1:] and other.split == self.split else None
        if np.ndim(other) == 0:
            return other
        if np.ndim(other) != len(self.order):
            return None
        back = jnp.transpose(other, sorted(range(len(self.order)), key=self.order.__getitem__))
        if back.shape == self.split:
            return jnp.reshape(back, self.array.shape)
        both = self.axis, self.axis + 1
        if any(size != 1 for k, size in enumerate(back.shape) if k not in both):
            return None
        back = jnp.broadcast_to(back, [size if k in both else 1 for k, size in enumerate(self.split)])
        return jnp.reshape(back, [-1 if k == self.axis else 1 for k in range(self.array.ndim)])


def _features(step: JaxprEqn) -> int:
    return step.params["dimension_numbers"].out_spec[1]


def _unpacked(value: Any) -> Any:
    return value.unpack() if isinstance(value, _Packed) else value


def _run(convolved: dict[Any, int], step: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    name = step.primitive.name
    packed = next((value for value in operands if isinstance(value, _Packed)), None)
    result = None
    if name == "reshape" and packed is None:
        result = _split(step, operands[0], convolved.get(step.invars[0]))
    elif packed is None:
        return run_step(step, operands)
    elif name == "transpose":
        result = packed._replace(order=tuple(packed.order[k] for k in step.params["permutation"]))
    elif name == "reshape":
        result = _merged(step, packed)
    elif name in _ELEMENTWISE or (name == "clamp" and np.ndim(operands[0]) == np.ndim(operands[2]) == 0):
        alike = [packed.pack(value) for value in operands]
        if all(value is not None for value in alike):
            (array,) = run_step(step, alike)
            result = packed._replace(array=array)
    elif name == "reduce_window_max":
        result = _pooled(step, packed)
    return run_step(step, [*map(_unpacked, operands)]) if result is None else [result]


def _split(step: JaxprEqn, array: Any, axis: int | None) -> _Packed | None:
    """The result of a convolution that a step splits into members and channels."""
    sizes = step.params["new_sizes"]
    if axis is None or step.params["dimensions"] is not None or len(sizes) != array.ndim + 1:
        return None
    packed = _Packed(array, axis, sizes[axis], tuple(range(len(sizes))))
    return packed if array.shape[axis] % sizes[axis] == 0 and packed.split == sizes else None


def _merged(step: JaxprEqn, packed: _Packed) -> Any:
    """The packed array, if a step packs again what was unpacked."""
    dimensions = step.params["dimensions"] or range(len(packed.order))
    order = [packed.order[k] for k in dimensions]
    same = order == sorted(order) and step.params["new_sizes"] == packed.array.shape
    return packed.array if same else None


def _pooled(step: JaxprEqn, packed: _Packed) -> _Packed | None:
    """The largest numbers in windows of a packed array, if no window has more than one member or channel."""
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation", "padding")
    places = np.argsort(packed.order)
    split = {name: [tuple(step.params[name])[k] for k in places] for name in names}
    for at in (packed.axis, packed.axis + 1):
        if split["padding"][at] != (0, 0) or any(split[name][at] != 1 for name in names[:4]):
            return None
    params = {name: tuple(values[: packed.axis] + values[packed.axis + 1 :]) for name, values in split.items()}
    (array,) = run_step(step.replace(params={**step.params, **params}), [packed.array])
    return packed._replace(array=array)


_ELEMENTWISE = frozenset(
    {"abs", "add", "convert_element_type", "div", "erf", "exp", "log", "logistic", "max", "min", "mul", "neg"}
    | {"square", "sqrt", "sub", "tanh"}
)
