"""Identity of a run: hashes that distinguish it from other runs, and names that say how runs differ."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxensemble.arrays import is_x64_on
from jaxensemble.devices.placement import gather
from jaxensemble.errors import shorten_list
from jaxensemble.training.augmentation import Augment
from jaxensemble.training.fingerprint import digest, digest_of_function, digest_of_program, digest_of_shapes
from jaxensemble.training.losses import Loss, number_of
from jaxensemble.training.names import named_parts, short_text
from jaxensemble.training.planning import gradient_program, prepare_step
from jaxensemble.training.state import TrainState, is_injected, trained_parameters

_MOST = 500
"""Number of parts of a network up to which they are kept by name."""


def surroundings(state: TrainState) -> dict[str, Any]:
    """Returns the settings that no argument of `fit` shows, and that must be as before."""
    return {
        "version of JAX": jax.__version__,
        "precision of products": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "64-bit types": is_x64_on(),
        "frozen parameters": sorted(state.frozen),
        "steps made before": int(state.steps),
    }


# Each function below returns a hash, which decides whether runs are the same; its kind (`derived`: depends on other
# entries); and parts by name, which say how runs differ.


def state_identity(state: TrainState) -> dict[str, Any]:
    """Returns the identity of the arrays of a state."""
    placement = state.ensemble.placement
    state = state if placement is None else state.map_members(placement.cut)
    ensemble = state.ensemble
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    hyperparams = {str(path[-1].key): short_text(gather(leaf)) for path, leaf in leaves if is_injected(path)}
    return {
        "the weights of the members": arrays_identity(ensemble.params),
        "the buffers and constants of the members": arrays_identity(
            (ensemble.buffers, ensemble.constants, ensemble.rngs)
        ),
        "the random keys": arrays_identity(state.keys),
        "the rates of dropout": arrays_identity(
            state.rates, {name: short_text(gather(rate)) for name, rate in state.rates.items()}
        ),
        "the state of the optimizer": arrays_identity(state.opt_state, hyperparams) | {"kind": "derived"},
    }


def data_identity(inputs: Any, targets: Any) -> dict[str, Any]:
    """Returns the identity of inputs and targets."""
    leaves = jax.tree_util.tree_leaves_with_path({"inputs": inputs, "targets": targets})
    shapes = {
        f"{path[0].key}{jax.tree_util.keystr(path[1:])}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
    }
    return arrays_identity((inputs, targets), shapes)


def arrays_identity(tree: Any, parts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the identity of arrays, with named parts of them."""
    return {"digest": digest(tree), "shapes": digest_of_shapes(tree), "kind": "arrays", "parts": parts or {}}


def function_identity(function: Callable[..., Any], *arguments: Any, named: Any = None) -> dict[str, Any]:
    """Returns the identity of a function for arguments of these shapes, with the parts of `named` if it is given."""
    return {
        "digest": digest_of_function(function, *arguments),
        "kind": "program",
        "parts": named_parts(named or function),
    }


def steps_identity(state: TrainState, data: Any, rows: Any, loss: Loss, augment: Augment | None) -> dict[str, Any]:
    """Returns the identity of the steps. They are traced again, since JAX's precision may have changed."""
    step, case, targets = prepare_step(state, data, rows, loss, each=False, augment=augment)
    member = functools.partial(case.call.member, vmapped=None)
    outputs, _ = jax.eval_shape(member, *case.one_member())
    held = trained_parameters(state.ensemble.params, state.frozen), state.opt_state
    params, opt_state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), held)
    gradient, _ = gradient_program(case, loss, targets, state.frozen)
    network = digest_of_program(jax.make_jaxpr(member)(*case.one_member()))
    return {
        "the loss": function_identity(functools.partial(number_of, loss), outputs, targets, named=loss),
        "the network": {"digest": network, "kind": "program", "parts": _parts_of_network(state)},
        "the optimizer": function_identity(state.optimizer.update, params, opt_state, params, named=state.optimizer),
        "the augmentation": function_identity(step.minibatch, data, rows, state.keys, named=augment)
        if augment
        else None,
        "the gradient of the loss": {"digest": digest_of_program(gradient), "kind": "derived", "parts": {}},
    }


def _parts_of_network(state: TrainState) -> dict[str, str]:
    training = state.training
    parts = {
        "class": training.root.type.__name__,
        "layers in training mode": shorten_list(training.training_layers()) or "none",
    }
    numbers = {
        ".".join(map(str, path)): str(entry[1])
        for path, entry in training.entries.items()
        if isinstance(entry[1], int | float) and not isinstance(entry[1], bool)
    }
    return parts | (numbers if len(numbers) <= _MOST else {})


def run_differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Returns the differences between a run and an earlier run, a line each, by name where possible.

    >>> rate = {"digest": "a", "kind": "program", "parts": {"learning rate": "0.1"}}
    >>> now = {"batch": 8, "the optimizer": rate, "the data": arrays_identity(())}
    >>> then = {"batch": 16, "the optimizer": {**rate, "digest": "c", "parts": {"learning rate": "0.01"}}}
    >>> run_differences(now, then)
    ['batch 8, was 16', 'the optimizer: learning rate 0.1, was 0.01', 'the data: there was none']
    """
    lines, unnamed, resized = [], [], False
    for name in dict.fromkeys((*now, *then)):
        a, b = now.get(name), then.get(name)
        if a == b:
            continue
        if not isinstance(a, dict) and not isinstance(b, dict):
            lines.append(f"{name} {_text(a)}, was {_text(b)}")
            resized = True
        elif a is None or b is None:
            lines.append(f"{name}: there {'is none now' if a is None else 'was none'}")
        elif a["digest"] != b["digest"]:
            parts = list(_part_differences(a["parts"], b["parts"]))
            lines += [f"{name}: {line}" for line in parts]
            resized |= a.get("shapes") != b.get("shapes")
            if not parts:
                unnamed.append((name, a["kind"]))
    # A program depends on settings and on sizes of arrays, so it may differ only because they do.
    passed_over = {"program", "derived"} if resized else {"derived"}
    lines += [f"{name}: not the same as before" for name, kind in unnamed if kind not in passed_over]
    return lines or [f"{name}: not the same as before" for name, _ in unnamed]


def _part_differences(now: Mapping[str, str], then: Mapping[str, str]) -> Iterator[str]:
    """Yields the parts that differ; parts of one side alone only where both are made of the same functions."""
    same = now.get("made of") == then.get("made of")
    for name in dict.fromkeys((*now, *then)):
        if now.get(name) != then.get(name) and (same or (name in now and name in then)):
            yield f"{name} {now[name]}, was {then.get(name, 'none')}" if name in now else f"no {name}, was {then[name]}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
