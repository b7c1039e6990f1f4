"""`nn.Module` to `TorchGraph`. The only file that knows `torch.export`.

A module is exported twice, in evaluation and in training mode. Where the two graphs agree in everything but the
training flags of dropout and normalisation, those become layers with a mode; where they do not, the network is for
evaluation only, and says why.
"""

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_aggregate

from jaxensemble.errors import InputError, UnsupportedError

BatchAxis = int | None | tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class TorchGraph:
    """A module's forward as a functional ATen graph.

    - `weights`: placeholder name to state key, parameters and buffers alike.
    - `constants`: placeholder name to tensor, for tensors that are no part of the module's state.
    - `inputs`: placeholder names, one tree for each positional argument; `outputs`: a tree of nodes and constants.
    - `modules`: path to module, for every submodule.
    - `evaluation_only`: why there is no training mode, or None.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: tuple[Any, ...]
    outputs: Any
    weights: Mapping[str, str]
    constants: Mapping[str, Tensor]
    evaluation_only: str | None


MODED = {
    "batch_norm": (torch.ops.aten.batch_norm.default, 5),
    "instance_norm": (torch.ops.aten.instance_norm.default, 5),
    "dropout": (torch.ops.aten.dropout.default, 2),
    "feature_dropout": (torch.ops.aten.feature_dropout.default, 2),
    "alpha_dropout": (torch.ops.aten.alpha_dropout.default, 2),
    "feature_alpha_dropout": (torch.ops.aten.feature_alpha_dropout.default, 2),
    "rrelu": (torch.ops.aten.rrelu.default, 3),
}
"""Operations with a training flag: name to (operation, position of the flag)."""

_IN_PLACE = {
    torch.ops.aten.dropout_.default: "dropout",
    torch.ops.aten.feature_dropout_.default: "feature_dropout",
    torch.ops.aten.alpha_dropout_.default: "alpha_dropout",
    torch.ops.aten.feature_alpha_dropout_.default: "feature_alpha_dropout",
    torch.ops.aten.rrelu_.default: "rrelu",
}
_NAMES: dict[Any, str] = {op: name for name, (op, _) in MODED.items()} | _IN_PLACE

_SCHEMAS = {
    "batch_norm": "(Tensor x, Tensor? w, Tensor? b, Tensor? mean, Tensor? var, float momentum, float eps, str mode)",
    "instance_norm": "(Tensor x, Tensor? w, Tensor? b, Tensor? mean, Tensor? var, float momentum, float eps, str mode)",
    "dropout": "(Tensor x, float p, str mode)",
    "feature_dropout": "(Tensor x, float p, str mode)",
    "alpha_dropout": "(Tensor x, float p, str mode)",
    "feature_alpha_dropout": "(Tensor x, float p, str mode)",
    "rrelu": "(Tensor x, Scalar lower, Scalar upper, str mode)",
}


@functools.cache
def _library() -> torch.library.Library:
    """Opaque stand-ins for the operations of `MODED`, which torch's decompositions would take apart.

    Only shapes matter here, since the graph is never run by PyTorch.
    """
    library = torch.library.Library("torch_bridge", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(f"{name}{schema} -> Tensor")
        library.impl(name, lambda x, *args: torch.empty_like(x), "CompositeExplicitAutograd")
    return library


def stand_in(name: str) -> Any:
    """The opaque operation that stands for one of `MODED` in a captured graph."""
    _library()
    return getattr(torch.ops.torch_bridge, name).default


def capture(model: nn.Module, example_inputs: tuple[Any, ...], batch_axis: BatchAxis = 0) -> TorchGraph:
    """Exports the module's forward, with the batch dimension left open.

    **Arguments:**

    - `example_inputs`: the positional arguments of one call: tensors, or nested tuples, lists and dicts of them.
    - `batch_axis`: the axis along which inputs are batched; a tuple gives one for each argument; None fixes shapes.

    **Raises:** `UnsupportedError` where `torch.export` cannot follow the forward, with its reason.
    """
    inputs, dynamic = _examples(example_inputs, batch_axis)
    with _fast_paths_off():
        evaluation = _export(model, inputs, dynamic, training=False)
        modes = _modes(model, evaluation, inputs, dynamic)
    reason = modes if isinstance(modes, str) else None
    _replace_moded(evaluation.graph_module, None if isinstance(modes, str) else modes)
    _write_out_of_place(evaluation.graph_module)
    with _torch_warnings_off():
        try:
            program = evaluation.run_decompositions({})
        except Exception as error:  # as of a forward that sets a tensor's storage
            raise UnsupportedError(
                f"torch.export cannot write {type(model).__name__}.forward without side effects: {_first_lines(error)}"
            ) from error
    return _to_graph(model, program, reason)


def _modes(
    model: nn.Module, evaluation: ExportedProgram, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]
) -> dict[str, str] | str:
    """The mode of every operation that has one, or why the module cannot be carried in training mode."""
    try:
        training = _export(model, inputs, dynamic, training=True)
    except UnsupportedError as error:
        return str(error)
    return _aligned_modes(evaluation, training)


def _examples(example_inputs: tuple[Any, ...], batch_axis: BatchAxis) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs to export with, and which of their dimensions are dynamic.

    A batch of one is doubled: `torch.export` takes sizes 0 and 1 for constants.
    """
    if not isinstance(example_inputs, tuple) or not example_inputs:
        raise InputError(
            f"`example_inputs` must be a tuple with the positional arguments of one call; got "
            f"{type(example_inputs).__name__}. For a single tensor x, pass (x,)."
        )
    others = [
        f"{type(leaf).__name__} in input {k}"
        for k, value in enumerate(example_inputs)
        for leaf in pytree.tree_leaves(value)
        if not isinstance(leaf, Tensor)
    ]
    if others:
        raise InputError(
            f"`example_inputs` must hold tensors only, since anything else would be fixed in the ported network; got "
            f"{', '.join(others)}. Leave it out where it has a default, or fix it in a module around this one."
        )
    axes = batch_axis if isinstance(batch_axis, tuple) else (batch_axis,) * len(example_inputs)
    if len(axes) != len(example_inputs):
        raise InputError(
            f"`batch_axis` must hold one axis for each of the {len(example_inputs)} example inputs; got {len(axes)}."
        )
    size = _batch_size(example_inputs, axes, explicit=isinstance(batch_axis, tuple))
    batch = Dim("batch")
    pairs = [
        pytree.tree_map(lambda leaf, axis=axis: _example(leaf, axis, size, batch), value)
        for value, axis in zip(example_inputs, axes, strict=True)
    ]
    is_pair = lambda node: isinstance(node, _Example)  # noqa: E731
    return (
        tuple(pytree.tree_map(lambda pair: pair.value, pair, is_leaf=is_pair) for pair in pairs),
        tuple(pytree.tree_map(lambda pair: pair.dynamic, pair, is_leaf=is_pair) for pair in pairs),
    )


