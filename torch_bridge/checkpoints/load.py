"""Ensembles out of checkpoint files, one member at a time."""

import dataclasses
import gc
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, MemberError, ParityError, described
from jaxensemble.proof import Proof
from torch_bridge import parity
from torch_bridge.assemble import assembled, convert, tensors_of
from torch_bridge.caches import fresh
from torch_bridge.checkpoints.files import checkpoint_path, checksum, read_state_dict
from torch_bridge.examples import Arguments, BatchAxis
from torch_bridge.finite import check_rows, has_fractions, nonfinite_values
from torch_bridge.proof import proof_of
from torch_bridge.stacking import Stack

Factory = Callable[[], nn.Module]

_LOG = logging.getLogger(__name__)

_PROVEN_TOGETHER = 32 << 20
"""Bytes of weights that may be in memory as modules while an ensemble is proven: small members are proven together."""


def load_ensemble(
    factory: Factory,
    paths: Sequence[str | Path],
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    batch_axis: BatchAxis = 0,
    input_layout: str = "torch",
    check: bool = True,
    allow_nonfinite: bool = False,
) -> Ensemble:
    """Ports M checkpoint files of one PyTorch network, in no more memory than the ensemble and one member take.

    All files are looked over before anything is built: their keys, shapes and dtypes have to be the model's. Then each
    is copied into the stack in turn. Buffers that PyTorch does not save come from the factory's model.

    **Arguments:**

    - `factory`: makes the network, with whatever weights; called without arguments. The ensemble is in the mode,
      training or evaluation, that it leaves the network in.
    - `paths`: a file for each member: `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` of `torch.save`, which are read
      without running what they may hold. See [`read_state_dict`][torch_bridge.checkpoints.read_state_dict].
    - `example_inputs`, `example_kwargs`, `batch_axis`, `input_layout`: as in `to_ensemble`.
    - `check`: whether to prove that each member gives what the factory's network gives with that file's weights.
    - `allow_nonfinite`: take weights that are NaN or infinite.

    **Raises:** `InputError` for files that cannot be read, and for weights that are not finite where the factory's are;
    `MemberError` with every key, shape and dtype, of all files, that is not the model's; `UnsupportedError` for what
    cannot be ported exactly; `ParityError` when the proof fails. Warns if two files are the same, byte for byte.

    >>> import tempfile
    >>> factory = lambda: nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [Path(folder) / f"seed{seed}.pt" for seed in range(5)]
    ...     for path in paths:
    ...         torch.save(factory().state_dict(), path)
    ...     ensemble = load_ensemble(factory, paths, (torch.ones(1, 3),))
    >>> ensemble(torch.ones(64, 3)).shape
    (5, 64, 2)
    """
    files, arguments = _files(paths), Arguments.of(example_inputs, example_kwargs)
    model = _made(factory)
    expected = Expected.of(model)
    _check_files(files, expected)
    with_weights(model, expected.read(files[0]))
    with fresh([model], arguments):
        name, lowered = type(model).__name__, convert(model, arguments, batch_axis, input_layout)
        unsaved = {key: tensor.clone() for key, tensor in tensors_of(model).items() if key not in expected.tensors}
    del model
    gc.collect()  # an exported graph, which holds the model, is made of cycles
    stack = Stack(lowered.weights, len(files))
    _fill(stack, files, expected, unsaved, allow_nonfinite)
    ensemble = assembled(lowered, stack, name, batch_axis, input_layout)
    if check:
        ensemble = ensemble.proven(_prove(ensemble, factory, files, expected, unsaved, arguments))
    return ensemble


def load_members(factory: Factory, paths: Sequence[str | Path]) -> list[nn.Module]:
    """The networks that `load_ensemble` ports, as PyTorch modules; all of them in memory.

    **Raises:** `InputError` and `MemberError` as `load_ensemble` does.
    """
    files = _files(paths)
    models = [_made(factory) for _ in files]
    expected = Expected.of(models[0])
    _check_files(files, expected)
    for file in files:
        checksum(file)
    return [with_weights(model, expected.read(file)) for model, file in zip(models, files, strict=True)]


