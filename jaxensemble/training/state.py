"""`TrainState`: an ensemble in training, with everything that the next step needs."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, StateError
from jaxensemble.modules.randomness import as_key, member_keys
from jaxensemble.modules.state import STACKED, Tree, flatten, merge, split, unflatten
from jaxensemble.modules.structure import Structure
from jaxensemble.network.network import Network
from jaxensemble.network.weight_map import Origin
from jaxensemble.running.device import default_device


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ensemble", "opt_state", "keys", "rates", "steps"],
    meta_fields=["optimizer", "training", "frozen"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainState:
    """Ensemble in training. A pytree; [`train_step`][jaxensemble.train_step] returns the next one.

    - `ensemble`: the members after the steps so far, in the mode they were given in: `state.ensemble(x)` predicts.
    - `opt_state`: the optimizer's state of every member, arrays `[M, ...]`.
    - `keys`: a random key for each member, `[M]`, for dropout, shuffling and bootstrap. The keys do not change; each
      step makes its random numbers from them and `steps`.
    - `rates`: rates of dropout layers where members have their own, `[M]` each, by their names in `training`.
    - `steps`: the number of steps so far.
    - `optimizer`: runs for each member separately, so that a norm over all parameters is a norm over one member's.
    - `training`: the network in training mode. `frozen`: the parameters that are not trained, by dotted name.
    """

    ensemble: Ensemble
    opt_state: Any
    keys: jax.Array
    rates: dict[str, jax.Array]
    steps: jax.Array
    optimizer: optax.GradientTransformation
    training: Structure
    frozen: frozenset[str] = frozenset()

    @classmethod
    def create(
        cls,
        ensemble: Ensemble,
        optimizer: optax.GradientTransformation,
        key: Any,
        *,
        randomness: Literal["different", "same"] = "different",
        hyperparams: Mapping[str, Any] | None = None,
        dropout: Any = None,
        frozen: Collection[str] | None = None,
        train: bool = True,
    ) -> "TrainState":
        """Returns the state before the first step.

        **Arguments:**

        - `optimizer`: an optax optimizer whose updates need gradients and parameters only, unlike `optax.lbfgs` and
          `optax.contrib.reduce_on_plateau`, which need the loss. It runs for each member separately. For complex
          parameters it gets the conjugates of `jax.grad`, as optax and PyTorch expect.
          `optax.contrib.split_real_and_imaginary` makes an optimizer treat a complex number as two real ones, as
          PyTorch's optimizers do.
        - `key`: one random key, or a key for each member, `[M]`. With `randomness="same"` all members draw the same.
        - `hyperparams`: arrays `[M]` instead of an optimizer's own numbers, by name, for numbers of
          `optax.inject_hyperparams`.
        - `dropout`: the rate of all dropout layers, `[M]` or one for all; by default the network's own. Porting drops
          layers of rate 0: port the models with a rate above 0.
        - `frozen`: parameters that stay as they are, by dotted name or its beginning (`layer1` for all of
          `layer1.0.conv1.kernel` ...). By default, the parameters that PyTorch did not train (`requires_grad=False`).
          Parameters that the loss does not reach stay as they are in any case.
        - `train`: whether all layers are put into training mode. `False` leaves each layer in its mode, for example
          BatchNorms that keep their statistics.

        **Raises:** `InputError` for keys, names and arrays that do not fit, `StateError` for a network that was ported
        for evaluation only.

        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(4)])
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        >>> rates = {"learning_rate": jnp.array([0.1, 0.2, 0.3, 0.4])}
        >>> TrainState.create(ensemble, optimizer, jax.random.key(0), hyperparams=rates)
        TrainState(4 x Linear, 8 of 8 parameters trained, 0 steps)
        """
        if not isinstance(ensemble, Ensemble):
            raise InputError(f"`ensemble` must be a jaxensemble.Ensemble; got {type(ensemble).__name__}")
        if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
            raise InputError(
                "`optimizer` must be an optax optimizer, for example optax.adamw(1e-3); torch_bridge.optimizer makes "
                f"the twin of a PyTorch optimizer. Got {getattr(optimizer, '__name__', type(optimizer).__name__)}"
            )
        network = ensemble.network
        if train and isinstance(network, Network) and network.evaluation_only:
            raise StateError(
                f"the network was ported for evaluation only, because {network.evaluation_only}. With train=False it "
                "is trained as it is in evaluation mode."
            )
        names = _frozen_names(ensemble, frozen)
        params = trained_parameters(ensemble.params, names)
        odd = [name for name, leaf in flatten(params).items() if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if odd:
            raise InputError(f"only real and complex numbers can be trained; freeze {', '.join(odd)}")
        if not params:
            raise InputError(
                "there is nothing to train: there are no parameters, or all are frozen. Parameters that PyTorch did "
                "not train (requires_grad=False) are frozen by default; frozen=[] trains all"
            )
        members, module = len(ensemble), merge(*(ensemble.train() if train else ensemble).state)
        rates = {} if dropout is None else _install_rates(module, dropout, members)
        keys, steps, placement = _state_keys(key, members, randomness), jnp.zeros((), jnp.int32), ensemble.placement
        if placement is not None:
            keys, rates, steps = placement.place(keys), placement.place(rates), placement.put(steps, SHARED)
        return cls(
            ensemble=ensemble,
            opt_state=_set_hyperparams(jax.vmap(optimizer.init)(params), hyperparams or {}, members, placement),
            keys=keys,
            rates=rates,
            steps=steps,
            optimizer=optimizer,
            training=split(module).graphdef,
            frozen=names,
        )

    def over(self, mesh: Any, members: str = "members", rows: str | None = None) -> "TrainState":
        """Returns the state with its members over the devices of a mesh: see [`Ensemble.over`][].

        Every device trains its own members, and nothing is sent from one to another. With `rows`, the gradients of
        parts of a minibatch are averaged over that axis, which only networks that keep rows apart allow, and losses
        that are means over rows; dropout then draws other numbers than without.

        **Raises:** `InputError` for anything but a mesh, and for axes that it does not have.
        """
        ensemble, placement = self.ensemble.over(mesh, members, rows), self.ensemble.placement
        state = self if placement is None else self.map_members(placement.cut)
        state = dataclasses.replace(state, ensemble=ensemble)
        if ensemble.placement is None:
            return state._map_training(lambda tree: jax.device_put(tree, default_device()))
        steps = ensemble.placement.put(self.steps, SHARED)
        return dataclasses.replace(state._map_training(ensemble.placement.place), steps=steps)

    def map_members(self, function: Callable[[Any], Any]) -> "TrainState":
        """Returns the state with a function of trees applied to the arrays that begin with members."""
        trees = {kind: function(getattr(self.ensemble, kind)) for kind in STACKED}
        ensemble = dataclasses.replace(self.ensemble, **trees)
        return dataclasses.replace(self, ensemble=ensemble)._map_training(function)

    def _map_training(self, function: Callable[[Any], Any]) -> "TrainState":
        """Returns the state with a function applied to the arrays that begin with members, except the ensemble's."""
        fields = {name: function(getattr(self, name)) for name in ("opt_state", "keys", "rates")}
        return dataclasses.replace(self, **fields)

    def trained_from(self, other: "TrainState") -> "TrainState":
        """Returns the same state, whose ensemble remembers that it was trained from another state's ensemble."""
        return dataclasses.replace(self, ensemble=self.ensemble.trained_from(other.ensemble))

    def __repr__(self) -> str:
        name, flat = self.ensemble.graphdef.root.type.__name__, flatten(self.ensemble.params)
        if not flat or not all(isinstance(leaf, jax.Array | np.ndarray) and leaf.shape for leaf in flat.values()):
            return f"TrainState({name})"  # within jax.tree transformations leaves may be anything
        members = len(self.ensemble)
        sizes = {path: leaf.size // leaf.shape[0] for path, leaf in flat.items()}
        count, total = sum(sizes[path] for path in sizes.keys() - self.frozen), sum(sizes.values())
        return f"TrainState({members} x {name}, {count:,} of {total:,} parameters trained, {self.steps} steps)"


def trained_parameters(params: Tree, frozen: Collection[str]) -> Tree:
    """Returns the parameters that are trained."""
    return unflatten({name: leaf for name, leaf in flatten(params).items() if name not in frozen})


def replace_trained(params: Tree, changed: Tree) -> Tree:
    """Returns all parameters, with the trained ones from `changed`."""
    return unflatten(flatten(params) | flatten(changed))


def select_members(which: jax.Array, these: Any, others: Any) -> Any:
    """Selects arrays `[M, ...]`: of `these` where `which` `[M]` is true, of `others` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), these, others)


def _frozen_names(ensemble: Ensemble, given: Collection[str] | None) -> frozenset[str]:
    names = list(flatten(ensemble.params))
    if given is None:
        entries = ensemble.origin.weights.entries if isinstance(ensemble.origin, Origin) else ()
        return frozenset(entry.path for entry in entries if entry.frozen).intersection(names)
    if isinstance(given, str):
        raise InputError(f"`frozen` must hold names; got one, {given!r}: pass [{given!r}]")
    if not isinstance(given, Collection):
        raise InputError(f"`frozen` must hold names of parameters; got {given!r}")
    lost = [part for part in given if not any(f"{name}.".startswith(f"{part}.") for name in names)]
    if lost:
        raise InputError(f"`frozen` names {', '.join(map(repr, lost))}; the parameters are {', '.join(names)}")
    return frozenset(name for name in names if any(f"{name}.".startswith(f"{part}.") for part in given))


def _state_keys(key: Any, members: int, randomness: str) -> jax.Array:
    if randomness not in ("different", "same"):
        raise InputError(f"`randomness` must be 'different' or 'same'; got {randomness!r}")
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1:
        if key.shape != (members,) or randomness == "same":
            raise InputError(
                f"`key` must be one random key, or one for each of {members} members that draw different numbers; got "
                f"{key.shape[0]}, and randomness={randomness!r}"
            )
        return key
    key = as_key(key)
    return jnp.broadcast_to(key, (members,)) if randomness == "same" else member_keys(key, members)


def _set_hyperparams(opt_state: Any, hyperparams: Mapping[str, Any], members: int, placement: Placement | None) -> Any:
    if not isinstance(hyperparams, Mapping):
        raise InputError(f"`hyperparams` must be a dict of arrays [{members}] by name; got {hyperparams!r}")
    for name, values in hyperparams.items():
        places = optax.tree.get_all_with_path(opt_state, name)
        if any(getattr(part, "name", None) == "hyperparams_states" for path, _ in places for part in path):
            raise InputError(f"`hyperparams` names {name!r}, which the optimizer takes from a schedule")
        found = [value for path, value in places if is_injected(path)]
        if len(found) != 1:
            paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
            names = ", ".join(dict.fromkeys(str(path[-1].key) for path in paths if is_injected(path)))
            raise InputError(
                f"`hyperparams` names {name!r}, which {'no' if not found else 'more than one'} part of the optimizer's "
                "state has: "
                + (
                    f"there are {names}, one number each"
                    if names
                    else "make the optimizer with optax.inject_hyperparams, for example "
                    "optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)"
                )
            )
        array = np.asarray(values)
        if array.shape != (members,):
            raise InputError(
                f"`hyperparams[{name!r}]` must be [{members}], one number a member; got {list(array.shape)}"
            )
        numbers = jnp.asarray(array, _float_dtype(found[0].dtype))
        numbers = numbers if placement is None else placement.place(numbers)
        opt_state = optax.tree.set(opt_state, lambda path, _: is_injected(path), **{name: numbers})
    return opt_state


def _float_dtype(dtype: Any) -> Any:
    """Returns the dtype of a number; the default floating dtype if it was given as an integer."""
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def is_injected(path: Any) -> bool:
    """Returns whether a leaf of an optimizer's state is a number of `optax.inject_hyperparams`."""
    return any(getattr(part, "name", None) == "hyperparams" for part in path)


def _install_rates(module: nnx.Module, dropout: Any, members: int) -> dict[str, jax.Array]:
    """Replaces a module's dropout layers by layers whose rate is a variable; returns these variables, `[M]` each."""
    try:
        rates = np.asarray(dropout, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"`dropout` must be probabilities, one for all or [{members}]; got {dropout!r}") from error
    if rates.shape not in ((), (members,)) or not ((rates >= 0) & (rates <= 1)).all():
        raise InputError(f"`dropout` must be probabilities, one for all or [{members}]; got {dropout!r}")
    from jaxensemble.layers import AlphaDropout  # slow to import, and seldom needed here
    from jaxensemble.layers.dropout import MemberDropout, Rate

    layers = dict(nnx.iter_modules(module))
    ours = [layer for layer in layers.values() if type(layer) is nnx.Dropout]
    odd = [
        f"{'.'.join(map(str, path))}, a {type(layer).__name__}"
        for path, layer in layers.items()
        if type(layer) is not nnx.Dropout and isinstance(layer, nnx.Dropout | AlphaDropout | nnx.MultiHeadAttention)
    ]
    if odd or not ours:
        reason = f"of {'; '.join(odd)}" if odd else "of a network without nnx.Dropout"
        raise InputError(f"`dropout`: the rate {reason} cannot be set")
    for layer in ours:
        MemberDropout.take_over(layer)
    array = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (members,))
    return {leaf.name: array for leaf in split(module).graphdef.leaves if leaf.type is Rate}
