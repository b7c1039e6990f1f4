"""`check`: whether a ported ensemble gives what PyTorch gives, stage by stage."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.arrays import as_arrays
from jaxensemble.dtypes import NARROW
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError, first_line, shorten_list
from jaxensemble.modules.randomness import as_key
from jaxensemble.network.network import Sizes
from jaxensemble.network.sources import describe_sources
from jaxensemble.network.weight_map import INPUT_LAYOUTS, Origin
from jaxensemble.running.members import CannotCall
from torch_bridge.arrays import TORCH_DTYPES, to_numpy
from torch_bridge.compat import pytree
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.examples import Arguments, map_tensors
from torch_bridge.graph.modes.switch import switch_mode
from torch_bridge.graph.outputs import constants_of
from torch_bridge.graph.sizes.open_axes import OpenAxes, given_sizes, resize_open_axes
from torch_bridge.lowering.convert import convert
from torch_bridge.members.finite import has_fractions
from torch_bridge.members.same_network import as_members
from torch_bridge.members.stack import checked_ensemble, tensors_of_members
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity import gradients, precision, reference, steps, training
from torch_bridge.parity.divergence import first_divergence
from torch_bridge.parity.draws import Draws, can_draw
from torch_bridge.parity.float64 import convert_to_float64, recapture_network
from torch_bridge.parity.inputs import batch_size, ensemble_inputs, inputs_per_member, resize_inputs, stack_inputs
from torch_bridge.parity.metrics import (
    EXACT,
    EXACT_DEEP,
    WORKING,
    WORKING_FEW,
    arrays_by_place,
    normwise_error,
    stack_outputs,
    working_errors,
)
from torch_bridge.parity.perturbation import perturb_constants
from torch_bridge.parity.result import WEIGHTS, ParityReport, Row, compared_arrays
from torch_bridge.parity.rounding import allowed_error, coarse_error, move_last_bits
from torch_bridge.report import environment

SILENT = 1e-6
"""An output whose error may be larger than this is left to rounding."""

_FIRST = "float64, each its own"

Coarse = Callable[[str], float]
"""How far PyTorch's output at a place is in float32 from that in float64."""


def check(
    models: Sequence[nn.Module],
    ensemble: Ensemble,
    inputs: Arguments | tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    thorough: bool = True,
    train: bool = False,
    key: Any = None,
    input_layout: str | None = None,
    output_layout: str = "torch",
) -> ParityReport:
    """Compares a ported ensemble with the PyTorch modules it came from, or one that was written by hand.

    Stages, all in evaluation mode, with precision set alike on both sides:

    1. weights, bit for bit, by way of `to_torch`;
    2. outputs in float64, normwise, against a loop over the members and against `torch.func.vmap`, for the same
       minibatch and for one per member, for batch sizes of 1, an odd one and a large one, and for other sizes of axes
       that are open by name;
    3. outputs in the models' own precision: the error against the float64 truth, beside PyTorch's own error;
    4. gradients of every parameter in float64;
    5. outputs and buffers of a call in training mode in float64, where no random numbers are drawn;
    6. with `train=True`, losses, parameters and buffers of ten training steps in float64, by SGD, Adam, AdamW and
       RMSprop, against `torch.optim` in a loop over the members, and one step against `torch.func`'s vmapped `grad`.
       Networks that have no training mode, or whose draws cannot be had in it, are trained in evaluation mode for
       this. Where PyTorch itself cannot train, that is a failure.

    Weights that initialisation leaves constant, which hide errors, are drawn anew on both sides for one more comparison
    of float64 outputs.

    **Arguments:** `inputs` is the tuple of one call's positional arguments, `kwargs` holds those by name, as for
    `to_ensemble`. With `thorough=False` only the weights, float64 outputs for one minibatch per member, and working
    precision are compared. `key` is the random key that the ensemble draws by, where it draws: PyTorch is given the
    same numbers. Without, it is `jax.random.key(0)`.

    `input_layout` and `output_layout` are for an ensemble that was not ported: `"NHWC"` where its inputs, or its
    outputs, of at least three axes are channels-last, while `inputs` are always laid out as PyTorch takes them.

    **Returns:** a `ParityReport`; a failure is a row of it, not an exception.

    **Raises:** `InputError` where models, ensemble and inputs cannot be compared at all, as without rows; and for
    `train=True` with an ensemble that was not ported, or that has no batch axis.

    >>> import torch, torch_bridge
    >>> models = [torch.nn.Linear(3, 2) for _ in range(3)]
    >>> x = torch.randn(8, 3)
    >>> ensemble = torch_bridge.to_ensemble(models, (x,))
    >>> torch_bridge.check(models, ensemble, (x,)).passed
    True
    >>> torch_bridge.check(models[::-1], ensemble, (x,)).passed
    False
    """
    members = as_members(models)
    ensemble = checked_ensemble(ensemble)
    arguments = Arguments.of(inputs, kwargs, "inputs")
    if len(members) != len(ensemble):
        raise InputError(f"`models` and `ensemble` must have equal members; got {len(members)} and {len(ensemble)}")
    _check_rows(ensemble, arguments, train)
    with keep_caches_empty(members, arguments):
        key = as_key(jax.random.key(0) if key is None else key)
        layouts = _layouts(ensemble, input_layout, output_layout)
        try:
            return _Check(members, ensemble, arguments, thorough, train, key, layouts).report()
        except CannotCall as error:
            if ensemble.network is not None or layouts[0] != "torch":
                raise
            advice = "Of an ensemble that takes channels-last inputs, say so: input_layout='NHWC'."
            raise InputError(f"{first_line(error)}\n{advice}", details=error.details) from error


