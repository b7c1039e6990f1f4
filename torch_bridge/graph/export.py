"""A module's forward as `torch.export` follows it, in one mode."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.export import ExportedProgram

from jaxensemble.errors import UnsupportedError
from jaxensemble.network.network import ReferenceTree, Sizes
from torch_bridge.compat import (
    fix_complex_means,
)
from torch_bridge.graph.caches.functions import isolate_function_caches
from torch_bridge.graph.caches.objects import restore_attributes
from torch_bridge.graph.errors import explain_error, fixed_size_error
from torch_bridge.graph.examples import Arguments, declare_parameters
from torch_bridge.graph.foreign_draws import watch_foreign_draws
from torch_bridge.graph.gradients.derivatives import Derivatives, write_out_derivatives
from torch_bridge.graph.gradients.regions import inline_regions
from torch_bridge.graph.modes.counters import mark_counters
from torch_bridge.graph.modes.reads import watch_mode_reads
from torch_bridge.graph.modes.switch import switch_mode
from torch_bridge.graph.operations import Operations
from torch_bridge.graph.outputs import flatten_outputs
from torch_bridge.graph.settings import fix_cumulative_averages, ignore_torch_warnings, silence_torch
from torch_bridge.graph.sizes.conditions import MOST
from torch_bridge.graph.sizes.decisions import Decisions, FixedSize, watch_decisions
from torch_bridge.graph.sizes.functions import DirectDistances, OpenSizes, keep_roots_open
from torch_bridge.graph.sizes.likeness import has_same_steps
from torch_bridge.graph.sizes.open_axes import BATCH, Example, Limits
from torch_bridge.graph.sizes.tables import limit_to_tables


def export(
    model: nn.Module, example: Example, operations: Operations, *, training: bool | None
) -> tuple[ExportedProgram, list[nn.Module]]:
    """Exports a forward in a mode, or with all modules as they are. Also returns the modules whose mode was read.

    Caches of functions are empty before and after it: the exporter's tensors have no values.
    """
    with isolate_function_caches():
        return _export_narrowing(model, example, operations, training=training)


RETURNED = "torch_bridge: the tree that the outputs stand in"
"""The key of the tree of outputs in an exported graph's `meta`."""


LIMITS = "torch_bridge: what open sizes may be"
"""The key of the limits of open sizes in an exported graph's `meta`."""


def _export_narrowing(
    model: nn.Module,
    example: Example,
    operations: Operations,
    *,
    training: bool | None,
    widest: Limits | None = None,
) -> tuple[ExportedProgram, list[nn.Module]]:
    """Exports within narrower limits until no decision depends on a size. `widest` are the limits at the beginning."""
    inputs, limits = example.inputs, example.limits
    widest = limits if widest is None else widest
    with (
        switch_mode([model], training),
        fix_cumulative_averages(model),
        ignore_torch_warnings(),
        restore_attributes(model),
        watch_decisions(model, example) as decided,
        watch_foreign_draws(model) as drawn,
    ):
        try:
            program, read, derived = _export_program(model, example, operations)
            narrower = decided.named_limits(example)
            if narrower != limits:
                return _export_narrowing(
                    model, example._replace(limits=narrower), operations, training=training, widest=widest
                )
        except FixedSize as fixed:
            raise fixed_size_error(model, fixed.name, fixed.place) from fixed
        except UnsupportedError:
            raise
        except Exception as error:  # from a user's forward or the exporter
            try:
                narrower = decided.limits(example)
            except FixedSize as fixed:
                raise explain_error(
                    error, model, inputs, operations.refusals, training=bool(training), fixed=(fixed.name, fixed.place)
                ) from error
            if narrower != limits:
                return _export_narrowing(
                    model, example._replace(limits=narrower), operations, training=training, widest=widest
                )
            raise explain_error(error, model, inputs, operations.refusals, training=bool(training)) from error
        if drawn:
            raise UnsupportedError(
                f"{type(model).__name__}.forward draws random numbers from {' and '.join(sorted(drawn))}: those of one "
                "call would be those of all. Draw them by PyTorch, such as torch.rand(()), or make them an input."
            )
        one = {BATCH: limits.get(BATCH, Sizes()).multiple}
        if decided.of_one and (derived or _is_right_for(model, program, example, one, decided) is False):
            raise UnsupportedError(
                f"{type(model).__name__}.forward takes another way for a batch of one ({decided.of_one[0]}), and a "
                "ported network takes the same way for all batch sizes. Write it without this decision, or pass "
                "batch_axis=None to port it for the size of the example."
            )
        program.graph_module.meta[LIMITS] = _correct_ends(model, program, example, widest, decided)
    inline_regions(program.graph_module)
    mark_counters(model, program)
    return program, read