@dataclasses.dataclass(frozen=True)
class _Example:
    value: Any
    dynamic: Any


def _example(leaf: Tensor, axis: int | None, size: int | None, batch: Any) -> _Example:
    leaf = leaf.detach()
    if axis is None or leaf.ndim <= axis or leaf.shape[axis] != size:
        return _Example(leaf, {})
    if size == 1:
        leaf = torch.cat([leaf, leaf], axis)
    return _Example(leaf, {axis: batch})


def _batch_size(inputs: tuple[Any, ...], axes: tuple[int | None, ...], *, explicit: bool) -> int | None:
    """The one batch size of the inputs: the first tensor's; other inputs of another size have no batch."""
    sizes = [
        (index, leaf.shape[axis])
        for index, (value, axis) in enumerate(zip(inputs, axes, strict=True))
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and axis is not None and leaf.ndim > axis
    ]
    if explicit and len({size for _, size in sizes}) > 1:
        listing = ", ".join(f"input {index}: {size}" for index, size in sizes)
        raise InputError(f"the batch sizes along `batch_axis` must be equal; got {listing}.")
    return sizes[0][1] if sizes else None


def _export(model: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...], *, training: bool) -> ExportedProgram:
    with _mode(model, training), _cumulative_averages_fixed(model), _torch_warnings_off():
        try:
            return torch.export.export(model, inputs, dynamic_shapes=_by_parameter(model, dynamic), strict=False)
        except Exception as error:  # whatever a user's forward or the exporter raises is told as one kind of error
            raise UnsupportedError(
                f"torch.export cannot follow {type(model).__name__}.forward in {_MODE_NAMES[training]} mode: "
                f"{_first_lines(error)}\nWrite the forward without control flow that depends on values, or, if the "
                "batch size is what cannot be left open, pass batch_axis=None to fix all shapes."
            ) from error


