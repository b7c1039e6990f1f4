"""`nn.Module` to `TorchGraph`. The only file that knows `torch.export`.

A module is exported twice, in evaluation and in training mode. Where the two graphs agree in everything but the
training flags of dropout and normalisation, those become layers with a mode; where they do not, the network is for
evaluation only, and says why.
"""

import contextlib
import dataclasses
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from jaxensemble.errors import UnsupportedError, described, first_line
from jaxensemble.network.network import Fixed, Ref, Sizes, Tree
from torch_bridge.compat import (
    complex_means_mended,
    decomposition_table,
    decompositions_below_autograd,
    keeps_cumulative_average,
    lstm_states_mended,
    masks_not_looked_into,
    pytree,
    writes,
)
from torch_bridge.graph.caches.functions import tensors_forgotten
from torch_bridge.graph.caches.numbers import changes_of
from torch_bridge.graph.caches.objects import restored
from torch_bridge.graph.caches.tensors import check_calls_repeat, fresh
from torch_bridge.graph.distributions import validation_off
from torch_bridge.graph.errors import explained, fixed_size
from torch_bridge.graph.examples import Arguments, all_parameters_named
from torch_bridge.graph.foreign_draws import foreign_draws
from torch_bridge.graph.gradients.autograd_functions import check_own_gradients, own_functions
from torch_bridge.graph.gradients.below_autograd import DECOMPOSITIONS as BELOW_AUTOGRAD
from torch_bridge.graph.gradients.derivatives import Derivatives, written_out
from torch_bridge.graph.gradients.regions import inline_regions
from torch_bridge.graph.merged import Merged, merged
from torch_bridge.graph.modes import (
    Modes,
    add_dropout,
    aligned,
    check_owners,
    has_tensors,
    hides_its_mode,
    in_mode,
    mark_counters,
    reads_of_mode,
    uncounted,
)
from torch_bridge.graph.out_of_place import OWN_MEMORY, without_memory_formats
from torch_bridge.graph.outputs import filled, taken_apart
from torch_bridge.graph.sizes.decisions import MOST, Decisions, FixedSize, decisions
from torch_bridge.graph.sizes.functions import DirectDistances, OpenSizes, open_roots
from torch_bridge.graph.sizes.likeness import is_same
from torch_bridge.graph.sizes.open_axes import BATCH, Example, Limits, Opened
from torch_bridge.graph.sizes.tables import within_tables
from torch_bridge.graph.stand_ins import replace_moded, stand_in


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """A module's forward as a functional ATen graph.

    - `weights`: placeholder name to state key, parameters and buffers alike.
    - `constants`: placeholder name to tensor, for tensors that are no part of the module's state.
    - `inputs`: one tree for each argument, of references to placeholders by name and of what is fixed; `arguments`:
      their names, empty for those that are given by position alone. `outputs`: a tree of nodes and what is fixed.
    - `modules`: path to module, for every submodule.
    - `evaluation_only`: why there is no training mode, or None.
    - `open_axes`: placeholder name to the names of the open axes of that input; `sizes`: what those may be, but the
      batch's.
    - `uncounted`: the keys of counters of batches that the forward leaves as they are in training.
    - `updates`: the keys of buffers that the forward itself writes in training, and the values it leaves in them.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: tuple[Tree, ...]
    arguments: tuple[str, ...]
    outputs: Any
    weights: Mapping[str, str]
    constants: Mapping[str, Tensor]
    open_axes: Mapping[str, Mapping[int, str]]
    sizes: Limits
    evaluation_only: str | None = None
    updates: Mapping[str, fx.Node] = dataclasses.field(default_factory=dict)
    uncounted: frozenset[str] = frozenset()


def capture(
    model: nn.Module,
    example_inputs: Arguments | tuple[Any, ...],
    opened: Opened | None = None,
    evaluation_only: str | None = None,
) -> TorchGraph:
    """Exports the module's forward, with the batch dimension left open, and whatever else `opened` says.

    **Arguments:**

    - `example_inputs`: the arguments of one call, or a tuple of its positional ones.
    - `evaluation_only`: why training mode is left out, if it is.

    **Raises:** `UnsupportedError` where `torch.export` cannot follow the forward, with its reason.
    """
    arguments = Arguments.of(example_inputs)
    example = Example.of(arguments, opened or Opened())
    with (
        fresh([model], example.inputs),
        validation_off(),
        fast_paths_off(),
        masks_not_looked_into(),
        lstm_states_mended(),
    ):
        evaluation, reads = _repeatable(model, example, training=False)
        example = example._replace(limits=evaluation.graph_module.meta[LIMITS])
        asked = reads or any(map(hides_its_mode, model.modules()))  # else the program would be the same once more
        training = evaluation_only or (_training(model, evaluation, example) if asked else evaluation)
        if isinstance(training, ExportedProgram):
            example = example._replace(limits=training.graph_module.meta[LIMITS])
        left = uncounted(model, training) if isinstance(training, ExportedProgram) and asked else frozenset[str]()
        names, returned = arguments.names(model), evaluation.graph_module.meta[RETURNED]
        modes = training if isinstance(training, str) else aligned(evaluation, training)
        if isinstance(modes, str) and not isinstance(training, str) and without_memory_formats(evaluation, training):
            modes = aligned(evaluation, training)
        if isinstance(modes, Modes):
            if len({module.training for module in model.modules()}) > 1:
                as_it_is, _ = _export(model, example, training=None)
                check_owners(model, evaluation, as_it_is, modes)
            add_dropout(modes)
            graph = _to_graph(model, _functional(model, evaluation, modes), names, returned, example)
            return dataclasses.replace(graph, uncounted=left)
        if isinstance(training, str):
            evaluation, found = _functional(model, evaluation), training
        else:
            evaluation, found = _merged(model, evaluation, training, reads)
    graph = _to_graph(model, evaluation, names, returned, example)
    if isinstance(found, str):
        return dataclasses.replace(graph, evaluation_only=found)
    outputs = filled(returned, found.outputs)
    return dataclasses.replace(
        graph, graph=found.graph, outputs=outputs, constants=found.constants, updates=found.updates, uncounted=left
    )


def _repeatable(model: nn.Module, example: Example, *, training: bool) -> tuple[ExportedProgram, list[nn.Module]]:
    """As `_export`.

    **Raises:** `UnsupportedError` for a forward that leaves what its next call computes with, or has gradients of its
    own.
    """
    with in_mode([model], training):
        with changes_of(model) as changed, own_functions() as functions:
            program, reads = _export(model, example, training=training)
        check_own_gradients(model, example.inputs, functions)
        check_calls_repeat(model, example.inputs, training=training)
        if changed:
            with changed.made():
                again, _ = _export(model, example, training=training)
            if not _is_same(program, again):
                raise UnsupportedError(
                    f"{type(model).__name__}.forward changes what its next call computes with: {changed}. A network is "
                    "a function of its inputs and weights: keep such state out of the forward, or give it as an input."
                )
    return program, reads


def _training(model: nn.Module, evaluation: ExportedProgram, example: Example) -> ExportedProgram | str:
    """The program of training mode, or why there is none."""
    try:
        program, _ = _repeatable(model, example, training=True)
    except UnsupportedError as error:
        return first_line(error)
    if evaluation.graph_module.meta[RETURNED] != program.graph_module.meta[RETURNED]:
        return "its forward returns something else in training mode than in evaluation mode"
    return program


def _merged(
    model: nn.Module, evaluation: ExportedProgram, training: ExportedProgram, reads: Sequence[nn.Module]
) -> tuple[ExportedProgram, Merged | str]:
    """The program of evaluation without side effects, and both as one, taken apart alike, or why there is none."""
    for program in (evaluation, training):
        _put_stand_ins(program)
    whole = _is_whole(evaluation) and _is_whole(training)
    evaluation = evaluation if whole else _decomposed(model, evaluation)
    try:
        return evaluation, merged(model, evaluation, training if whole else _decomposed(model, training), reads)
    except UnsupportedError as error:
        return evaluation, first_line(error)


def _functional(model: nn.Module, program: ExportedProgram, modes: Modes | None = None) -> ExportedProgram:
    """The program with stand-ins for what has a mode, and without side effects."""
    _put_stand_ins(program, modes)
    return program if _is_whole(program) else _decomposed(model, program)


def _put_stand_ins(program: ExportedProgram, modes: Modes | None = None) -> None:
    replace_moded(program.graph, None if modes is None else modes.of)
    _write_out_of_place(program.graph_module)


def _is_whole(program: ExportedProgram) -> bool:
    """Whether nothing has to be taken apart, as in most networks: it would take longer than all else."""
    from torch_bridge.lowering.table import REFUSALS, RULES

    ruled = RULES | REFUSALS
    return _is_functional(program.graph) and all(str(node.target) in ruled for node in _computing(program.graph))


def _is_same(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Whether two exports of one forward compute the same."""
    constants = zip(a.constants.values(), b.constants.values(), strict=False)
    same = all(isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y) for x, y in constants)
    same = same and a.graph_module.meta[RETURNED] == b.graph_module.meta[RETURNED]
    return a.graph_module.code == b.graph_module.code and len(a.constants) == len(b.constants) and same


