"""Tracing of the axes of all values in a Flax module, through its jaxpr to the axes of its arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxensemble.compat import Var, scan_counts
from jaxensemble.errors import InputError, describe_error
from jaxensemble.modules.state import flatten, merge, split, unflatten
from jaxensemble.modules.structure import Path
from torch_bridge.state_dicts.axes import Axis, unify_axes
from torch_bridge.state_dicts.rules import AxisList, AxisRule, find_rule, new_axes, unknown_axes


def trace_axes(module: nnx.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, AxisList], dict[Path, linen.Module]]:
    """Traces the axes of every parameter and buffer through one call in evaluation mode.

    `module` is neither changed nor run: its call is traced with the shapes and dtypes of `inputs`.

    **Returns:** the axes by dotted name, and the called modules of `flax.linen`, by the path of their arrays.

    **Raises:** `InputError` if the call fails.
    """
    layers: dict[Path, linen.Module] = {}
    state = split(module)
    module = merge(*state)
    nnx.Module.eval(module)
    state = split(module)
    groups = {"params": flatten(state.params), "buffers": flatten(state.buffers)}
    initial = groups["params"] | groups["buffers"]
    names = list(initial)

    def call(leaves: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
        arrays = dict(zip(names, leaves, strict=True))
        trees = {kind: unflatten({name: arrays[name] for name in group}) for kind, group in groups.items()}
        return jax.tree.leaves(_watch_modules(merge(*state._replace(**trees)), layers)(*inputs))

    leaves = [jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype) for leaf in initial.values()]
    try:
        program = jax.make_jaxpr(call)(leaves, inputs)
    except Exception as error:  # a user's call may raise anything
        bare = not initial and any(isinstance(layer, nnx.bridge.ToNNX) for _, layer in nnx.iter_modules(module))
        advice = "An nnx.bridge.ToNNX has arrays after .lazy_init(example_input)." if bare else _INPUT_ADVICE
        raise InputError(
            f"`flax_module` cannot be called with `example_input`: {describe_error(error)}\n{advice}",
            details=str(error),
        ) from error
    own = {name: [Axis(size) for size in leaf.shape] for name, leaf in zip(names, leaves, strict=True)}
    given = [
        [Axis(size, raw=True, last=k == leaf.ndim - 1) for k, size in enumerate(leaf.shape)]
        for leaf in jax.tree.leaves(inputs)
    ]
    _trace_program(program, [*own.values(), *given])
    return own, layers


_INPUT_ADVICE = "Pass an input of the Flax module (channels-last, for convolutions); a tuple for several arguments."


_SEEN = "to_nnx__seen"  # ToNNX takes attributes with other beginnings for arrays


class _Watched(nnx.bridge.ToNNX):
    """Module of `flax.linen` that records each of its modules when they are called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(getattr(self, _SEEN)):
            return super().__call__(*args, **kwargs)


def _watch_modules(module: Any, layers: dict[Path, linen.Module]) -> Any:
    """Changes a module so that modules of `flax.linen` in it record in `layers` which modules they call."""
    for path, layer in nnx.iter_modules(module):
        if type(layer) is nnx.bridge.ToNNX:
            above = tuple(map(str, path))

            def seen(call: Any, args: Any, kwargs: Any, context: Any, above: Path = above) -> Any:
                layers[*above, *context.module.path] = context.module
                return call(*args, **kwargs)

            layer.__class__ = _Watched
            setattr(layer, _SEEN, seen)
    return module


def _trace_program(jaxpr: Any, inputs: Sequence[AxisList]) -> list[AxisList]:
    known: dict[Any, AxisList] = dict(zip(jaxpr.invars, inputs, strict=True))

    def axes_of(atom: Any) -> AxisList:
        aval: Any = atom.aval
        return known[atom] if isinstance(atom, Var) and atom in known else new_axes(aval.shape)

    for equation in jaxpr.eqns:
        operands = [axes_of(atom) for atom in equation.invars]
        for variable, axes in zip(equation.outvars, _equation_rule(equation)(equation, operands), strict=True):
            known[variable] = axes
    return [axes_of(atom) for atom in jaxpr.outvars]


def _equation_rule(equation: Any) -> AxisRule:
    name = equation.primitive.name
    return LOOPS.get(name) or find_rule(name) or (unknown_axes if _inner_program(equation.params) is None else _inline)


def _inner_program(params: Mapping[str, Any]) -> Any:
    """Returns the jaxpr of a call, which runs once on the unchanged operands; None for other primitives."""
    name = next((name for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params), None)
    return None if name is None else params[name]


def _inline(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    jaxpr = _inner_program(equation.params)
    sizes = [tuple(axis.size for axis in axes) for axes in operands]
    if [getattr(variable.aval, "shape", None) for variable in jaxpr.invars] != sizes:
        for axis in (axis for axes in operands for axis in axes):
            axis.find().opaque = equation.primitive.name  # operations on it are not visible
        return unknown_axes(equation, operands)
    return _trace_program(jaxpr, operands)


def _scan(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    """Returns the axes after a loop. Carried values keep their axes; scanned values lose and regain the first."""
    constants, carried = scan_counts(equation)
    scanned = operands[constants + carried :]
    steps = scanned[0][0] if scanned else Axis(equation.params["length"])
    results = _trace_program(
        _inner_program(equation.params), [*operands[: constants + carried], *(axes[1:] for axes in scanned)]
    )
    _unify_all(operands[constants : constants + carried], results[:carried])
    return [*results[:carried], *([steps, *axes] for axes in results[carried:])]


def _while(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    ignored, constants = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    results = _trace_program(equation.params["body_jaxpr"], operands[ignored:])
    _unify_all(operands[ignored + constants :], results)
    return results


def _cond(equation: Any, operands: list[AxisList]) -> list[AxisList]:
    first, *others = [_trace_program(branch, operands[1:]) for branch in equation.params["branches"]]
    for results in others:
        _unify_all(first, results)
    return first


def _unify_all(ours: Sequence[AxisList], theirs: Sequence[AxisList]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left, right, strict=True):
            unify_axes(a, b)


LOOPS: Mapping[str, AxisRule] = {"cond": _cond, "scan": _scan, "while": _while}
"""Rules of primitives that run inner jaxprs any number of times."""
