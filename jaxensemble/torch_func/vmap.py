"""PyTorch's `vmap` for functions of JAX arrays.

Mirrors `torch.func.vmap` of PyTorch 2.13 (torch/_functorch/apis.py and vmap.py): the same arguments, the same checks in
the same order, the same types of error with the same words. It runs on `jax.vmap`, from which it differs: keyword
arguments are not mapped, and `None` is a value, not an empty tree.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxensemble.errors import InputError, StateError, porting_advice
from jaxensemble.modules.randomness import Randomness, enter_level

_RANDOMNESS = ("error", "different", "same")
_MAPPED, _CONSTANT, _OTHER = range(3)  # how an output leaves jax.vmap


def vmap(
    func: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Maps `func` over a dimension of its inputs, which may be any trees of arrays, of JAX or numpy.

    - `in_dims`: the dimension to map, or `None` for an input that every call gets whole. One for all, or a tuple with
      one for each positional argument, nested as the argument is; negative numbers count from the end.
    - `out_dims`: the place of the mapped dimension in each output; `None` for an output that does not depend on it. An
      output that does not depend on the mapped inputs is repeated along the mapped dimension.
    - `chunk_size`: how many elements run at once; the last chunk is the remainder. The chunks run one after another;
      under `jax.jit` each is compiled, so for hundreds of chunks use `jax.lax.map(batch_size=...)`.
    - `randomness` is about the random streams of Flax modules that [`functional_call`][jaxensemble.functional_call]
      runs within `func`; PyTorch's generator is global, JAX has keys. `"error"`: drawing from a stream raises.
      `"same"`: every element draws the same. `"different"`: each draws from the stream's key with its position folded
      in, for every level of nested `vmap`s that says so. Keys that `func` handles itself are left alone.

    Keyword arguments of the mapped function are passed on whole.

    **Raises:** as PyTorch does, `InputError` (a `ValueError`) for dims, inputs or outputs that do not fit, `StateError`
    (a `RuntimeError`) for `randomness`, `IndexError` for an `out_dims` out of range.

    >>> vmap(jnp.dot, in_dims=(0, None))(jnp.ones((2, 5)), jnp.ones(5))
    Array([5., 5.], dtype=float32)
    """
    if randomness not in _RANDOMNESS:
        raise StateError(f"Only allowed values for randomness are 'error', 'different', or 'same'. Got {randomness}")
    if not (chunk_size is None or chunk_size > 0):
        raise InputError(f"vmap: chunk_size should be None or greater than 0. (got {chunk_size})")

    @functools.wraps(func, updated=())  # a module as `func` must not lend its attributes to the wrapper
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _check_out_dims(out_dims, func)
        size, dims, leaves, treedef = _read_inputs(in_dims, args, func)

        def call(*leaves: Any) -> Any:
            return func(*jax.tree.unflatten(treedef, leaves), **kwargs)

        mapped = _Mapped(call, dims, out_dims, randomness, _name(func))
        step = size if chunk_size is None else chunk_size
        starts = range(0, size, step) if size else (0,)
        return mapped.join([mapped.run(leaves, start, min(start + step, size)) for start in starts])

    return wrapped


