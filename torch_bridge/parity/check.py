"""`check`: compares a ported ensemble with PyTorch, stage by stage."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.arrays import as_arrays
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, UnsupportedError, first_line, shorten_list
from jaxensemble.modules.randomness import as_key
from jaxensemble.network.sources import describe_sources
from jaxensemble.network.weight_map import INPUT_LAYOUTS, Origin
from jaxensemble.running.members import CannotCall
from jaxensemble.running.prepared import Prepared
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.examples import Arguments, map_tensors
from torch_bridge.lowering.convert import convert
from torch_bridge.members.same_network import list_members
from torch_bridge.members.stack import check_ensemble, tensors_of_members
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity import gradients, precision, steps, training
from torch_bridge.parity.divergence import first_divergence
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.findings import Findings
from torch_bridge.parity.float64 import convert_to_float64
from torch_bridge.parity.inputs import batch_size, inputs_per_member, stack_inputs
from torch_bridge.parity.outputs import Float64Outputs
from torch_bridge.parity.own_precision import compare_working_precision
from torch_bridge.parity.result import WEIGHTS, ParityReport, Row, compared_arrays
from torch_bridge.parity.subject import Subject
from torch_bridge.report import environment


def check(
    models: Sequence[nn.Module],
    ensemble: Ensemble | Prepared,
    inputs: Arguments | tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    thorough: bool = True,
    train: bool = False,
    key: Any = None,
    input_layout: str | None = None,
    output_layout: str = "torch",
) -> ParityReport:
    """Compares a ported ensemble with the PyTorch modules it came from, or an ensemble that was written by hand.

    All stages are in evaluation mode, with the same precision on both sides:

    1. weights, bit for bit, by way of `to_torch`;
    2. outputs in float64, normwise, against a loop over the members and against `torch.func.vmap`, for the same
       minibatch and for one per member, for batch sizes of 1, an odd one and a large one, and for other sizes of axes
       that are open by name;
    3. outputs in the models' own precision: the error against the float64 truth, compared with PyTorch's own error;
    4. gradients of every parameter in float64;
    5. outputs and buffers of a call in training mode in float64, where no random numbers are drawn;
    6. with `train=True`, losses, parameters and buffers of ten training steps in float64, by SGD, Adam, AdamW and
       RMSprop, against `torch.optim` in a loop over the members, and one step against `torch.func`'s vmapped `grad`.
       Networks without a training mode, or with draws that PyTorch cannot be given, are trained in evaluation mode
       here. Where PyTorch itself cannot train, the check fails.

    Of a program that `Ensemble.prepare` made for these inputs, stage 3 compares the outputs as well; all other stages
    are of its ensemble.

    Weights that initialisation leaves constant hide errors. They are drawn at random on both sides for one more
    comparison of float64 outputs.

    **Arguments:**

    - `inputs`, `kwargs`: the arguments of one call, as for `to_ensemble`: a tuple of the positional ones, and those by
      name.
    - `thorough`: with `False`, only weights, float64 outputs for one minibatch per member, and working precision are
      compared.
    - `train`: whether to compare training steps (stage 6).
    - `key`: the random key that the ensemble draws by, where it draws: PyTorch is given the same numbers. The default
      is `jax.random.key(0)`.
    - `input_layout`, `output_layout`: for an ensemble that was not ported, `"NHWC"` where its inputs, or its outputs,
      of at least three axes are channels-last. The argument `inputs` always has PyTorch's layout.

    **Returns:** a `ParityReport`. A failure is a row of the report, not an exception.

    **Raises:** `InputError` where models, ensemble and inputs cannot be compared at all, for example inputs without
    rows; for a program that was prepared for other inputs, or to draw; and for `train=True` with an ensemble that was
    not ported, or that has no batch axis. `StateError` for a program whose ensemble gave its arrays away.

    >>> import torch, torch_bridge
    >>> models = [torch.nn.Linear(3, 2) for _ in range(3)]
    >>> x = torch.randn(8, 3)
    >>> ensemble = torch_bridge.to_ensemble(models, (x,))
    >>> torch_bridge.check(models, ensemble, (x,)).passed
    True
    >>> torch_bridge.check(models[::-1], ensemble, (x,)).passed
    False
    """
    members = list_members(models)
    prepared = ensemble if isinstance(ensemble, Prepared) else None
    ensemble = check_ensemble(ensemble.ensemble if isinstance(ensemble, Prepared) else ensemble)
    arguments = Arguments.of(inputs, kwargs, "inputs")
    if len(members) != len(ensemble):
        raise InputError(f"`models` and `ensemble` must have equal members; got {len(members)} and {len(ensemble)}")
    _check_rows(ensemble, arguments, train)
    with keep_caches_empty(members, arguments):
        key = as_key(jax.random.key(0) if key is None else key)
        layouts = _layouts(ensemble, input_layout, output_layout)
        try:
            subject = Subject(members, ensemble.eval(), arguments, thorough, train, key, *layouts, prepared)
            if prepared is not None:
                prepared.check_arguments(*subject.arrays(arguments))
            return _Stages(subject, _initial_notes(ensemble)).report()
        except CannotCall as error:
            if ensemble.network is not None or layouts[0] != "torch":
                raise
            advice = "If the ensemble takes channels-last inputs, pass input_layout='NHWC'."
            raise InputError(f"{first_line(error)}\n{advice}", details=error.details) from error


def _layouts(ensemble: Ensemble, inputs: str | None, outputs: str) -> tuple[str, str]:
    """The layouts of inputs and outputs.

    **Raises:** `InputError` for layouts that are not the ensemble's own.
    """
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
    """Checks that the inputs have rows, and that training steps can be compared if `train` asks for them.

    **Raises:** `InputError` if not.
    """
    ported = isinstance(ensemble.origin, Origin)
    rows = batch_size(inputs, ensemble.origin.batch_axis if ported else 0)
    if rows == 0:
        raise InputError("`inputs` must have at least one row: an empty minibatch leaves nothing to compare")
    if train and not ported:
        raise InputError(
            "`train=True` is for ensembles that were ported: an ensemble that was written by hand has no known "
            "map from its weights to PyTorch's. Leave `train` out, or port the models by torch_bridge.to_ensemble"
        )
    if train and rows is None:
        raise InputError(
            "`train=True` compares training by the mean of a loss over rows, and this ensemble was ported without a "
            "batch axis. Leave `train` out, or port the models with a `batch_axis`"
        )


def _initial_notes(ensemble: Ensemble) -> list[str]:
    """Notes on layers in training mode and on the sources of weights."""
    training = ensemble.graphdef.training_layers()
    notes = [f"in training mode, and compared in evaluation mode: {shorten_list(training)}"] if training else []
    return notes + [f"weights of {line}" for line in describe_sources(ensemble.sources)]


class _Stages:
    """The stages of one check, and their findings so far."""

    def __init__(self, subject: Subject, notes: list[str]) -> None:
        self.subject, self.findings = subject, Findings(notes)

    def report(self) -> ParityReport:
        """Runs all stages."""
        diverged = None
        with precision.equal_precision():
            self._weights()
            diverged = self._outputs()
        compared = compared_arrays(self.subject.ensemble)
        rows, notes = tuple(self.findings.rows), tuple(self.findings.notes)
        return ParityReport(rows, diverged, notes, environment(), _compared=compared)

    def _outputs(self) -> str | None:
        """Runs the stages that call the networks. Returns the first module that differs."""
        doubles, inputs = precision.double_copies(self.subject.members), precision.doubled(self.subject.inputs)
        with jax.enable_x64(True), precision.double_precision():
            drawn = "evaluation" if self.subject.is_random() else None
            if drawn and self.subject.origin is None:
                self.findings.notes.append(
                    "outputs not compared: they are random, and the ensemble was not ported from PyTorch"
                )
                return None
            try:
                exact = convert_to_float64(self.subject.ensemble, doubles[0], inputs, drawn)
            except UnsupportedError as error:  # for example draws within a recurrent layer
                if drawn is None:
                    raise
                self.findings.notes.append(f"outputs not compared: {first_line(error)}")
                self._add_training_failure(first_line(error))
                return None
            self.draws = Draws(doubles if drawn else (), self.subject.key)
            outputs = Float64Outputs(self.subject, self.findings, self.draws, exact, doubles)
            outputs.compare(inputs)
            outputs.compare_perturbed(inputs)
            if self.subject.thorough:
                self._gradients(exact, doubles, inputs)
                self._training(exact, doubles, inputs)
            if self.subject.train:
                self._steps(exact, doubles, inputs)
        if self.draws or (self.subject.thorough and self.subject.ensemble.rngs):
            self._network()
        compare_working_precision(self.subject, self.findings, self.draws, doubles, inputs)
        if all(row.passed for row in self.findings.rows) or self.draws:
            return None
        with jax.enable_x64(True), precision.double_precision():
            return first_divergence(exact, doubles, inputs, self.subject.arrays(inputs), self.subject.limit)

    def _weights(self) -> None:
        if self.subject.origin is None:
            self.findings.notes.append("weights not compared: the ensemble was not ported from PyTorch")
            return
        wrong = 0
        example = ""
        for k, (member, ported) in enumerate(
            zip(self.subject.members, tensors_of_members(self.subject.ensemble), strict=True)
        ):
            for key, tensor in tensors_of(member).items():
                if key not in ported or not _has_same_bits(tensor, ported[key]):
                    wrong, example = wrong + 1, example or f"member {k}, {key}"
        self.findings.rows.append(Row(WEIGHTS, "bit for bit", wrong, 0, example))

    def _network(self) -> None:
        """Compares the ensemble's own network with the network that the models give.

        Where the models draw random numbers, outputs are compared by a network that was captured again.
        """
        if self.subject.origin is None:
            return
        member = copy.deepcopy(self.subject.members[0]).eval()
        reason, layout = self.subject.ensemble.network.evaluation_only, self.subject.origin.input_layout
        captured = convert(member, self.subject.inputs, self.subject.opened, layout, evaluation_only=reason).network
        same = captured == dataclasses.replace(self.subject.ensemble.network, training=captured.training)
        self.findings.rows.append(Row("network", "captured again", 0 if same else np.inf, 0))

    def _gradients(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        if self.subject.origin is None:
            self.findings.notes.append("gradients not compared: the ensemble was not ported from PyTorch")
            return
        self.findings.add(gradients.compare(exact, doubles, inputs, self.subject.arrays(inputs), self.draws))

    def _training(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        if self.subject.origin is None:
            return
        self.draws.forget()
        found = training.compare(
            exact, doubles, inputs, self.subject.arrays(inputs), self.subject.limit, self.subject.key
        )
        self.findings.add(found)

    def _steps(self, exact: Ensemble, doubles: list[nn.Module], inputs: Arguments) -> None:
        each = inputs_per_member(inputs, len(doubles), self.subject.batch_axis)
        tensors = stack_inputs([self.subject.arrays(member) for member in each])
        arrays = map_tensors(lambda tensor: as_arrays(tensor, "inputs"), tensors)
        self.draws.forget()
        rows, notes = steps.compare(exact, doubles, each, arrays, self.draws)
        self.findings.rows += rows
        self.findings.notes += notes
        if not rows:
            self._add_training_failure(notes[-1])

    def _add_training_failure(self, reason: str) -> None:
        """Adds a failure, if training was to be compared and could not be."""
        if self.subject.train:
            self.findings.rows.append(Row("float64, training steps", "torch.optim", np.inf, steps.LIMIT, reason))


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().resolve_conj().resolve_neg().contiguous(), b.contiguous()
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))) if a.numel() else True