def _by_parameter(model: nn.Module, dynamic: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry for each parameter of the forward: those that `*args` takes are one tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    starred = next((k for k, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), None)
    return dynamic if starred is None else (*dynamic[:starred], tuple(dynamic[starred:]))


_MODE_NAMES = {True: "training", False: "evaluation"}


def _first_lines(error: Exception, lines: int = 12) -> str:
    text = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return "\n".join(text[:lines])


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode for a while; each gets its own back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)  # a module may have a `train` of its own, which keeps a part of it in evaluation mode
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def _cumulative_averages_fixed(model: nn.Module) -> Iterator[None]:
    """BatchNorm with `momentum=None` reads a counter's value in training; the lowering takes it from the module."""
    modules = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    try:
        for module in modules:
            module.momentum = 0.0
        yield
    finally:
        for module in modules:
            module.momentum = None


@contextlib.contextmanager
def _fast_paths_off() -> Iterator[None]:
    """Attention's fused inference path is one opaque operation with another meaning of masks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _torch_warnings_off() -> Iterator[None]:
    """Torch's exporter copies its own deprecated types, which warns the user of what is not theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _aligned_modes(evaluation: ExportedProgram, training: ExportedProgram) -> dict[str, str] | str:
    """Node name to mode for every operation with a training flag, or the first difference between the graphs.

    A mode is `by_mode` (training only in training), `always`, or `never`.
    """
    ours, theirs = ([node for node in p.graph.nodes if _matters(node)] for p in (evaluation, training))
    renamed: dict[fx.Node, fx.Node] = {}
    modes: dict[str, str] = {}
    for node, twin in zip(ours, theirs, strict=False):
        renamed[twin] = node
        flag, twin_flag = _flag(node), _flag(twin)
        if node.op == "placeholder" and twin.op == "placeholder":
            if not _same_source(node, evaluation, twin, training):
                return "its forward uses other tensors in training mode than in evaluation mode"
            continue
        if node.target != twin.target or _arguments(node, {}) != _arguments(twin, renamed):
            return _difference(node, twin)
        if flag is not None:
            modes[node.name] = {(False, True): "by_mode", (True, True): "always"}.get((flag, bool(twin_flag)), "never")
    if len(ours) != len(theirs) or evaluation.call_spec.out_spec != training.call_spec.out_spec:
        return "its forward does something else in training mode than in evaluation mode"
    return modes


def _same_source(node: fx.Node, evaluation: ExportedProgram, twin: fx.Node, training: ExportedProgram) -> bool:
    """Whether two placeholders stand for the same input, weight or constant."""
    (ours, a), (theirs, b) = (
        (next(spec for spec in program.graph_signature.input_specs if spec.arg.name == held.name), program.constants)
        for held, program in ((node, evaluation), (twin, training))
    )
    if ours.kind != theirs.kind:
        return False
    if ours.kind.name != "CONSTANT_TENSOR":
        return ours.target == theirs.target
    first, second = a[str(ours.target)], b[str(theirs.target)]
    return isinstance(first, Tensor) and isinstance(second, Tensor) and _equal(first, second)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def _difference(node: fx.Node, twin: fx.Node) -> str:
    where = source_line(twin) or source_line(node)
    return (
        f"its forward does something else in training mode ({twin.target}) than in evaluation mode ({node.target})"
        + (f", at {where}" if where else "")
    )


def _matters(node: fx.Node) -> bool:
    """Whether a node makes arrays; sizes are compared where they are used."""
    return not (_is_size(node) or _counts_batches(node))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _counts_batches(node: fx.Node) -> bool:
    """`num_batches_tracked += 1`, which a BatchNorm layer does itself, at each of its calls."""
    counter = node.args[0] if node.args else None
    if node.target != torch.ops.aten.add_.Tensor or not isinstance(counter, fx.Node):
        return False
    return _counts_batches(counter) or (counter.op == "placeholder" and counter.name.endswith("num_batches_tracked"))