def _layouts(ensemble: Ensemble, inputs: str | None, outputs: str) -> tuple[str, str]:
    """How inputs and outputs are laid out. **Raises:** `InputError` for what is not the ensemble's own layout."""
    ported = ensemble.origin.input_layout if isinstance(ensemble.origin, Origin) else None
    inputs = (ported or "torch") if inputs is None else inputs
    if inputs not in INPUT_LAYOUTS or outputs not in INPUT_LAYOUTS:
        raise InputError(
            f"`input_layout` and `output_layout` must be one of {', '.join(map(repr, INPUT_LAYOUTS))}; got {inputs!r} "
            f"and {outputs!r}"
        )
    if ported and (inputs, outputs) != (ported, "torch"):
        raise InputError(f"the ensemble was ported with input_layout={ported!r}; got {inputs!r} and {outputs!r}")
    return inputs, outputs


def _check_rows(ensemble: Ensemble, inputs: Arguments, train: bool) -> None:
    """**Raises:** `InputError` for inputs without rows, and for `train` where training steps cannot be compared."""
    ported = isinstance(ensemble.origin, Origin)
    rows = batch_size(inputs, ensemble.origin.batch_axis if ported else 0)
    if rows == 0:
        raise InputError("`inputs` must have at least one row: of an empty minibatch nothing can be compared")
    if train and not ported:
        raise InputError(
            "`train=True` is for ensembles that were ported: of one that was written by hand it is not known which of "
            "its weights is which of PyTorch's. Leave `train` out, or port the models by torch_bridge.to_ensemble"
        )
    if train and rows is None:
        raise InputError(
            "`train=True` compares training by the mean of a loss over rows, and this ensemble was ported without a "
            "batch axis. Leave `train` out, or port the models with a `batch_axis`"
        )


