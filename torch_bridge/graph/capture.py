"""`nn.Module` to `TorchGraph`.

A module is exported twice, in evaluation and in training mode. If the two graphs differ only in the training flags of
dropout and normalisation, these operations become layers with a mode. Otherwise the two graphs are merged into one.
Where that is impossible, the network is for evaluation only, and says why.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from jaxensemble.errors import UnsupportedError, first_line
from jaxensemble.network.network import Fixed, Ref, ReferenceTree
from torch_bridge.compat import (
    fix_lstm_states,
    pytree,
    skip_mask_inspection,
)
from torch_bridge.graph.caches.numbers import record_changes
from torch_bridge.graph.caches.tensors import check_calls_repeat, keep_caches_empty
from torch_bridge.graph.decomposition import decompose, is_whole
from torch_bridge.graph.distributions import disable_validation
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.export import LIMITS, RETURNED, export
from torch_bridge.graph.gradients.autograd_functions import check_custom_gradients, watch_custom_functions
from torch_bridge.graph.graph import TorchGraph
from torch_bridge.graph.modes.agreement import Modes, add_dropout, align_programs
from torch_bridge.graph.modes.counters import find_unchanged_counters
from torch_bridge.graph.modes.merge import MergedGraph, merge_programs
from torch_bridge.graph.modes.owners import check_owners
from torch_bridge.graph.modes.reads import has_hidden_mode
from torch_bridge.graph.modes.switch import switch_mode
from torch_bridge.graph.operations import Operations
from torch_bridge.graph.out_of_place import remove_memory_formats, write_out_of_place
from torch_bridge.graph.outputs import fill_tree
from torch_bridge.graph.settings import disable_fast_paths
from torch_bridge.graph.sizes.open_axes import Example, OpenAxes
from torch_bridge.graph.stand_ins import insert_stand_ins


def capture(
    model: nn.Module,
    example_inputs: Arguments | tuple[Any, ...],
    operations: Operations,
    opened: OpenAxes | None = None,
    evaluation_only: str | None = None,
) -> TorchGraph:
    """Exports the module's forward. The batch dimension stays open, or the sizes that `opened` names.

    **Arguments:**

    - `example_inputs`: the arguments of one call, or a tuple of its positional ones.
    - `operations`: the operations that the graph may keep.
    - `evaluation_only`: the reason why training mode is left out, if it is.

    **Raises:** `UnsupportedError` if `torch.export` cannot follow the forward, with the reason.
    """
    arguments = Arguments.of(example_inputs)
    example = Example.of(arguments, opened or OpenAxes())
    with (
        keep_caches_empty([model], example.inputs),
        disable_validation(),
        disable_fast_paths(),
        skip_mask_inspection(),
        fix_lstm_states(),
    ):
        evaluation, reads = _export_checked(model, example, operations, training=False)
        example = example._replace(limits=evaluation.graph_module.meta[LIMITS])
        asked = reads or any(map(has_hidden_mode, model.modules()))  # otherwise training gives the same program
        training = evaluation_only or (
            _export_training(model, evaluation, example, operations) if asked else evaluation
        )
        if isinstance(training, ExportedProgram):
            example = example._replace(limits=training.graph_module.meta[LIMITS])
        left = (
            find_unchanged_counters(model, training)
            if isinstance(training, ExportedProgram) and asked
            else frozenset[str]()
        )
        names, returned = arguments.names(model), evaluation.graph_module.meta[RETURNED]
        modes = training if isinstance(training, str) else align_programs(evaluation, training)
        if isinstance(modes, str) and not isinstance(training, str) and remove_memory_formats(evaluation, training):
            modes = align_programs(evaluation, training)
        if isinstance(modes, Modes):
            if len({module.training for module in model.modules()}) > 1:
                as_it_is, _ = export(model, example, operations, training=None)
                check_owners(model, evaluation, as_it_is, modes)
            add_dropout(modes)
            graph = _to_graph(model, _make_functional(model, evaluation, operations, modes), names, returned, example)
            return dataclasses.replace(graph, unchanged_counters=left)
        if isinstance(training, str):
            evaluation, found = _make_functional(model, evaluation, operations), training
        else:
            evaluation, found = _merge(model, evaluation, training, reads, operations)
    graph = _to_graph(model, evaluation, names, returned, example)
    if isinstance(found, str):
        return dataclasses.replace(graph, evaluation_only=found)
    outputs = fill_tree(returned, found.outputs)
    return dataclasses.replace(
        graph,
        graph=found.graph,
        outputs=outputs,
        constants=found.constants,
        updates=found.updates,
        unchanged_counters=left,
    )


def _export_checked(
    model: nn.Module, example: Example, operations: Operations, *, training: bool
) -> tuple[ExportedProgram, list[nn.Module]]:
    """Exports a forward as `export` does, and checks that a second call would compute the same.

    **Raises:** `UnsupportedError` for a forward that changes what its next call computes with, or that has gradients
    of its own.
    """
    with switch_mode([model], training):
        with record_changes(model) as changed, watch_custom_functions() as functions:
            program, reads = export(model, example, operations, training=training)
        check_custom_gradients(model, example.inputs, functions)
        check_calls_repeat(model, example.inputs, training=training)
        if changed:
            with changed.made():
                again, _ = export(model, example, operations, training=training)
            if not _is_same(program, again):
                raise UnsupportedError(
                    f"{type(model).__name__}.forward changes what its next call computes with: {changed}. A network is "
                    "a function of its inputs and weights: keep such state out of the forward, or give it as an input."
                )
    return program, reads


def _export_training(
    model: nn.Module, evaluation: ExportedProgram, example: Example, operations: Operations
) -> ExportedProgram | str:
    """Returns the program of training mode, or why there is none."""
    try:
        program, _ = _export_checked(model, example, operations, training=True)
    except UnsupportedError as error:
        return first_line(error)
    if evaluation.graph_module.meta[RETURNED] != program.graph_module.meta[RETURNED]:
        return "its forward returns something else in training mode than in evaluation mode"
    return program


def _merge(
    model: nn.Module,
    evaluation: ExportedProgram,
    training: ExportedProgram,
    reads: Sequence[nn.Module],
    operations: Operations,
) -> tuple[ExportedProgram, MergedGraph | str]:
    """Returns the evaluation program without side effects, and the merged graph, or why there is none."""
    for program in (evaluation, training):
        _put_stand_ins(program)
    whole = is_whole(evaluation, operations) and is_whole(training, operations)
    evaluation = evaluation if whole else decompose(model, evaluation, operations)
    try:
        return evaluation, merge_programs(
            model, evaluation, training if whole else decompose(model, training, operations), reads
        )
    except UnsupportedError as error:
        return evaluation, first_line(error)


def _make_functional(
    model: nn.Module, program: ExportedProgram, operations: Operations, modes: Modes | None = None
) -> ExportedProgram:
    """Returns the program without side effects, with stand-ins for operations that have a mode."""
    _put_stand_ins(program, modes)
    return program if is_whole(program, operations) else decompose(model, program, operations)


def _put_stand_ins(program: ExportedProgram, modes: Modes | None = None) -> None:
    insert_stand_ins(program.graph, None if modes is None else modes.of)
    write_out_of_place(program.graph_module)


def _is_same(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Returns whether two exports of one forward compute the same."""
    constants = zip(a.constants.values(), b.constants.values(), strict=False)
    same = all(isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y) for x, y in constants)
    same = same and a.graph_module.meta[RETURNED] == b.graph_module.meta[RETURNED]
    return a.graph_module.code == b.graph_module.code and len(a.constants) == len(b.constants) and same