def _flag(node: fx.Node) -> bool | None:
    name = _NAMES.get(node.target)
    return None if name is None else bool(_all_args(node)[MODED[name][1]])


def _all_args(node: fx.Node) -> list[Any]:
    """A node's arguments in the order of its schema, with defaults for those that are left out."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(argument.name, argument.default_value) for argument in schema]


def _arguments(node: fx.Node, renamed: Mapping[fx.Node, fx.Node]) -> Any:
    """A node's arguments for comparison, the training flag left out."""
    name = _NAMES.get(node.target)
    args = list(node.args) if name is None else _all_args(node)
    if name is not None:
        args[MODED[name][1]] = None
    return map_aggregate((args, dict(node.kwargs) if name is None else {}), lambda leaf: _comparable(leaf, renamed))


def _comparable(leaf: Any, renamed: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(leaf, fx.Node):
        return str(leaf.meta["val"]) if _is_size(leaf) else renamed.get(leaf, leaf)
    return repr(leaf) if isinstance(leaf, float) else leaf  # so that NaN equals itself


def _replace_moded(module: fx.GraphModule, modes: Mapping[str, str] | None) -> None:
    for node in list(module.graph.nodes):
        name = _NAMES.get(node.target)
        if name is None:
            continue
        position = MODED[name][1]
        given = _all_args(node)
        mode = modes[node.name] if modes is not None else "always" if given[position] else "never"
        args = [arg for k, arg in enumerate(given) if k != position][: len(_SCHEMAS[name].split(",")) - 1]
        with module.graph.inserting_before(node):
            new = module.graph.call_function(stand_in(name), (*args, mode))
            new.meta = dict(node.meta)
            if node.target in _IN_PLACE:
                new = module.graph.call_function(torch.ops.aten.copy_.default, (node.args[0], new))
                new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.recompile()


_ATEN = torch.ops.aten
_OWN_MEMORY = {
    *(getattr(getattr(_ATEN, f"conv{n}d"), overload) for n in (1, 2, 3) for overload in ("default", "padding")),
    _ATEN.linear.default,
    _ATEN.add.Tensor,
    _ATEN.mul.Tensor,
    _ATEN.cat.default,
}
"""Operations whose result is memory that nothing else refers to."""

_OUT_OF_PLACE = {
    getattr(_ATEN, f"{name}_").default: getattr(_ATEN, name).default
    for name in ("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "leaky_relu", "elu", "sigmoid", "tanh", "mish")
} | {_ATEN.add_.Tensor: _ATEN.add.Tensor}
"""Frequent operations in place, and the same out of place."""


def _write_out_of_place(module: fx.GraphModule) -> None:
    """Writes `relu_(conv(x))` as `relu(conv(x))` where nobody can tell the difference.

    Torch's own functionalisation comes to the same, and would take most of the time of porting over it.
    """
    own_memory = _OWN_MEMORY | {stand_in("batch_norm")}
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


def _to_graph(model: nn.Module, program: ExportedProgram, reason: str | None) -> TorchGraph:
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
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None and out_spec is not None  # torch.export always sets them
    names = [
        spec.arg.name if hasattr(spec.arg, "name") else None
        for spec in signature.input_specs
        if spec.kind.name == "USER_INPUT"
    ]
    args, _ = pytree.tree_unflatten(names, in_spec)
    (results,) = nodes["output"].args
    user = [
        result for result, spec in zip(results, signature.output_specs, strict=True) if spec.kind.name == "USER_OUTPUT"
    ]
    return TorchGraph(
        model=model,
        graph=program.graph,
        inputs=tuple(args),
        outputs=pytree.tree_unflatten(user, out_spec),
        weights={**signature.inputs_to_parameters, **signature.inputs_to_buffers},
        constants=constants,
        evaluation_only=reason,
    )


def source_line(node: fx.Node) -> str | None:
    """The user's own line behind a node: `file.py:12: x = self.fc(x)`, as far as torch recorded it."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for k in range(len(trace) - 1, -1, -1):
        if trace[k].startswith("File ") and "/torch/nn/" not in trace[k]:
            file, line = trace[k].split(", ")[:2]
            code = f": {trace[k + 1]}" if k + 1 < len(trace) else ""
            return f"{file[6:-1].rsplit('/', 1)[-1]}:{line.removeprefix('line ')}{code}"
    return None