def _decomposed(model: nn.Module, program: ExportedProgram) -> ExportedProgram:
    """The graph without side effects. Operations that have no rule are taken apart, as far as torch knows how."""
    from torch_bridge.lowering.rules.losses import DECOMPOSITIONS  # whose rules build upon what is defined here
    from torch_bridge.lowering.table import REFUSALS, RULES

    ruled = RULES | REFUSALS
    table: dict[Any, Any] = {}
    whole: ExportedProgram | None = None
    known = torch.export.default_decompositions()
    known.update(DECOMPOSITIONS)
    while True:
        with _torch_warnings_off(), complex_means_mended():
            try:
                program = program.run_decompositions(dict(table))
            except Exception as error:  # as of a forward that sets a tensor's storage
                raise UnsupportedError(
                    f"torch.export cannot write {type(model).__name__}.forward without side effects: "
                    f"{described(error)}",
                    details=str(error),
                ) from error
        unruled = {node.target for node in _computing(program.graph) if str(node.target) not in ruled}
        new = unruled - set(table)
        more = {target: known[target] for target in new if target in known}
        if not more:  # by what PyTorch has for other compilers, if that leads anywhere
            if any(str(target).startswith("prims.") for target in unruled):
                return whole or program
            whole = whole or program
            more = {target: decomposition_table[target] for target in new if target in decomposition_table}
        if not more:
            return program
        table |= more


