"""M networks that differ in nothing but their weights, as one value and one XLA program."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxensemble.arrays import require_x64
from jaxensemble.artifact.contents import Saved
from jaxensemble.artifact.loading import Artifact
from jaxensemble.artifact.pickling import reduce_ensemble
from jaxensemble.artifact.saving import write_artifact
from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.errors import InputError, MemberError, StateError, shorten_list
from jaxensemble.modules.casting import cast_state
from jaxensemble.modules.modes import set_mode, warn_of_training_layers
from jaxensemble.modules.randomness import initial_rngs, split_rngs
from jaxensemble.modules.selection import member_positions, take_members
from jaxensemble.modules.stacking import check_same_architecture, count_members, stack_states
from jaxensemble.modules.state import KINDS, STACKED, State, Tree, check_names, flatten, merge
from jaxensemble.modules.structure import MODE_FLAGS, STATISTICS, Structure
from jaxensemble.network.network import Network
from jaxensemble.network.proof import Lineage, Proof
from jaxensemble.network.sources import Source
from jaxensemble.programs.rows import Axes
from jaxensemble.running.batches import check_figures, run_batches, split_rows
from jaxensemble.running.device import default_device, human_bytes
from jaxensemble.running.finish import FigureSteps, PredictionSteps
from jaxensemble.running.padded import PaddedEnsemble
from jaxensemble.running.plan import Plan, check_plan, is_size
from jaxensemble.running.prepared import Prepared
from jaxensemble.running.runner import Arguments, Runner
from jaxensemble.source import print_source
from jaxensemble.uncertainty import Prediction
from jaxensemble.uncertainty.checks import check_options, warn_of_nan

Randomness = Literal["different", "same"]
Mode = Literal["eval", "train", "as_is"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "buffers", "constants", "rngs"],
    meta_fields=["graphdef", "network", "origin", "plan", "placement"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """M members: one network and a stack of weights.

    An ensemble is a pytree of its arrays, for `jax.jit`, `jax.tree.map` and `jax.device_put`. Optimizers take `params`
    alone: see [`with_params`][]. Nothing changes an ensemble; methods return new ones. It can be copied, and pickled
    for other processes; to keep it, [`save`][] it.

    - `graphdef`: the structure of the network; any `nnx.GraphDef` is accepted, and kept as a `Structure`. A structure
      in training mode gives a `TrainingModeWarning`: a Flax module is in training mode until its `eval()` is called.
      To train, call `train()` of the ensemble.
    - `params`, `buffers`, `rngs`: nested dicts of `[M, ...]` arrays, as `jaxensemble.modules.state.split` names them.
      Without `rngs`, random streams, such as those of dropout, begin with keys of their own. The `key` of a call
      replaces these keys.
    - `constants`: arrays that all members share.
    - `network`, `origin`: the ported network and the map of PyTorch's keys; anything hashable.
    - `plan`: the number of members and rows of one step, where a call has no plan; None for a guess: see [`tune`][].
    - `placement`: the mesh of devices over which the members lie, or None: see [`over`][].
    - `proof`: the comparison with PyTorch that these very arrays passed, or None. Pickles and `copy.copy` keep the
      proof. All other copies drop it, and so does putting another array into the dicts. See [`Proof`][].
    - `lineage`: the proof of the ensemble that this one was made from by training, slicing or any other method, or
      None. JAX's transformations and `dataclasses.replace` drop it.
    - `sources`: the checkpoint files that these very arrays were read from, or None; see [`Source`][].

    >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
    >>> ensemble
    Ensemble(5 x Linear, 8 parameters each, float32, 160 bytes)
    >>> ensemble(jnp.ones((64, 3))).shape, ensemble.each(jnp.ones((5, 64, 3))).shape
    ((5, 64, 2), (5, 64, 2))
    """

    graphdef: Structure
    params: Tree
    buffers: Tree
    constants: Tree = dataclasses.field(default_factory=dict)
    rngs: Tree = dataclasses.field(default_factory=dict)
    network: Any = None
    origin: Any = None
    plan: Plan | None = None
    placement: Placement | None = None
    # A proof and its arrays. `init=False`, so that `dataclasses.replace` drops it.
    _proven: tuple[Proof, list[Any]] | None = dataclasses.field(default=None, init=False)
    _lineage: Lineage | None = dataclasses.field(default=None, init=False)  # also no part of the pytree
    # The files of the members, and the arrays that were read from these files.
    _sources: tuple[tuple[Source, ...], list[Any]] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        by_hand = not isinstance(self.graphdef, Structure)  # and not from other ensembles or modules
        object.__setattr__(self, "graphdef", Structure.of(self.graphdef))
        if self.graphdef.streams and isinstance(self.rngs, dict) and not self.rngs:
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves((self.params, self.buffers))[:1]]
            members = shapes[0][0] if shapes and shapes[0] else 0  # `self.members` raises an error for 0
            object.__setattr__(self, "rngs", split_rngs(initial_rngs(self.graphdef), members))
        if by_hand:
            odd = [kind for kind in KINDS if not isinstance(getattr(self, kind), Mapping)]
            if odd:
                raise InputError(f"`{'`, `'.join(odd)}` must be nested dicts of arrays [M, ...]")
            check_names(self.state)
            warn_of_training_layers(
                self.graphdef,
                MODE_FLAGS,
                "is in training mode",
                "call `.eval()` of the module before its graph definition is taken, and ensemble.train() to train",
                stacklevel=4,
            )

    @classmethod
    def from_modules(
        cls, modules: Sequence[nnx.Module], *, mode: Mode | None = None, network: Any = None, origin: Any = None
    ) -> "Ensemble":
        """An ensemble of Flax modules, whose arrays are copied into the stack.

        **Arguments:**

        - `modules`: M modules that differ in the values of their arrays alone.
        - `mode`: the mode of the ensemble: `"eval"`, `"train"`, or `"as_is"` for the mode of the modules. None keeps
          the mode of the modules too, and warns with a `TrainingModeWarning` if layers are in training mode. A Flax
          module is in training mode until its `eval()` is called.

        **Raises:** `MemberError` for no modules, and with every difference if modules differ in more than values.

        >>> modules = [nnx.BatchNorm(3, rngs=nnx.Rngs(seed)) for seed in range(5)]
        >>> Ensemble.from_modules(modules, mode="eval")
        Ensemble(5 x BatchNorm, 6 parameters each, float32, 240 bytes)
        """
        if mode not in ("eval", "train", "as_is", None):
            raise InputError(f"`mode` must be 'eval', 'train' or 'as_is'; got {mode!r}")
        state = stack_states(modules, "Ensemble.from_modules")
        ensemble = cls(**state._asdict(), network=network, origin=origin)
        if mode == "eval" or mode == "train":
            return ensemble._set_mode(mode)
        if mode is None:
            advice = "mode='eval' is for evaluation, mode='as_is' says that this is meant"
            warn_of_training_layers(ensemble.graphdef, MODE_FLAGS, "is in training mode", advice, stacklevel=3)
        return ensemble

    @classmethod
    def concatenate(cls, ensembles: Sequence["Ensemble"]) -> "Ensemble":
        """The members of several ensembles, in order, as one ensemble.

        **Raises:** `MemberError` for no ensembles, and with every place where structures, constants or dtypes differ.

        >>> first, second = (Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed))]) for seed in (0, 1))
        >>> len(Ensemble.concatenate([first, second]))
        2
        """
        if not isinstance(ensembles, Sequence) or not all(isinstance(ensemble, Ensemble) for ensemble in ensembles):
            raise InputError(f"`ensembles` must be a sequence of ensembles; got {ensembles!r:.100}")
        if len(ensembles) == 0:
            raise MemberError("Ensemble.concatenate: Expected at least one ensemble, got 0.")
        first, *others = ensembles
        check_same_architecture([ensemble.state for ensemble in ensembles], "Ensemble.concatenate")
        for name in ("network", "origin"):
            if any(getattr(other, name) != getattr(first, name) for other in others):
                raise MemberError(f"Ensemble.concatenate: Expected ensembles with the same `{name}`; theirs differ")
        trees = [ensemble._stacked_trees() for ensemble in ensembles]
        meshes = {other.placement and other.placement.axes for other in ensembles}
        if len(meshes) > 1:
            raise MemberError(
                "Ensemble.concatenate: Expected ensembles over the same axes of one mesh, or none: bring them together "
                "with `over`"
            )
        plan = first.plan if all(other.plan == first.plan for other in others) else None
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
        lineage = first._descent(trained=False)
        alike = all(other._descent(trained=False) == lineage for other in others)
        result = dataclasses.replace(first, plan=plan)._with_members(joined).proven(None, lineage if alike else None)
        sources = [ensemble.sources or () for ensemble in ensembles]
        return result.read_from(tuple(itertools.chain(*sources)) if all(sources) else None)

    def with_params(self, params: Any) -> "Ensemble":
        """Returns the ensemble with other parameters, as an optimizer of optax gives them.

        Take gradients of `params` alone, and give `params` alone to optimizers. An ensemble also holds buffers and
        constants: they have no gradient, but weight decay, for example, would change them. For complex parameters,
        optimizers take `jnp.conj` of the gradient that `jax.grad` gives.

        **Raises:** `StateError` naming all parameters whose names or shapes differ.

        >>> import optax
        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
        >>> def loss(params):
        ...     return jnp.mean(ensemble.with_params(params)(jnp.ones((64, 3))) ** 2)
        >>> optimizer = optax.adamw(1e-3)
        >>> updates, _ = optimizer.update(
        ...     jax.grad(loss)(ensemble.params), optimizer.init(ensemble.params), ensemble.params
        ... )
        >>> after = ensemble.with_params(optax.apply_updates(ensemble.params, updates))
        >>> bool(loss(after.params) < loss(ensemble.params))
        True
        """
        if not isinstance(params, Mapping):
            raise InputError(
                f"`params` must be nested dicts of arrays, as `ensemble.params`; got {type(params).__name__}"
            )
        ours, theirs = (
            {name: jnp.shape(leaf) for name, leaf in flatten(tree).items()} for tree in (self.params, params)
        )
        wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if wrong:
            rows = (f"\n  {name}: expected {ours.get(name, 'none')}, got {theirs.get(name, 'none')}" for name in wrong)
            raise StateError(f"`params` must have the names and shapes of this ensemble's parameters:{''.join(rows)}")
        return self._replace_fields(params=params)

    def __call__(
        self,
        *inputs: Any,
        key: Any = None,
        randomness: Randomness = "different",
        plan: Plan | Literal["auto"] | None = None,
        **named: Any,
    ) -> Any:
        """The outputs of all members for the same inputs: every output array is `[M, ...]`.

        **Arguments:**

        - `inputs`, `named`: the inputs of the network, by position or, as in PyTorch, by name: arrays, or trees of
          arrays, of JAX, NumPy, PyTorch or any library with `__array__` or `__dlpack__`; never aliased. An argument
          that was no array when the network was ported (a flag, a number, None) is fixed, and may be left out.
        - `key`: a random key, for a network that draws random numbers.
        - `randomness`: `"different"` gives each member its own part of the key, `"same"` gives all members one key.
        - `plan`: how the members run, which changes the outputs by no more than rounding. A [`Plan`][jaxensemble.Plan];
          `"auto"` for the fastest plan, which is measured once for a network, shapes and device and then remembered
          (within `jax.jit` and other transformations, where nothing can be measured, only earlier measurements
          count); None for the ensemble's own `plan`, or one guessed from sizes.

        In training mode, statistics are those of the batch.

        **Raises:** `InputError` for inputs that are no arrays or would be rounded (64-bit numbers while JAX has them
        off), for a fixed argument with another value, and for a plan that splits rows which the network mixes;
        `StateError` if a key is needed and missing.
        """
        return self._run(inputs, named, key, plan, randomness=randomness)

    def each(
        self,
        *inputs: Any,
        key: Any = None,
        randomness: Randomness = "different",
        plan: Plan | Literal["auto"] | None = None,
        **named: Any,
    ) -> Any:
        """The outputs of every member for inputs of its own: input arrays are `[M, N, ...]`, outputs `[M, ...]`.

        All else is as in a call of the ensemble.

        **Raises:** `InputError` for inputs that do not begin with M, and the errors of a call.
        """
        return self._run(inputs, named, key, plan, randomness=randomness, each=True)

    def tune(self, *inputs: Any, key: Any = None, each: bool = False, **named: Any) -> "Ensemble":
        """Returns the ensemble with the plan that is fastest for these inputs: measured, or remembered.

        Measuring takes some calls and compilations for every plan worth a try. Measurements are kept for a network,
        shapes, dtypes, device and versions, also in the user's cache directory (`JAXENSEMBLE_CACHE` names another
        directory). The plan stays with the ensemble for all later calls, but is not saved. Where the network mixes
        rows, as in training mode, the plan counts without its `rows`.

        **Raises:** `InputError` within `jax.jit` and other transformations, where nothing can be measured.

        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
        >>> ensemble.tune(jnp.ones((64, 3))).plan is not None
        True
        """
        plan = self._runner.tune(Arguments.of(self.network, inputs, named, key, each=each))
        return dataclasses.replace(self, plan=plan).proven(self.proof, self.lineage).read_from(self.sources)

    def explain(self, *inputs: Any, key: Any = None, each: bool = False, **named: Any) -> str:
        """Explains which plan a call with these inputs gets, with the measurements or the estimate behind it."""
        return self._runner.explain(Arguments.of(self.network, inputs, named, key, each=each))

    def prepare(
        self,
        *inputs: Any,
        key: Any = None,
        randomness: Randomness = "different",
        each: bool = False,
        plan: Plan | Literal["auto"] | None = None,
        fold: bool = True,
        donate: bool = False,
        pad: bool = False,
        **named: Any,
    ) -> Prepared:
        """Compiles the program for inputs of such shapes and dtypes, and puts the weights into the form that it reads.

        A call of the ensemble does the same when it meets a shape for the first time. The prepared program takes less
        time around a call, and keeps its arrays, whatever becomes of the ensemble, unless they are donated.

        **Arguments:**

        - `inputs`, `named`, `key`, `randomness`, `plan`: as in a call. Only the shapes and dtypes of inputs count.
        - `each`: whether every member has inputs of its own, as in the method `each`.
        - `fold`: whether normalisation in evaluation mode, and other scales and shifts by weights, go into the
          convolution or product before them. That changes float32 and float64 by rounding alone, and no other dtype.
        - `donate`: whether the ensemble gives its arrays away: those that the program has in another form are deleted,
          and the ensemble cannot be called any more. Such a program can be neither differentiated nor checked.
        - `pad`: whether the program also runs fewer rows, by adding copies of the first one and cutting the outputs.
          The traced program has to keep rows apart, as for `Plan(rows=...)`.

        **Raises:** `InputError` within `jax.jit` and other transformations, for Python numbers, for arrays on several
        devices, and the errors of a call.
        """
        given = Arguments.of(self.network, inputs, named, key, randomness=randomness, each=each)
        kept = None if donate else jax.tree.map(lambda array: array, self)  # dicts of its own, with the same arrays
        return self._runner.prepare(given, check_plan(plan), fold=fold, ensemble=kept, pad=pad)

    def over(self, mesh: Any, members: str = "members", rows: str | None = None) -> "Ensemble":
        """Returns the ensemble with its members over the devices of a mesh.

        Every device has the weights of its members alone, and runs these: calls, predictions, prepared programs and
        training steps send no weights and no activations from one device to another. Outputs are arrays `[M, ...]`
        whose members are where they were computed. A plan counts per device.

        **Arguments:**

        - `mesh`: a mesh of `jax.make_mesh`, over devices of one process or of many; None brings all members back to
          the default device. In many processes, each calls `over` with the same ensemble, or reads its own members
          with [`load`][].
        - `members`: the axis of the mesh over which members are. Where M does not divide, copies of the last member
          fill the arrays of `params`, `buffers` and `rngs`, which take time and change nothing; `len(ensemble)` is M,
          outputs have M members, and every device gets them all.
        - `rows`: the axis over which the rows of minibatches are; by default, every device has all rows. Only for
          networks that keep rows apart, as most do in evaluation mode.

        **Raises:** `InputError` for anything but a mesh, and for axes that it does not have.

        >>> mesh = jax.make_mesh((1,), ("members",))
        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)]).over(mesh)
        >>> ensemble
        Ensemble(5 x Linear, 8 parameters each, float32, 160 bytes; over 1 device, 5 members on each)
        >>> ensemble(jnp.ones((64, 3))).shape
        (5, 64, 2)
        """
        trees = self._stacked_trees()
        if mesh is None:
            if self.placement is not None and not self.placement.is_local:
                raise InputError("the members are on several hosts, and no device has them all: save the ensemble")
            home = default_device()
            arrays = jax.device_put(trees | {"constants": self.constants}, home)
            moved = dataclasses.replace(self, placement=None, **arrays)
        else:
            placement = Placement.of(mesh, members, rows, self.members)
            constants = placement.put(self.constants, SHARED)
            moved = dataclasses.replace(self, placement=placement, constants=constants, **placement.place(trees))
        return moved.proven(None, self.lineage).proven(self.proof).read_from(self.sources)

    def padded(self, rows: int = 1) -> PaddedEnsemble:
        """Returns the ensemble as a function that runs any number of rows by a few compiled programs.

        A call of the ensemble compiles for each number of rows that it meets. This function adds copies of the first
        row up to the next power of two, or above 256 the next multiple of 256, and cuts the outputs. The traced program
        has to keep rows apart, as for `Plan(rows=...)`; the first call finds out. It takes what a call of the ensemble
        takes, and has the methods `each` and `predict`, too. No program is for fewer than `rows`: up to that number,
        there is one.

        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
        >>> ensemble.padded()(jnp.ones((7, 3))).shape
        (5, 7, 2)
        """
        if rows is None or not is_size(rows):
            raise InputError(f"`rows` must be a positive integer; got {rows!r}")
        run = functools.partial(self._run, least=rows)
        return PaddedEnsemble(run, functools.partial(self._predict_padded, run), self._output_axes, repr(self))

    def update(
        self,
        *inputs: Any,
        key: Any = None,
        randomness: Randomness = "different",
        each: bool = False,
        plan: Plan | Literal["auto"] | None = None,
        **named: Any,
    ) -> tuple[Any, "Ensemble"]:
        """The outputs, and the ensemble with its buffers as the call left them: BatchNorm's running statistics.

        With `each=True` every member gets inputs of its own, as in the method `each`.
        """
        options = {"randomness": randomness, "each": each, "update": True}
        outputs, buffers = self._run(inputs, named, key, plan, **options)
        return outputs, self._replace_fields(buffers=buffers)

    def predict(
        self,
        *inputs: Any,
        task: Any = "classification",
        key: Any = None,
        randomness: Randomness = "different",
        plan: Plan | Literal["auto"] | None = None,
        **options: Any,
    ) -> Any:
        """The joint prediction of the members: mean, votes, variance, entropies or quantiles, as attributes.

        **Arguments:**

        - `task`, `options`: as in [`Prediction.from_outputs`][jaxensemble.Prediction]: outputs are read as the logits
          of classes, unless `task` is `"regression"` or `"gaussian"`. Options that are inputs of the network are given
          to the network.
        - `inputs`, `key`, `randomness`, `plan`: as in a call.

        If the outputs have a field `logits`, as those of a Hugging Face classifier, the prediction reads this field.

        Warns with a `TrainingModeWarning` of layers in training mode; with a `key`, as for Monte-Carlo dropout, only
        of layers that use the statistics of the minibatch. Warns with a `NotANumberWarning` of members and rows that
        are NaN.

        **Raises:** `InputError` for unknown arguments, and the errors of a call.
        """
        return self._predict(inputs, options, self._run, task=task, key=key, randomness=randomness, plan=plan)

    def predict_batches(
        self,
        batches: Any,
        figures: str | Sequence[str] = "mean",
        *,
        rows: int | None = None,
        task: str = "classification",
        class_axis: int | None = None,
        key: Any = None,
        plan: Plan | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields figures of the joint prediction for every batch of a stream, in order, as NumPy arrays by name.

        One program runs all batches: a shorter one, such as the last, is filled up with copies of its first row, and
        its figures are cut. Two batches are on the device at a time, and the figures alone leave it, so that memory
        stays flat however many rows there are.

        **Arguments:**

        - `batches`: an iterable of batches, such as a `DataLoader`'s or grain's. A batch is an array, a tuple of the
          inputs of one call, or a dict of them by name. With `rows`, an array, or a tuple or dict of arrays, from which
          blocks of so many rows are taken: `numpy.load(file, mmap_mode="r")` reads no more than that.
        - `figures`: names of attributes of the prediction: `mean`, `soft_vote`, `predictive_entropy` ...
        - `task`, `class_axis`: as in [`predict`][].
        - `key`: a random key, for a network that draws. Each batch gets a key of its own, made from it and its number.
        - `plan`: as in a call; not `"auto"`.

        Warns with a `NotANumberWarning` for each batch with NaN.

        **Raises:** `InputError` for figures that the prediction does not have, and the errors of a call.

        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in range(5)])
        >>> x = np.ones((10, 3), "float32")
        >>> [figures["soft_vote"].shape for figures in ensemble.predict_batches(x, "soft_vote", rows=4)]
        [(4,), (4,), (2,)]
        """
        warn_of_training_layers(
            self.graphdef,
            MODE_FLAGS if key is None else (STATISTICS,),
            "predicts in training mode",
            "call it as ensemble.eval().predict_batches(...) if evaluation is meant",
            stacklevel=3,
        )
        options = {} if class_axis is None else {"class_axis": class_axis}
        check_options(task, options, ())
        names = check_figures(figures, task)
        if plan is not None and not isinstance(plan, Plan):
            raise InputError(f"`plan` must be a jaxensemble.Plan or None; got {plan!r}")
        if rows is not None and not (is_size(rows)):
            raise InputError(f"`rows` must be a positive integer; got {rows!r}")
        steps = PredictionSteps.of(task, options, self.network)
        if steps is None:
            raise InputError(f"`class_axis` must be an integer; got {class_axis!r}")
        finish, numbers = FigureSteps(steps, names), itertools.count()

        def run(inputs: tuple[Any, ...], named: Mapping[str, Any], least: int) -> tuple[Any, int]:
            own = None if key is None else jax.random.fold_in(key, next(numbers))
            given = Arguments.of(self.network, inputs, dict(named), own, finish=finish)
            return self._runner.run_batch(given, plan, least)

        return run_batches(run, batches if rows is None else split_rows(batches, rows))

    def _predict(
        self,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        run: Callable[..., Any],
        *,
        task: Any = "classification",
        key: Any = None,
        randomness: Randomness = "different",
        plan: Plan | Literal["auto"] | None = None,
    ) -> Any:
        """Returns the prediction of a call by `run`."""
        flags = MODE_FLAGS if key is None else (STATISTICS,)
        advice = "call it as ensemble.eval().predict(...) if evaluation is meant"
        warn_of_training_layers(self.graphdef, flags, "predicts in training mode", advice, stacklevel=4)
        names = self.network.arguments if isinstance(self.network, Network) else ()
        named = {name: options.pop(name) for name in names if name in options}
        check_options(task, options, ("key", "randomness", "plan"), list(filter(None, names)))
        finish = PredictionSteps.of(task, options, self.network)
        if finish is None:
            outputs = run(inputs, named, key, plan, randomness=randomness)
            return Prediction.from_outputs(getattr(outputs, "logits", outputs), task, **options)
        prediction, lost = run(inputs, named, key, plan, randomness=randomness, finish=finish)
        warn_of_nan(lost)
        return prediction

    def train(self) -> "Ensemble":
        """The ensemble in training mode, as `nnx.Module.train` sets it: batch statistics and dropout.

        **Raises:** `StateError` for a network that was ported for evaluation only.
        """
        return self._set_mode("train")

    def eval(self) -> "Ensemble":
        """The ensemble in evaluation mode, as `nnx.Module.eval` sets it: running statistics, no dropout."""
        return self._set_mode("eval")

    def astype(self, dtype: Any) -> "Ensemble":
        """Returns the ensemble with its floating-point and complex arrays cast, and all other arrays as they are.

        Complex numbers become complex128 for float64 and complex64 for all other dtypes: JAX has no complex numbers of
        half precision.

        **Raises:** `InputError` for dtypes that are not floating-point.

        >>> ensemble = Ensemble.from_modules([nnx.Linear(3, 2, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))])
        >>> ensemble.astype("bfloat16").params["kernel"].dtype
        dtype('complex64')
        """
        try:
            known = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 8
        except TypeError:
            known = False
        if not known:
            raise InputError(f"`dtype` must be a floating-point dtype; got {dtype!r}")
        require_x64(np.dtype(dtype), "`dtype`")
        state, network = cast_state(self.state, self.network, dtype)
        cast = dataclasses.replace(self, **state._asdict(), network=network)
        return cast.proven(None, self._descent(trained=False))

    def source(self) -> str:
        """The Flax code of the network.

        **Raises:** `StateError` for an ensemble that was not ported.
        """
        if self.network is None:
            raise StateError("there is no source: this ensemble was made from Flax modules, which have their own code")
        return print_source(self.network)

    def proven(self, proof: Proof | None, lineage: Lineage | None = None) -> "Ensemble":
        """Returns the same ensemble with a proof, which the caller vouches for, and with its own or another lineage.

        A trained ensemble can be proved again by PyTorch models with its weights, which `torch_bridge.to_torch`
        gives: `trained.proven(torch_bridge.check(models, trained, inputs).proof)`.
        """
        result = dataclasses.replace(self)
        if proof is not None:
            object.__setattr__(result, "_proven", (proof, jax.tree.leaves(result)))
        object.__setattr__(result, "_lineage", lineage or self._lineage)
        object.__setattr__(result, "_sources", self._sources if self.sources is not None else None)
        return result

    def trained_from(self, other: "Ensemble") -> "Ensemble":
        """Returns the same ensemble, without a proof, marked as trained from another ensemble."""
        return self.proven(None, other._descent(trained=True))

    @property
    def proof(self) -> Proof | None:
        """The comparison with PyTorch that these very arrays passed, or None."""
        return self._proven[0] if self._proven is not None and self._has_arrays(self._proven[1]) else None

    @property
    def lineage(self) -> Lineage | None:
        """The proof of the ensemble that this one was made from, and whether by training; or None."""
        return self._lineage

    def read_from(self, sources: tuple[Source, ...] | None) -> "Ensemble":
        """Returns the same ensemble with the files of its members, which the caller has read."""
        result = self.proven(self.proof)
        object.__setattr__(result, "_sources", (sources, jax.tree.leaves(result)) if sources else None)
        return result

    @property
    def sources(self) -> tuple[Source, ...] | None:
        """The checkpoint file of each member, and the part of it that was read. None for arrays from elsewhere."""
        return self._sources[0] if self._sources is not None and self._has_arrays(self._sources[1]) else None

    def _has_arrays(self, arrays: list[Any]) -> bool:
        """Returns whether the ensemble has these arrays. Arrays of JAX never change their values."""
        leaves = jax.tree.leaves(self)
        return len(leaves) == len(arrays) and all(map(operator.is_, leaves, arrays))

    def _descent(self, *, trained: bool) -> Lineage | None:
        """The lineage of an ensemble that is made from this one."""
        if self.proof is not None:
            return Lineage(self.proof, trained)
        return self._lineage and dataclasses.replace(self._lineage, trained=self._lineage.trained or trained)

    def _replace_fields(self, **fields: Any) -> "Ensemble":
        """Returns the ensemble with some fields changed: the proof becomes part of its lineage."""
        return dataclasses.replace(self, **fields).proven(None, self._descent(trained=False))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Saves an ensemble that was ported as a directory, which [`Ensemble.load`][] reads; PyTorch is not needed.

        The directory is written next to `path` and put in place in one step: whatever happens, `path` is either
        unchanged or the whole new artifact. With `force`, an artifact at `path` is replaced. A directory that holds
        any other file is not replaced, even if the file appears while the artifact is written. Where members are on
        several hosts, all have to call this, and the first one writes.

        The directory holds `weights.safetensors` (the stacked arrays by path), `network.json`, `source.py` (for
        people to read) and `manifest.json` (hashes, versions, the proof, PyTorch's keys).

        **Raises:** `StateError` for an ensemble of Flax modules that were not ported, `InputError` for a `path` that
        cannot be written to or must not be replaced, and `OSError` from the system.
        """
        write_artifact(self._to_saved(), path, force=force)

    @classmethod
    def load(cls, path: str | Path, mesh: Any = None, members: str = "members", rows: str | None = None) -> "Ensemble":
        """Reads the ensemble that [`Ensemble.save`][] saved, bit for bit, with mode, proof and map of PyTorch's keys.

        With a mesh, members go straight to their devices, as by [`over`][], whose arguments these are. In many
        processes each reads its own members alone, and compares them with their hashes.

        Nothing in the directory is run: the source is generated again from `network.json`, after it was checked. Every
        array is compared with its hash. While JAX has 64-bit types off, 64-bit integers become 32-bit integers. An
        artifact that was saved with 64-bit types on then has no proof, and gives a `NarrowIntegerWarning`.

        **Raises:** `InputError` with all that is wrong: no artifact, a damaged one, another version, arrays that do
        not fit the network, and float64 while JAX has it switched off.
        """
        artifact = Artifact.open(path)
        placement = None if mesh is None else Placement.of(mesh, members, rows, artifact.manifest.members)
        return cls.from_saved(artifact.read(placement), placement=placement)

    @classmethod
    def from_saved(cls, saved: Saved, plan: Plan | None = None, placement: Placement | None = None) -> "Ensemble":
        """The ensemble that an artifact or a pickle holds."""
        ensemble = cls(*saved.state, network=saved.network, origin=saved.origin, plan=plan, placement=placement)
        return ensemble.proven(saved.proof, saved.lineage).read_from(saved.sources)

    def _to_saved(self) -> Saved:
        state = self.state._replace(**self._stacked_trees())
        return Saved(state, self.network, self.origin, self.proof, self.lineage, self.sources)

    @functools.cached_property
    def members(self) -> int:
        """The number of members M.

        **Raises:** `InputError` if the arrays have different numbers of members, or there are no arrays.
        """
        if self.placement is not None:
            return self.placement.members
        return count_members({"params": self.params, "buffers": self.buffers})

    @property
    def state(self) -> State:
        """Graph definition and arrays, without `network` and `origin`."""
        return State(self.graphdef, self.params, self.buffers, self.constants, self.rngs)

    def __len__(self) -> int:
        return self.members

    def __iter__(self) -> Iterator[nnx.Module]:
        return (self[member] for member in range(self.members))

    def __getitem__(self, index: Any) -> Any:
        """One member as a Flax module, for an integer; an ensemble, for a slice or for integers or booleans in 1-D.

        **Raises:** `MemberIndexError` for members that do not exist, `InputError` for anything that is no index, and
        `MemberError` if no member is selected.
        """
        selected = member_positions(index, self.members)
        if isinstance(selected, int):
            return merge(self.graphdef, constants=self.constants, **take_members(self._stacked_trees(), selected))
        sources = self.sources
        chosen = sources and tuple(sources[member] for member in selected)
        part = self._with_members(take_members(self._stacked_trees(), selected))
        return part.proven(None, self._descent(trained=False)).read_from(chosen)

    def __repr__(self) -> str:
        name = self.graphdef.root.type.__name__
        params, leaves = jax.tree.leaves(self.params), jax.tree.leaves((self.params, self.buffers, self.constants))
        if not leaves or not all(isinstance(leaf, jax.Array | np.ndarray) and leaf.shape for leaf in leaves):
            return f"Ensemble({name})"  # within jax.tree transformations leaves may be anything
        members = leaves[0].shape[0] if self.placement is None else self.placement.members
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        count = sum(leaf.size // leaf.shape[0] for leaf in params)
        size = human_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
        fixed = self.network.fixed if isinstance(self.network, Network) else {}
        notes = f"; fixed: {', '.join(f'{place}={value!r}' for place, value in fixed.items())}" if fixed else ""
        training = self.graphdef.training_layers()
        notes += f"; in training mode: {shorten_list(training)}" if training else ""
        notes += "" if self.placement is None else f"; {self.placement}"
        return f"Ensemble({members} x {name}, {count:,} parameters each, {dtypes}, {size}{notes})"

    def __copy__(self) -> "Ensemble":
        return self.proven(self.proof)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ensemble":
        return jax.tree.map(lambda leaf: leaf.copy(), self).proven(None, self._descent(trained=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_ensemble(self._to_saved(), type(self).from_saved, self.plan)

    def _stacked_trees(self) -> dict[str, Tree]:
        """The arrays of all members, `[M, ...]`, also where copies fill the stack."""
        trees = {kind: getattr(self, kind) for kind in STACKED}
        return trees if self.placement is None else self.placement.cut(trees)

    def _with_members(self, trees: Mapping[str, Tree]) -> "Ensemble":
        """The ensemble with the arrays of other members, in their places on the same mesh."""
        if self.placement is None:
            return dataclasses.replace(self, **trees)
        members = jax.tree.leaves((trees["params"], trees["buffers"]))[0].shape[0]
        placement = dataclasses.replace(self.placement, members=members)
        return dataclasses.replace(self, placement=placement, **placement.place(trees))

    def _set_mode(self, mode: Literal["train", "eval"]) -> "Ensemble":
        reason = self.network.evaluation_only if isinstance(self.network, Network) else None
        if mode == "train" and reason is not None:
            raise StateError(f"the network was ported for evaluation only, because {reason}")
        return self._replace_fields(**set_mode(self.state, mode)._asdict()).read_from(self.sources)

    def _run(
        self,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        key: Any,
        plan: Plan | Literal["auto"] | None,
        *,
        least: int | None = None,
        **options: Any,
    ) -> Any:
        runner = self._runner
        run = runner.run if least is None else functools.partial(runner.run_padded, least=least)
        return run(Arguments.of(self.network, inputs, named, key, **options), check_plan(plan))

    def _output_axes(self, inputs: tuple[Any, ...], named: dict[str, Any], key: Any) -> Axes:
        return self._runner.output_axes(Arguments.of(self.network, inputs, named, key))

    def _predict_padded(self, run: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        chosen = {name: options.pop(name) for name in ("task", "key", "randomness", "plan") if name in options}
        return self._predict(inputs, options, run, **chosen)

    @functools.cached_property
    def _runner(self) -> Runner:
        return Runner(self.state, self.network, self.plan, self.placement)