@dataclasses.dataclass(eq=False)
class _Mapped:
    """A function of flat inputs, run on a range of the mapped dimension at a time."""

    call: Callable[..., Any]
    dims: list[int | None]
    out_dims: Any
    randomness: Randomness
    name: str
    out_treedef: Any = None  # known, like the next field, once the function has run
    out_flat_dims: list[int | None] = dataclasses.field(default_factory=list)

    def run(self, leaves: list[Any], start: int, stop: int) -> list[Any]:
        """The flat outputs for the elements from `start` to `stop`, the mapped dimension first where there is one."""
        routes: list[int] = []
        others: list[Any] = []  # outputs other than arrays, which cannot leave jax.vmap as results

        def traced(*arrays: Any) -> tuple[list[Any], list[Any]]:
            groups: tuple[list[Any], ...] = ([], [], others)
            for output, dim in self._outputs(self.call(*_fill(leaves, self.dims, arrays))):
                routes.append(_MAPPED if dim is not None else _CONSTANT if _is_array(output) else _OTHER)
                groups[routes[-1]].append(output)
            return groups[_MAPPED], groups[_CONSTANT]

        arrays = [_part(leaf, dim, start, stop) for leaf, dim in zip(leaves, self.dims, strict=True) if dim is not None]
        in_axes = tuple(dim for dim in self.dims if dim is not None)
        with enter_level(self.randomness, start) as level:
            try:
                results = jax.vmap(traced, in_axes, out_axes=(0, None), axis_name=level.axis_name)(*arrays)
            except ValueError as error:
                if _CONSTANT not in routes:
                    raise  # from within the function
                name = self.name
                raise InputError(
                    f"vmap({name}, ...): `{name}` can not return a BatchedTensor when out_dim is None"
                ) from error
        groups = [iter(group) for group in (*results, others)]
        return [next(groups[route]) for route in routes]

    def join(self, chunks: list[list[Any]]) -> Any:
        """The outputs of all chunks as one tree, the mapped dimension where `out_dims` wants it."""
        outputs = [
            parts[0] if dim is None else _move_dim(parts[0] if len(parts) == 1 else jnp.concatenate(parts), dim)
            for parts, dim in zip(zip(*chunks, strict=True), self.out_flat_dims, strict=True)
        ]
        return jax.tree.unflatten(self.out_treedef, outputs)

    def _outputs(self, outputs: Any) -> list[tuple[Any, int | None]]:
        """Each output with the place of its mapped dimension."""
        flat, self.out_treedef = jax.tree.flatten(outputs, is_leaf=_is_none)
        self.out_flat_dims = self._flat_out_dims(outputs)
        pairs = list(zip(flat, self.out_flat_dims, strict=True))
        for output, dim in pairs:
            if dim is not None and not _is_array(output):
                raise InputError(
                    f"vmap({self.name}, ...): `{self.name}` must only return Tensors, got type {type(output)}. "
                    "Did you mean to set out_dims= to None for output?"
                )
        return pairs

    def _flat_out_dims(self, outputs: Any) -> list[int | None]:
        out_dims = self.out_dims
        if _is_array(outputs):  # PyTorch takes out_dims=(1,) for a single output, but no other nesting
            if isinstance(out_dims, tuple) and len(out_dims) == 1:
                return list(out_dims)
            return [out_dims] if isinstance(out_dims, int) or out_dims is None else self._out_dims_misfit()
        dims = _broadcast(out_dims, outputs)
        return self._out_dims_misfit() if dims is None else dims

    def _out_dims_misfit(self) -> NoReturn:
        raise InputError(
            f"vmap({self.name}, ..., out_dims={self.out_dims})(<inputs>): "
            f"out_dims is not compatible with the structure of `outputs`. "
            f"out_dims has structure {_structure(self.out_dims)} but outputs has structure {self.out_treedef}."
        )


def _check_out_dims(out_dims: Any, func: Callable[..., Any]) -> None:
    for dim in jax.tree.leaves(out_dims, is_leaf=_is_none):
        if not isinstance(dim, int) and dim is not None:
            raise InputError(
                f"vmap({_name(func)}, ..., out_dims={out_dims}): `out_dims` must be "
                f"an int, None or a python collection of ints representing where in the outputs the "
                f"vmapped dimension should appear."
            )


