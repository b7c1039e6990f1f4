"""Outputs in the models' own precision: both errors against the float64 truth."""

import copy
import functools
import itertools

import numpy as np
import torch
from torch import Tensor, nn

from jaxensemble.dtypes import NARROW
from torch_bridge.arrays import TORCH_DTYPES
from torch_bridge.compat import pytree
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.modes.switch import switch_mode
from torch_bridge.members.finite import has_fractions
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity import precision, reference
from torch_bridge.parity.draws import Draws
from torch_bridge.parity.findings import Findings, case_name
from torch_bridge.parity.float64 import recapture_network
from torch_bridge.parity.metrics import WORKING, WORKING_FEW, stack_outputs, working_errors
from torch_bridge.parity.result import Row
from torch_bridge.parity.rounding import move_last_bits
from torch_bridge.parity.subject import Subject


def compare_working_precision(
    subject: Subject, findings: Findings, draws: Draws, doubles: list[nn.Module], inputs: Arguments
) -> None:
    """Adds rows with both errors against float64, for the same weights and inputs."""
    members, ensemble = subject.members, subject.ensemble
    if draws:
        members = [copy.deepcopy(member).eval() for member in members]
        ensemble = recapture_network(ensemble, members[0], subject.inputs, "evaluation")
        draws.attach(members)
    actual = ensemble(*subject.arrays(subject.inputs), **draws.options)
    found = {"same for all": subject.results(draws.outputs(actual))}
    if subject.prepared is not None:
        found["prepared"] = subject.results(subject.prepared(*subject.arrays(subject.inputs)))
    theirs = _run_in_evaluation(members, subject.inputs)
    with precision.double_precision():
        truth = stack_outputs(reference.run_loop(doubles, inputs))
    own_errors = functools.cache(lambda: _moved_errors(subject))
    for (way, ours), (place, exact) in itertools.product(found.items(), truth.items()):
        dtype = theirs[place].dtype
        stage = f"{dtype}, {way}"
        if place not in ours or not _is_same_dtype(ours[place].dtype, dtype):
            kind = str(ours.get(place, "missing"))
            findings.rows.append(Row(stage, case_name("dtype", place, truth), np.inf, 0.0, kind))
            continue
        if exact.dtype.kind in "biu":
            wrong = float(np.mean(ours[place] != theirs[place])) if exact.size else 0.0
            findings.rows.append(Row(stage, case_name("PyTorch", place, truth), wrong, 0.0))
            continue
        if _is_double(subject) or place in findings.rounding:
            continue  # the truth has the same precision and was compared already, or there is no truth
        # One unit in the last place: XLA's log1p, for example, is off by that much.
        unit = float(torch.finfo(TORCH_DTYPES.get(dtype.name, torch.float32)).eps)
        few = exact.size < 1000 or dtype.itemsize < 4
        times = WORKING_FEW if few else WORKING
        error, own, size = working_errors(ours[place], theirs[place], exact)
        if times * own + unit * size < error < np.inf:
            own = max(own, own_errors()[place])
        findings.rows.append(Row(stage, case_name("float64 truth", place, truth), error, times * own + unit * size))


def _moved_errors(subject: Subject) -> dict[str, float]:
    """PyTorch's largest error in working precision, by place, for models and inputs moved by the last bit."""
    found: dict[str, float] = {}
    for members, inputs in move_last_bits(subject.members, subject.inputs):
        theirs = _run_in_evaluation(members, inputs)
        with precision.double_precision():
            truth = stack_outputs(reference.run_loop(precision.double_copies(members), precision.doubled(inputs)))
        for place, exact in truth.items():
            found[place] = max(found.get(place, 0.0), working_errors(theirs[place], theirs[place], exact)[1])
    return found


def _run_in_evaluation(members: list[nn.Module], inputs: Arguments) -> dict[str, np.ndarray]:
    """PyTorch's outputs in evaluation mode. Afterwards every module has its own mode again."""
    with switch_mode(members, training=False):
        return stack_outputs(reference.run_loop(members, inputs))


def _is_double(subject: Subject) -> bool:
    """Returns whether the models and their inputs compute in float64 alone."""
    tensors = [*tensors_of(subject.members[0]).values(), *pytree.tree_leaves(subject.inputs)]
    fractions = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and has_fractions(tensor)}
    return bool(fractions) and fractions <= {torch.float64, torch.complex128}


def _is_same_dtype(ours: np.dtype, theirs: np.dtype) -> bool:
    """Returns whether dtypes are equal. While x64 is off, JAX holds 64-bit integers in 32 bits."""
    return ours == theirs or ours.name == NARROW.get(theirs.name)
