"""Outputs in float64, for the same minibatch, one per member, and other sizes."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import first_line
from jaxensemble.network.network import Sizes
from torch_bridge.arrays import to_numpy
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.outputs import constants_of
from torch_bridge.graph.sizes.open_axes import given_sizes, resize_open_axes
from torch_bridge.parity import precision, reference
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.findings import Findings, case_name
from torch_bridge.parity.inputs import batch_size, inputs_per_member, resize_inputs, stack_inputs
from torch_bridge.parity.metrics import normwise_error, stack_outputs
from torch_bridge.parity.perturbation import perturb_constants
from torch_bridge.parity.result import Row
from torch_bridge.parity.rounding import allowed_error, coarse_error
from torch_bridge.parity.subject import Subject

SILENT = 1e-6
"""The limit beyond which the error of an output is left to rounding."""

_FIRST = "float64, each its own"

Coarse = Callable[[str], float]
"""The distance of PyTorch's output at a place in float32 from the output in float64."""


@dataclasses.dataclass(frozen=True, eq=False)
class Float64Outputs:
    """The comparison of float64 outputs.

    - `exact`: the ensemble in float64.
    - `doubles`: copies of the models in float64.
    - `draws`: the random numbers that both sides draw.
    """

    subject: Subject
    findings: Findings
    draws: Draws
    exact: Ensemble
    doubles: list[nn.Module]

    def compare(self, inputs: Arguments) -> None:
        """Compares outputs for a minibatch per member and, if thorough, for a shared one and other batch sizes."""
        each = inputs_per_member(inputs, len(self.doubles), self.subject.batch_axis)
        self._compare(_FIRST, self.exact, self.doubles, each, vmap=self.subject.thorough)
        self._compare_sizes(inputs)
        if not self.subject.thorough:
            return
        self._compare("float64, same for all", self.exact, self.doubles, inputs, vmap=True)
        given = batch_size(inputs, self.subject.batch_axis)
        if given is not None:
            for size in sorted({1, 7, max(16, 2 * given)} - {given}):
                resized = resize_inputs(inputs, size, self.subject.batch_axis)
                try:
                    self._compare(f"float64, batch of {size}", self.exact, self.doubles, resized, vmap=False)
                except reference.CannotRun as error:  # for example GroupNorm of a single value
                    self.findings.notes.append(f"not compared for a batch of {size}: {first_line(error)}")

    def _compare_sizes(self, inputs: Arguments) -> None:
        """Compares outputs for other sizes of the axes that are open by name."""
        if not self.subject.opened.names:
            return
        given, limits = given_sizes(inputs, self.subject.opened.names), self.subject.opened.limits
        others = [{name: _other_size(size, limits[name], k + 1) for k, (name, size) in enumerate(given.items())}]
        if self.subject.thorough:
            others.append({name: limits[name].least for name in given})
        silent = set(self.findings.silent)
        for sizes in others:
            said = ", ".join(f"{name} {size}" for name, size in sizes.items())
            resized = resize_open_axes(inputs, self.subject.opened.names, sizes)
            try:
                self._compare(f"float64, {said}", self.exact, self.doubles, resized, vmap=False)
            except reference.CannotRun as error:
                self.findings.notes.append(f"not compared for {said}: {first_line(error)}")
        self.findings.silent = silent  # outputs of other sizes do not count: a standard deviation over one value is NaN

    def compare_perturbed(self, inputs: Arguments) -> None:
        """Compares outputs after constant weights were drawn at random. Notes outputs that prove little."""
        changed = perturb_constants(self.exact, self.doubles) if self.subject.origin is not None else None
        if changed is not None:
            self.findings.silent.clear()
            each = inputs_per_member(inputs, len(self.doubles), self.subject.batch_axis)
            self._compare("float64, constants perturbed", *changed, each, vmap=False)
        self.findings.notes += [
            f"{place} is zero, not finite or mostly rounding for these inputs: it proves little of the layers before it"
            for place in sorted(self.findings.silent | self.findings.rounding)
        ]

    def _compare(self, case: str, exact: Ensemble, doubles: list[nn.Module], inputs: Any, *, vmap: bool) -> None:
        """Compares the outputs of one call with PyTorch's loop and, with `vmap`, with `torch.func.vmap`."""
        # PyTorch goes first: it may refuse the batch.
        outputs = [] if self.draws else reference.run_loop(doubles, inputs)
        if isinstance(inputs, list):
            arguments = stack_inputs([self.subject.arrays(member) for member in inputs])
            actual = self.draws.outputs(exact.each(*arguments, **self.draws.options))
        else:
            actual = self.draws.outputs(exact(*self.subject.arrays(inputs), **self.draws.options))
        if self.draws:
            outputs = reference.run_loop(doubles, inputs)
        ours, theirs = self.subject.results(actual), stack_outputs(outputs)
        mine, others = constants_of(actual), [constants_of(output) for output in outputs]
        if any(other != mine for other in others):
            self.findings.rows.append(Row(case, "numbers and strings", np.inf, 0.0, f"{mine} for {others}"))

        @functools.cache
        def narrow() -> dict[str, np.ndarray]:
            models, given = precision.single_copies(doubles, inputs)
            with precision.single_precision():
                return stack_outputs(reference.run_loop(models, given))

        coarse = lambda place: coarse_error(narrow()[place], theirs[place])  # noqa: E731
        self._add_rows(case, "loop", ours, theirs, coarse)
        if vmap and not self.draws:
            self._compare_vmap(case, ours, doubles, inputs, coarse)

    def _compare_vmap(
        self, case: str, ours: dict[str, np.ndarray], doubles: list[nn.Module], inputs: Any, coarse: Coarse
    ) -> None:
        """Compares outputs with `torch.func.vmap`, or notes why it cannot run the models."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # about torch.func's own code
                theirs = {place: to_numpy(x) for place, x in reference.vmapped_call(doubles, inputs)().items()}
        except Exception as error:  # torch.func may fail in any way; the loop is compared all the same
            reason = first_line(error)
            note = f"not compared with torch.func.vmap, which cannot run this network: {reason}"
            if note not in self.findings.notes:
                self.findings.notes.append(note)
            return
        self._add_rows(case, "torch.func.vmap", ours, theirs, coarse)

    def _add_rows(
        self, case: str, what: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], coarse: Coarse
    ) -> None:
        """Adds a row for each output."""
        if list(ours) != list(theirs):
            remark = f"outputs {list(ours)} for {list(theirs)}"
            self.findings.rows.append(Row(case, what, np.inf, self.subject.limit, remark))
            return
        some = any(np.isfinite(expected).any() or not expected.size for expected in theirs.values())
        if theirs and not some and case == _FIRST:
            remark = "PyTorch's outputs have no finite number to compare"
            self.findings.rows.append(Row(case, what, np.inf, self.subject.limit, remark))
        for place, expected in theirs.items():
            if not (np.isfinite(expected) & (expected != 0)).any():
                self.findings.silent.add(place)
            error, member = normwise_error(ours[place], expected)
            limit, remark = allowed_error(error, self.subject.limit, lambda place=place: coarse(place))  # type: ignore[misc]
            if limit > SILENT:
                self.findings.silent.add(place)
                if case == ("float64, same for all" if self.subject.thorough else _FIRST):
                    self.findings.rounding.add(place)
            name = case_name(what, place, theirs)
            self.findings.rows.append(Row(case, name, error, limit, f"member {member}{remark}"))


def _other_size(size: int, limits: Sizes, steps: int) -> int:
    """Another size within limits, some steps larger or smaller."""
    found = [size + sign * k * limits.multiple for k in range(steps, 0, -1) for sign in (1, -1)]
    return next((other for other in found if other in limits), size)