def _known() -> dict[Any, Any]:
    """How operations that have no rule are taken apart below autograd."""
    from torch_bridge.lowering.table import REFUSALS, RULES

    every = {**decompositions_below_autograd(), **BELOW_AUTOGRAD}
    return {target: way for target, way in every.items() if str(target) not in RULES | REFUSALS}


def _is_functional(graph: fx.Graph) -> bool:
    return not any(map(writes, graph.nodes))


def _computing(graph: fx.Graph) -> Iterator[fx.Node]:
    """The operations on tensors that depend on some input or weight; all others are folded."""
    depending = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not depending.isdisjoint(node.all_input_nodes):
            depending.add(node)
            if node.op == "call_function" and node.target is not operator.getitem and has_tensors(node):
                yield node


def _export(model: nn.Module, example: Example, *, training: bool | None) -> tuple[ExportedProgram, list[nn.Module]]:
    """The exported program of a mode, or of all modules as they are, and the modules whose mode was read.

    Cached functions compute their tensors anew for it, and forget those of the exporter, which have no values.
    """
    with tensors_forgotten():
        return _exported(model, example, training=training)


RETURNED = "torch_bridge: the tree that the outputs stand in"
"""Where an exported graph keeps it, in its `meta`."""


LIMITS = "torch_bridge: what open sizes may be"
"""Where an exported graph keeps it, in its `meta`."""