def _read_inputs(
    in_dims: Any, args: tuple[Any, ...], func: Callable[..., Any]
) -> tuple[int, list[int | None], list[Any], Any]:
    where = f"vmap({_name(func)}, in_dims={in_dims}, ...)(<inputs>): "
    if not isinstance(in_dims, int | tuple):
        raise InputError(
            f"{where}expected `in_dims` to be int or a (potentially nested) tuple "
            f"matching the structure of inputs, got: {type(in_dims)}."
        )
    if not args:
        raise InputError(
            f"vmap({_name(func)})(<inputs>): got no inputs. Maybe you forgot to add "
            f"inputs, or you are trying to vmap over a function with no inputs. "
            f"The latter is unsupported."
        )
    leaves, treedef = jax.tree.flatten(args, is_leaf=_is_none)
    dims = _broadcast(in_dims, args)
    if dims is None:
        raise InputError(
            f"{where}in_dims is not compatible with the structure of `inputs`. "
            f"in_dims has structure {_structure(in_dims)} but inputs has structure {treedef}."
        )
    dims = [_check_in_dim(leaf, dim, where) for leaf, dim in zip(leaves, dims, strict=True)]
    return _mapped_size(leaves, dims), dims, leaves, treedef


def _check_in_dim(leaf: Any, dim: Any, where: str) -> int | None:
    if dim is None:
        return None
    if not isinstance(dim, int):
        raise InputError(
            f"{where}Got in_dim={dim} for an input but in_dim must be either an integer dimension or None."
        )
    if not _is_array(leaf):
        raise InputError(
            f"{where}Got in_dim={dim} for an input but the input is of type "
            f"{type(leaf)}. We cannot vmap over non-Tensor arguments, "
            f"please use None as the respective in_dim{porting_advice(leaf)}"
        )
    if not -leaf.ndim <= dim < leaf.ndim:
        raise InputError(
            f"{where}Got in_dim={dim} for some input, but that input is a Tensor "
            f"of dimensionality {leaf.ndim} so expected in_dim to satisfy "
            f"-{leaf.ndim} <= in_dim < {leaf.ndim}."
        )
    return dim % leaf.ndim


def _mapped_size(leaves: list[Any], dims: list[int | None]) -> int:
    sizes = [leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    if not sizes:
        raise InputError("vmap: Expected at least one Tensor to vmap over")
    if any(size != sizes[0] for size in sizes):
        raise InputError(
            f"vmap: Expected all tensors to have the same size in the mapped "
            f"dimension, got sizes {sizes} for the mapped dimension"
        )
    return sizes[0]


def _broadcast(dims: Any, tree: Any) -> list[Any] | None:
    """One dim for each leaf of `tree`; `None` unless `dims` is a prefix of it."""
    flat: list[Any] = []
    try:
        jax.tree.map(lambda dim, part: flat.extend([dim] * _count(part)), dims, tree, is_leaf=_is_none)
    except ValueError:  # JAX's error for trees that differ
        return None
    return flat


def _part(leaf: Any, dim: int, start: int, stop: int) -> Any:
    if (start, stop) == (0, leaf.shape[dim]):
        return leaf
    return leaf[(slice(None),) * dim + (slice(start, stop),)]


def _fill(leaves: list[Any], dims: list[int | None], arrays: tuple[Any, ...]) -> list[Any]:
    mapped = iter(arrays)
    return [leaf if dim is None else next(mapped) for leaf, dim in zip(leaves, dims, strict=True)]


def _move_dim(output: jax.Array, dim: int) -> jax.Array:
    if not -output.ndim <= dim < output.ndim:
        low, high = -output.ndim, output.ndim - 1
        raise IndexError(f"Dimension out of range (expected to be in range of [{low}, {high}], but got {dim})")
    return output if dim == 0 else jnp.moveaxis(output, 0, dim)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_none(value: Any) -> bool:
    return value is None


def _count(tree: Any) -> int:
    return len(jax.tree.leaves(tree, is_leaf=_is_none))


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_none)


def _name(func: Callable[..., Any]) -> str:
    """The name of a function in PyTorch's errors."""
    if hasattr(func, "__name__"):
        return func.__name__
    if isinstance(func, functools.partial):
        return f"functools.partial({_name(func.func)}, ...)"
    return repr(func)