def _correct_ends(
    model: nn.Module, program: ExportedProgram, example: Example, widest: Limits, decided: Decisions
) -> Limits:
    """Returns the limits of sizes, corrected at their ends: the program may be wrong at the least or right above."""
    found = {name: example.limits.get(name, Sizes()) for name in example.named}
    ends = {name: sizes.multiple for name, sizes in found.items() if sizes.least <= sizes.multiple}
    if ends and not _is_right_for(model, program, example, ends, decided):
        found |= {name: dataclasses.replace(found[name], least=2 * size) for name, size in ends.items()}
    further = {name: sizes.most + sizes.multiple for name, sizes in found.items() if sizes.most is not None}
    further = {name: size for name, size in further.items() if size in widest.get(name, Sizes()) and size < MOST}
    if further and _is_right_for(model, program, example, further, decided):  # for example, all rows of a table
        found |= {name: dataclasses.replace(found[name], most=size) for name, size in further.items()}
    return {**example.limits, **limit_to_tables(program, found, example.sizes, decided.value)}


def _export_program(
    model: nn.Module, example: Example, operations: Operations, derivatives: bool = False
) -> tuple[ExportedProgram, list[nn.Module], bool]:
    """Returns the exported program, the modules whose mode was read, and whether the forward takes derivatives.

    With `derivatives`, derivatives are written out as operations first.
    """
    taken = Derivatives()
    try:
        with _prepare_tracing(model, example.inputs) as returned, watch_mode_reads() as read:
            with write_out_derivatives(model, example, operations) if derivatives else taken:
                shapes = example.shapes().by_parameter(model)
                program = torch.export.export(model, *example.inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if derivatives or not taken.caused(error):
            raise
    else:
        if derivatives or not taken.is_part_of(program.graph):
            if not returned:  # the exporter calls no hooks of a torch.fx.GraphModule
                raise UnsupportedError(
                    f"{type(model).__name__} is a graph of torch.fx, whose outputs torch.export hides: hold it in a "
                    "module whose forward calls it, and port that module"
                )
            program.graph_module.meta[RETURNED] = returned[0]  # a forward that is written out returns tensors only
            return program, read, derivatives
    return _export_program(model, example, operations, derivatives=True)


@contextlib.contextmanager
def _prepare_tracing(model: nn.Module, inputs: Arguments) -> Iterator[list[ReferenceTree]]:
    """Prepares PyTorch and the model for the exporter. Yields a list of the trees of the model's outputs."""
    with (
        silence_torch(),
        torch.enable_grad(),
        fix_complex_means(),
        DirectDistances(),
        OpenSizes(),
        keep_roots_open(),
        declare_parameters(model, inputs.named),
        flatten_outputs(model) as returned,
    ):
        yield returned


def _is_right_for(
    model: nn.Module, program: ExportedProgram, example: Example, sizes: Mapping[str, int], decided: Decisions
) -> bool | None:
    """Returns whether the program is right for these sizes; None if the forward refuses them."""
    inputs = example.resized(sizes)
    try:
        with _prepare_tracing(model, inputs):
            of_one = torch.export.export(model, *inputs, strict=False)
            return has_same_steps(
                program, of_one, lambda expression: decided.value(expression, example.sizes | dict(sizes))
            )
    except Exception:  # from the forward, for example `assert x.shape[0] > 1`
        return None