def _exported(
    model: nn.Module, example: Example, *, training: bool | None, widest: Limits | None = None
) -> tuple[ExportedProgram, list[nn.Module]]:
    """The same; `widest` are the limits of sizes before what was found of them."""
    inputs, limits = example.inputs, example.limits
    widest = limits if widest is None else widest
    with (
        in_mode([model], training),
        _cumulative_averages_fixed(model),
        _torch_warnings_off(),
        restored(model),
        decisions(model, example) as decided,
        foreign_draws(model) as drawn,
    ):
        try:
            program, read, derived = _program(model, example)
            narrower = decided.named_limits(example)
            if narrower != limits:
                return _exported(model, example._replace(limits=narrower), training=training, widest=widest)
        except FixedSize as fixed:
            raise fixed_size(model, fixed.name, fixed.place) from fixed
        except UnsupportedError:
            raise
        except Exception as error:  # whatever a user's forward or the exporter raises is told as one kind of error
            try:
                narrower = decided.limits(example)
            except FixedSize as fixed:
                raise explained(
                    error, model, inputs, training=bool(training), fixed=(fixed.name, fixed.place)
                ) from error
            if narrower != limits:
                return _exported(model, example._replace(limits=narrower), training=training, widest=widest)
            raise explained(error, model, inputs, training=bool(training)) from error
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
        program.graph_module.meta[LIMITS] = _with_ends(model, program, example, widest, decided)
    inline_regions(program.graph_module)
    mark_counters(model, program)
    return program, read


def _with_ends(
    model: nn.Module, program: ExportedProgram, example: Example, widest: Limits, decided: Decisions
) -> Limits:
    """The limits of sizes, where the program is right for the least ones, and for those that follow the most."""
    found = {name: example.limits.get(name, Sizes()) for name in example.named}
    ends = {name: sizes.multiple for name, sizes in found.items() if sizes.least <= sizes.multiple}
    if ends and not _is_right_for(model, program, example, ends, decided):
        found |= {name: dataclasses.replace(found[name], least=2 * size) for name, size in ends.items()}
    further = {name: sizes.most + sizes.multiple for name, sizes in found.items() if sizes.most is not None}
    further = {name: size for name, size in further.items() if size in widest.get(name, Sizes()) and size < MOST}
    if further and _is_right_for(model, program, example, further, decided):  # as of all that a table has
        found |= {name: dataclasses.replace(found[name], most=size) for name, size in further.items()}
    return {**example.limits, **within_tables(program, found, example.sizes, decided.value)}