def with_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model, with the tensors copied into it."""
    model.load_state_dict(dict(tensors))
    return model


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a checkpoint of a model has to hold.

    - `tensors`: the shape and dtype under each key.
    - `ties`: for a key whose tensor the model holds under several, all of these.
    - `nonfinite`: where the tensors of a model with fresh weights are not finite: masks hold infinities.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ties: Mapping[str, tuple[str, ...]]
    nonfinite: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Expected":
        """**Raises:** `InputError` for a model whose state dict is not simply its parameters and buffers."""
        tensors, saved = tensors_of(model), set(model.state_dict())
        unsaved = [key for key, _ in model.named_parameters(remove_duplicate=False) if key not in saved]
        if odd := sorted(saved - tensors.keys()) + unsaved:
            raise InputError(
                f"the state dict of {type(model).__name__} must hold its parameters and buffers by their names; it has "
                f"others, or lacks some: {', '.join(odd)}. Load the members yourself, and pass them to to_ensemble."
            )
        names: dict[int, list[str]] = defaultdict(list)
        for key, tensor in tensors.items():
            if key in saved:
                names[id(tensor)].append(key)
        fractions = {key: tensor for key, tensor in tensors.items() if key in saved and has_fractions(tensor)}
        nonfinite = {key: ~tensor.isfinite() for key, tensor in fractions.items()}
        return cls(
            {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items() if key in saved},
            {key: tuple(group) for group in names.values() for key in group if len(group) > 1},
            {key: mask for key, mask in nonfinite.items() if mask.any()},
        )

    def read(self, file: Path) -> dict[str, Tensor]:
        """A member's tensors. Of tied ones, one suffices: safetensors stores no tensor twice."""
        tensors, note = read_state_dict(file, self.tensors)
        if note:
            _LOG.info("%s: %s", file, note)
        for key, group in self.ties.items():
            present = [name for name in group if name in tensors]
            if key not in tensors and present:
                tensors[key] = tensors[present[0]]
        return tensors

    def problems(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """Every difference to what a checkpoint has to hold."""
        for key in dict.fromkeys((*self.tensors, *tensors)):
            if key not in self.tensors:
                yield f"`{key}`: unexpected, {_described(tuple(tensors[key].shape), tensors[key].dtype)}"
                continue
            wanted = _described(*self.tensors[key])
            if key not in tensors:
                yield f"`{key}`: missing, expected {wanted}"
            elif (got := _described(tuple(tensors[key].shape), tensors[key].dtype)) != wanted:
                yield f"`{key}`: expected {wanted}, got {got}"
            elif key in self.ties and not _same_values(tensors[self.ties[key][0]], tensors[key]):
                yield f"`{key}`: tied to `{self.ties[key][0]}` in the model, expected the same values"


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a.nan_to_num(), b.nan_to_num())


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _files(paths: Any) -> list[Path]:
    if isinstance(paths, str | Path) or not isinstance(paths, Sequence):
        raise InputError(f"`paths` must be a sequence of files, one for each member; got {paths!r}")
    if not paths:
        raise InputError("`paths` must name at least one file; got none")
    files, problems = [], []
    for path in paths:
        try:
            files.append(checkpoint_path(path))
        except InputError as error:
            problems.append(error.details)
    if problems:
        raise InputError("`paths` must be checkpoints that can be read; got\n" + "\n".join(f"  {p}" for p in problems))
    return files


def _made(factory: Factory) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(f"`factory` must be a function that makes the network; got {type(factory).__name__}")
    try:
        model = factory()
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"`factory` must make the network when it is called without arguments; got {described(error)}",
            details=str(error),
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"`factory` must return a torch.nn.Module; got {type(model).__name__}")
    return model


def _check_files(files: Sequence[Path], expected: Expected) -> None:
    """**Raises:** `InputError` naming all files that cannot be read, `MemberError` with all that is not the model's."""
    unreadable: list[str] = []
    found: dict[str, list[str]] = defaultdict(list)
    for k, file in enumerate(files):
        try:
            problems = list(expected.problems(expected.read(file)))
        except InputError as error:
            unreadable.append(f"  member {k}: {' '.join(error.details.split())}")
            continue
        for problem in problems:
            found[problem].append(f"{k} ({file.name})")
    if unreadable:
        raise InputError("these checkpoints cannot be read:\n" + "\n".join(unreadable))
    if found:
        raise MemberError(_table(found))


def _table(found: Mapping[str, Sequence[str]]) -> str:
    rows = [
        f"  {problem}, in member{'s' if len(which) > 1 else ''} {', '.join(which)}" for problem, which in found.items()
    ]
    return (
        "the checkpoints must hold the tensors of the factory's model, and no others:\n"
        + "\n".join(rows)
        + "\nHave `factory` make the network that was saved: where dtypes differ, in the dtype of the files, for "
        "instance with .half(), or save the files anew in that of the model."
    )


def _fill(
    stack: Stack, files: Sequence[Path], expected: Expected, unsaved: Mapping[str, Tensor], allow_nonfinite: bool
) -> None:
    """Copies the members into the stack, one after another; a file's tensors are let go before the next is read."""
    bad: list[str] = []
    seen: dict[str, list[str]] = defaultdict(list)
    for k, file in enumerate(files):
        seen[checksum(file)].append(f"{k} ({file.name})")
        tensors = expected.read(file)
        if changed := list(expected.problems(tensors)):
            raise InputError(f"`{file}` changed while it was being read: {'; '.join(changed)}")
        if not allow_nonfinite:
            bad += [f"  member {k} ({file.name}), {row}" for row in nonfinite_values(tensors, expected.nonfinite)]
        stack.put(k, {**unsaved, **tensors})
        del tensors
    check_rows(bad)
    for which in seen.values():
        if len(which) > 1:
            warnings.warn(f"members {', '.join(which)} are the same file, byte for byte", stacklevel=3)


def _prove(
    ensemble: Ensemble,
    factory: Factory,
    files: Sequence[Path],
    expected: Expected,
    unsaved: Mapping[str, Tensor],
    arguments: Arguments,
) -> Proof | None:
    size = sum(tensor.nbytes for tensor in tensors_of(factory()).values())
    together = max(1, _PROVEN_TOGETHER // max(1, size))
    failed, reports = [], []
    for start in range(0, len(files), together):
        chosen = files[start : start + together]
        models = [_with_unsaved(with_weights(factory(), expected.read(file)), unsaved) for file in chosen]
        report = parity.check(models, ensemble[start : start + len(chosen)], arguments, thorough=False)
        reports.append(report)
        if not report.passed:
            names = ", ".join(f"{start + k} ({file.name})" for k, file in enumerate(chosen))
            failed.append(f"members {names}:\n{report.failures}")
    if failed:
        raise ParityError(
            "the ported ensemble does not give what PyTorch gives:\n" + "\n".join(failed),
            details="\n".join(str(report) for report in reports if not report.passed),
        )
    return proof_of(reports)


def _with_unsaved(model: nn.Module, unsaved: Mapping[str, Tensor]) -> nn.Module:
    """The model, with the buffers that are not saved as the ensemble has them: a factory may draw them anew."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in unsaved.items():
        if buffers[key].shape == tensor.shape:  # one of another size grows with the first call
            buffers[key].copy_(tensor)
    return model