class _Check:
    """One check: what is compared, and what was found so far."""

    def __init__(
        self,
        members: list[nn.Module],
        ensemble: Ensemble,
        inputs: Arguments,
        thorough: bool,
        train: bool,
        key: jax.Array,
        layouts: tuple[str, str],
    ) -> None:
        self.members, self.ensemble, self.inputs = members, ensemble.eval(), inputs
        self.thorough, self.train, self.key = thorough, train, key
        self.input_layout, self.output_layout = layouts
        self.origin = ensemble.origin if isinstance(ensemble.origin, Origin) else None
        self.opened = OpenAxes.again(ensemble) if self.origin else OpenAxes()
        self.batch_axis = self.opened.batch_axis
        layers = len(ensemble.network.layers) if ensemble.network is not None else 0
        self.exact = EXACT if layers <= 100 else EXACT_DEEP
        self.rows: list[Row] = []
        training = ensemble.graphdef.training_layers()
        self.notes = (
            [f"in training mode, and compared in evaluation mode: {shorten_list(training)}"] if training else []
        )
        self.notes += [f"weights of {line}" for line in describe_sources(ensemble.sources)]
        self.silent: set[str] = set()  # outputs that prove little
        self.rounding: set[str] = set()  # those that are little but rounding for the inputs themselves

    def report(self) -> ParityReport:
        diverged = None
        with precision.equal_precision():
            self._weights()
            diverged = self._outputs()
        compared = compared_arrays(self.ensemble)
        return ParityReport(tuple(self.rows), diverged, tuple(self.notes), environment(), _compared=compared)

    def _outputs(self) -> str | None:
        """Every stage that runs the networks, and the first module that differs."""
        doubles, inputs = precision.double_copies(self.members), precision.doubled(self.inputs)
        with jax.enable_x64(True), precision.double_precision():
            drawn = "evaluation" if self._draws_numbers() else None
            if drawn and self.origin is None:
                self.notes.append("outputs not compared: they are random, and the ensemble was not ported from PyTorch")
                return None
            try:
                exact = convert_to_float64(self.ensemble, doubles[0], inputs, drawn)
            except UnsupportedError as error:  # as of draws within a recurrent layer
                if drawn is None:
                    raise
                self.notes.append(f"outputs not compared: {first_line(error)}")
                self._not_trained(first_line(error))
                return None
            self.draws = Draws(doubles if drawn else (), self.key)
            self._float64(exact, doubles, inputs)
            self._perturbed(exact, doubles, inputs)
            if self.thorough:
                self._gradients(exact, doubles, inputs)
                self._training(exact, doubles, inputs)
            if self.train:
                self._steps(exact, doubles, inputs)
        if self.draws or (self.thorough and self.ensemble.rngs):
            self._network()
        self._working_precision(doubles, inputs)
        if all(row.passed for row in self.rows) or self.draws:
            return None
        with jax.enable_x64(True), precision.double_precision():
            return first_divergence(exact, doubles, inputs, self.arrays(inputs), self.exact)

    def _network(self) -> None:
        """Whether the models give the ensemble's own network, where what they draw is compared by one captured anew."""
        if self.origin is None:
            return
        member = copy.deepcopy(self.members[0]).eval()
        reason, layout = self.ensemble.network.evaluation_only, self.origin.input_layout
        captured = convert(member, self.inputs, self.opened, layout, evaluation_only=reason).network
        same = captured == dataclasses.replace(self.ensemble.network, training=captured.training)
        self.rows.append(Row("network", "captured anew", 0 if same else np.inf, 0))

    def _draws_numbers(self) -> bool:
        return can_draw(self.ensemble, self.arrays(self.inputs))

    def arrays(self, inputs: Any) -> tuple[Any, ...]:
        """Inputs as the ensemble takes them, by position."""
        return ensemble_inputs(inputs, self.input_layout)

    def results(self, outputs: Any) -> dict[str, np.ndarray]:
        """Outputs of the ensemble by place, laid out as PyTorch's."""
        found = arrays_by_place(outputs)
        if self.output_layout == "torch":
            return found
        return {place: np.moveaxis(array, -1, 2) if array.ndim >= 4 else array for place, array in found.items()}

    def _weights(self) -> None:
        if self.origin is None:
            self.notes.append("weights not compared: the ensemble was not ported from PyTorch")
            return
        wrong = 0
        example = ""
        for k, (member, ported) in enumerate(zip(self.members, tensors_of_members(self.ensemble), strict=True)):
            for key, tensor in tensors_of(member).items():
                if key not in ported or not _has_same_bits(tensor, ported[key]):
                    wrong, example = wrong + 1, example or f"member {k}, {key}"
        self.rows.append(Row(WEIGHTS, "bit for bit", wrong, 0, example))

    def _float64(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        each = inputs_per_member(inputs, len(doubles), self.batch_axis)
        self._compare(_FIRST, exact, doubles, each, vmap=self.thorough)
        self._sizes(exact, doubles, inputs)
        if not self.thorough:
            return
        self._compare("float64, same for all", exact, doubles, inputs, vmap=True)
        given = batch_size(inputs, self.batch_axis)
        if given is not None:
            for size in sorted({1, 7, max(16, 2 * given)} - {given}):
                resized = resize_inputs(inputs, size, self.batch_axis)
                try:
                    self._compare(f"float64, batch of {size}", exact, doubles, resized, vmap=False)
                except reference.CannotRun as error:  # as of GroupNorm of a single value
                    self.notes.append(f"not compared for a batch of {size}: {first_line(error)}")

    def _sizes(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        """Outputs for other sizes of the axes that were left open by name."""
        if not self.opened.names:
            return
        given, limits = given_sizes(inputs, self.opened.names), self.opened.limits
        others = [{name: _other_size(size, limits[name], k + 1) for k, (name, size) in enumerate(given.items())}]
        if self.thorough:
            others.append({name: limits[name].least for name in given})
        silent = set(self.silent)
        for sizes in others:
            said = ", ".join(f"{name} {size}" for name, size in sizes.items())
            resized = resize_open_axes(inputs, self.opened.names, sizes)
            try:
                self._compare(f"float64, {said}", exact, doubles, resized, vmap=False)
            except reference.CannotRun as error:
                self.notes.append(f"not compared for {said}: {first_line(error)}")
        self.silent = silent  # as of a standard deviation over a length of one, which is NaN

    def _perturbed(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        changed = perturb_constants(exact, doubles) if self.origin is not None else None
        if changed is not None:
            self.silent.clear()
            each = inputs_per_member(inputs, len(doubles), self.batch_axis)
            self._compare("float64, constants perturbed", *changed, each, vmap=False)
        self.notes += [
            f"{place} is zero, not finite or little but rounding for these inputs: little is proved of what leads to it"
            for place in sorted(self.silent | self.rounding)
        ]

    def _compare(self, case: str, exact: Ensemble, doubles: list[nn.Module], inputs: Any, *, vmap: bool) -> None:
        outputs = [] if self.draws else reference.run_loop(doubles, inputs)  # first: does PyTorch take such a batch?
        if isinstance(inputs, list):
            arguments = stack_inputs([self.arrays(member) for member in inputs])
            actual = self.draws.outputs(exact.each(*arguments, **self.draws.options))
        else:
            actual = self.draws.outputs(exact(*self.arrays(inputs), **self.draws.options))
        if self.draws:
            outputs = reference.run_loop(doubles, inputs)
        ours, theirs = self.results(actual), stack_outputs(outputs)
        mine, others = constants_of(actual), [constants_of(output) for output in outputs]
        if any(other != mine for other in others):
            self.rows.append(Row(case, "numbers and strings", np.inf, 0.0, f"{mine} for {others}"))

        @functools.cache
        def narrow() -> dict[str, np.ndarray]:
            models, given = precision.single_copies(doubles, inputs)
            with precision.single_precision():
                return stack_outputs(reference.run_loop(models, given))

        coarse = lambda place: coarse_error(narrow()[place], theirs[place])  # noqa: E731
        self._against(case, "loop", ours, theirs, coarse)
        if vmap and not self.draws:
            self._against_vmap(case, ours, doubles, inputs, coarse)

    def _against_vmap(
        self, case: str, ours: dict[str, np.ndarray], doubles: list[nn.Module], inputs: Any, coarse: Coarse
    ) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # torch.func's, of itself
                theirs = {place: to_numpy(x) for place, x in reference.vmapped_call(doubles, inputs)().items()}
        except Exception as error:  # whatever torch.func cannot map; the loop is compared all the same
            reason = first_line(error)
            note = f"not compared with torch.func.vmap, which cannot run this network: {reason}"
            if note not in self.notes:
                self.notes.append(note)
            return
        self._against(case, "torch.func.vmap", ours, theirs, coarse)

    def _against(
        self, case: str, what: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], coarse: Coarse
    ) -> None:
        if list(ours) != list(theirs):
            self.rows.append(Row(case, what, np.inf, self.exact, f"outputs {list(ours)} for {list(theirs)}"))
            return
        some = any(np.isfinite(expected).any() or not expected.size for expected in theirs.values())
        if theirs and not some and case == _FIRST:
            self.rows.append(Row(case, what, np.inf, self.exact, "PyTorch's outputs have no finite number to compare"))
        for place, expected in theirs.items():
            if not (np.isfinite(expected) & (expected != 0)).any():
                self.silent.add(place)
            error, member = normwise_error(ours[place], expected)
            limit, remark = allowed_error(error, self.exact, lambda place=place: coarse(place))  # type: ignore[misc]
            if limit > SILENT:
                self.silent.add(place)
                if case == ("float64, same for all" if self.thorough else _FIRST):
                    self.rounding.add(place)
            self.rows.append(Row(case, _case_name(what, place, theirs), error, limit, f"member {member}{remark}"))

    def _gradients(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        if self.origin is None:
            self.notes.append("gradients not compared: the ensemble was not ported from PyTorch")
            return
        found = gradients.compare(exact, doubles, inputs, self.arrays(inputs), self.draws)
        if isinstance(found, str):
            self.notes.append(found)
        else:
            self.rows += found

    def _training(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        if self.origin is None:
            return
        self.draws.forget()
        found = training.compare(exact, doubles, inputs, self.arrays(inputs), self.exact, self.key)
        if isinstance(found, str):
            self.notes.append(found)
        else:
            self.rows += found

    def _steps(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        each = inputs_per_member(inputs, len(doubles), self.batch_axis)
        tensors = stack_inputs([self.arrays(member) for member in each])
        arrays = map_tensors(lambda tensor: as_arrays(tensor, "inputs"), tensors)
        self.draws.forget()
        rows, notes = steps.compare(exact, doubles, each, arrays, self.draws)
        self.rows += rows
        self.notes += notes
        if not rows:
            self._not_trained(notes[-1])

    def _not_trained(self, reason: str) -> None:
        """What was asked for and could not be compared is no pass."""
        if self.train:
            self.rows.append(Row("float64, training steps", "torch.optim", np.inf, steps.LIMIT, reason))

    def _working_precision(self, doubles: list[nn.Module], inputs: Arguments) -> None:
        """Both errors against float64, from the very same weights and inputs."""
        members, ensemble = self.members, self.ensemble
        if self.draws:
            members = [copy.deepcopy(member).eval() for member in members]
            ensemble = recapture_network(ensemble, members[0], self.inputs, "evaluation")
            self.draws.alike(members)
        actual = ensemble(*self.arrays(self.inputs), **self.draws.options)
        ours = self.results(self.draws.outputs(actual))
        theirs = self._in_evaluation(members, self.inputs)
        with precision.double_precision():
            truth = stack_outputs(reference.run_loop(doubles, inputs))
        for place, exact in truth.items():
            dtype = theirs[place].dtype
            stage = f"{dtype}, same for all"
            if place not in ours or not _is_same_dtype(ours[place].dtype, dtype):
                self.rows.append(
                    Row(stage, _case_name("dtype", place, truth), np.inf, 0.0, str(ours.get(place, "missing")))
                )
                continue
            if exact.dtype.kind in "biu":
                wrong = float(np.mean(ours[place] != theirs[place])) if exact.size else 0.0
                self.rows.append(Row(stage, _case_name("PyTorch", place, truth), wrong, 0.0))
                continue
            if self._is_double() or place in self.rounding:
                continue  # the truth is this very precision, and was compared above; or there is none
            unit = float(
                torch.finfo(TORCH_DTYPES.get(dtype.name, torch.float32)).eps
            )  # in the last place, as of XLA's log1p
            few = exact.size < 1000 or dtype.itemsize < 4
            times = WORKING_FEW if few else WORKING
            error, own, size = working_errors(ours[place], theirs[place], exact)
            if times * own + unit * size < error < np.inf:
                own = max(own, self._own_errors[place])
            self.rows.append(Row(stage, _case_name("float64 truth", place, truth), error, times * own + unit * size))

    @functools.cached_property
    def _own_errors(self) -> dict[str, float]:
        """PyTorch's largest error in working precision, by place, for models and inputs moved by the last bit."""
        found: dict[str, float] = {}
        for members, inputs in move_last_bits(self.members, self.inputs):
            theirs = self._in_evaluation(members, inputs)
            with precision.double_precision():
                truth = stack_outputs(reference.run_loop(precision.double_copies(members), precision.doubled(inputs)))
            for place, exact in truth.items():
                found[place] = max(found.get(place, 0.0), working_errors(theirs[place], theirs[place], exact)[1])
        return found

    def _in_evaluation(self, members: list[nn.Module], inputs: Arguments) -> dict[str, np.ndarray]:
        """PyTorch's outputs in evaluation mode; every module gets its own mode back."""
        with switch_mode(members, training=False):
            return stack_outputs(reference.run_loop(members, inputs))

    def _is_double(self) -> bool:
        tensors = [*tensors_of(self.members[0]).values(), *pytree.tree_leaves(self.inputs)]
        fractions = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and has_fractions(tensor)}
        return bool(fractions) and fractions <= {torch.float64, torch.complex128}


def _other_size(size: int, limits: Sizes, steps: int) -> int:
    """Another size within limits, some steps further or back."""
    found = [size + sign * k * limits.multiple for k in range(steps, 0, -1) for sign in (1, -1)]
    return next((other for other in found if other in limits), size)


def _is_same_dtype(ours: np.dtype, theirs: np.dtype) -> bool:
    """Equal, but that JAX holds 64-bit integers in 32 bits while x64 is off."""
    return ours == theirs or ours.name == NARROW.get(theirs.name)


def _case_name(what: str, place: str, places: dict[str, Any]) -> str:
    return f"{what}, {place}" if len(places) > 1 else what


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().resolve_conj().resolve_neg().contiguous(), b.contiguous()
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))) if a.numel() else True