def _program(
    model: nn.Module, example: Example, derivatives: bool = False
) -> tuple[ExportedProgram, list[nn.Module], bool]:
    """What the exporter makes of a forward, the modules whose mode was read, and whether it takes derivatives.

    With `derivatives`, these are written out as operations first.
    """
    taken = Derivatives()
    try:
        with _tracing(model, example.inputs) as returned, reads_of_mode() as read:
            with written_out(model, example, _known()) if derivatives else taken:
                shapes = example.shapes().by_parameter(model)
                program = torch.export.export(model, *example.inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if derivatives or not taken.stopped(error):
            raise
    else:
        if derivatives or not taken.left(program.graph):
            program.graph_module.meta[RETURNED] = returned[0]  # what is written out returns no more than tensors
            return program, read, derivatives
    return _program(model, example, derivatives=True)


@contextlib.contextmanager
def _tracing(model: nn.Module, inputs: Arguments) -> Iterator[list[Tree]]:
    """What the exporter needs around it. Gives the trees that the outputs of the model's calls stand in."""
    with (
        _torch_quiet(),
        torch.enable_grad(),
        complex_means_mended(),
        DirectDistances(),
        OpenSizes(),
        open_roots(),
        all_parameters_named(model, inputs.named),
        taken_apart(model) as returned,
    ):
        yield returned


def _is_right_for(
    model: nn.Module, program: ExportedProgram, example: Example, sizes: Mapping[str, int], decided: Decisions
) -> bool | None:
    """Whether these sizes are treated as others are; None where the forward refuses them."""
    inputs = example.resized(sizes)
    try:
        with _tracing(model, inputs):
            of_one = torch.export.export(model, *inputs, strict=False)
            return is_same(program, of_one, lambda expression: decided.value(expression, example.sizes | dict(sizes)))
    except Exception:  # which is the forward's own, as of `assert x.shape[0] > 1`
        return None


@contextlib.contextmanager
def _cumulative_averages_fixed(model: nn.Module) -> Iterator[None]:
    """BatchNorm with `momentum=None` reads a counter's value in training; the lowering takes it from the module."""
    modules: list[Any] = [module for module in model.modules() if keeps_cumulative_average(module)]
    try:
        for module in modules:
            module.momentum = 0.0
        yield
    finally:
        for module in modules:
            module.momentum = None


@contextlib.contextmanager
def fast_paths_off() -> Iterator[None]:
    """Attention's fused inference path is one opaque operation with another meaning of masks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _torch_quiet() -> Iterator[None]:
    """The exporter logs and prints graphs and tracebacks on its way to an error, which is told once it is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _torch_warnings_off() -> Iterator[None]:
    """Torch's exporter copies its own deprecated types, which warns the user of what is not theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_ATEN = torch.ops.aten

_OUT_OF_PLACE = {
    getattr(_ATEN, f"{name}_").default: getattr(_ATEN, name).default
    for name in ("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "leaky_relu", "elu", "sigmoid", "tanh", "mish")
} | {_ATEN.add_.Tensor: _ATEN.add.Tensor}
"""Frequent operations in place, and the same out of place."""


def _write_out_of_place(module: fx.GraphModule) -> None:
    """Writes `relu_(conv(x))` as `relu(conv(x))` where nobody can tell the difference.

    Torch's own functionalisation comes to the same, and would take most of the time of porting over it.
    """
    own_memory = OWN_MEMORY | {stand_in("batch_norm")}
    for node in module.graph.nodes:
        operand = node.args[0] if node.target in _OUT_OF_PLACE else None
        if (
            isinstance(operand, fx.Node)
            and operand.target in own_memory | set(_OUT_OF_PLACE.values())
            and list(operand.users) == [node]
            and all(_alike(other, node) for other in node.all_input_nodes)
        ):
            node.target = _OUT_OF_PLACE[node.target]
    module.recompile()


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two results have one shape and dtype, so that nothing is broadcast or promoted."""
    a, b = node.meta["val"], other.meta["val"]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.dtype == b.dtype and [str(size) for size in a.shape] == [str(size) for size in b.shape]


def _to_graph(
    model: nn.Module, program: ExportedProgram, names: tuple[str, ...], returned: Tree, example: Example
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
    given = [_input(spec.arg) for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
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
        outputs=filled(returned, user),
        weights={**signature.inputs_to_parameters, **signature.inputs_to_buffers},
        constants=constants,
        open_axes={
            ref.name: axes for ref, axes in zip(given, example.axes, strict=True) if isinstance(ref, Ref) and axes
        },
        sizes={name: example.limits[name] for name in sorted(example.named)},
    )


def _input(argument: Any) -> Tree:
    """A placeholder, or what is fixed in its place."""
    if not isinstance(argument, ConstantArgument):
        return Ref(argument.name)
    return None if argument.value is None else Fixed(argument.value)