def _to_graph(
    model: nn.Module, program: ExportedProgram, names: tuple[str, ...], returned: ReferenceTree, example: Example
) -> TorchGraph:
    signature = program.graph_signature
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate, **signature.parameters_to_mutate}
    if mutated:
        raise UnsupportedError(
            f"{type(model).__name__}.forward writes into {', '.join(sorted(set(mutated.values())))} in evaluation "
            "mode; a ported network computes outputs only. Clone before the in-place operation."
        )
    constants: dict[str, Any] = {
        name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()
    }
    nodes = {node.name: node for node in program.graph.nodes}
    in_spec = program.call_spec.in_spec
    assert in_spec is not None  # torch.export always sets it
    given = [_input_tree(spec.arg) for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    inputs = Arguments(*pytree.tree_unflatten(given, in_spec))
    (results,) = nodes["output"].args
    user = [
        result for result, spec in zip(results, signature.output_specs, strict=True) if spec.kind.name == "USER_OUTPUT"
    ]
    return TorchGraph(
        model=model,
        graph=program.graph,
        inputs=inputs.entries,
        arguments=names if any(names) else (),
        outputs=fill_tree(returned, user),
        weights={**signature.inputs_to_parameters, **signature.inputs_to_buffers},
        constants=constants,
        open_axes={
            ref.name: axes for ref, axes in zip(given, example.axes, strict=True) if isinstance(ref, Ref) and axes
        },
        sizes={name: example.limits[name] for name in sorted(example.named)},
    )


def _input_tree(argument: Any) -> ReferenceTree:
    """Returns a reference to a placeholder, or the constant that is fixed instead of it."""
    if not isinstance(argument, ConstantArgument):
        return Ref(argument.name)
    return None if argument.value is None else Fixed(argument.value)
