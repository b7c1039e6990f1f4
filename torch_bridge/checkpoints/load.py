"""Ensembles out of checkpoint files, one member at a time."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, ParityError, describe_error
from jaxensemble.network.proof import Proof
from jaxensemble.network.sources import Source
from torch_bridge import parity
from torch_bridge.checkpoints.choice import Choice
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.files import verified_checksum
from torch_bridge.checkpoints.member_files import MemberFiles, check_paths
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.examples import Arguments, BatchAxis
from torch_bridge.graph.modes.switch import PortedMode, ported_mode, warn_of_training
from torch_bridge.graph.sizes.open_axes import Dynamic, OpenAxes
from torch_bridge.lowering.convert import convert
from torch_bridge.members.finite import check_rows, nonfinite_values
from torch_bridge.members.stack import Stack, warn_of_equal_members
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity.result import proof_of
from torch_bridge.porting.ensemble import build_ensemble

Factory = Callable[[], nn.Module]

_PROVEN_TOGETHER = 32 << 20
"""Bytes of weights that may be in memory as modules while an ensemble is proven: small members are proven together."""


def load_ensemble(
    factory: Factory,
    paths: Sequence[str | Path],
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    batch_axis: BatchAxis = 0,
    dynamic: Dynamic = None,
    input_layout: str = "torch",
    mode: PortedMode | None = None,
    check: bool = True,
    allow_nonfinite: bool = False,
) -> Ensemble:
    """Ports M checkpoint files of one PyTorch network, in no more memory than the ensemble and one member take.

    All files are looked over before anything is built: their keys, shapes and dtypes have to be the model's, and the
    weights have to be in the same place of each. Then each is copied into the stack in turn. Buffers that PyTorch does
    not save come from the factory's model. What was taken of each file, and what was left out, is in the ensemble's
    `sources`, and saved with it.

    **Arguments:**

    - `factory`: makes the network, with whatever weights; called without arguments.
    - `paths`: a file for each member: `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` of `torch.save`, which are read
      without running what they may hold. See [`read_state_dict`][torch_bridge.checkpoints.read_state_dict].
    - `example_inputs`, `example_kwargs`, `batch_axis`, `dynamic`, `input_layout`, `mode`: as in `to_ensemble`.
    - `key`: which of several sets of weights in a file is meant: `"model_ema"`, `"ema.state_dict"`.
    - `prefix`: what is removed from the beginning of every name: `"encoder."`.
    - `rename`: names, or beginnings of names, with what takes their place afterwards: `{"fc": "head"}`.
    - `ignore`: patterns of names that are left out: `["queue", "projector.*"]`. See
      [`Choice`][torch_bridge.checkpoints.Choice] for all four, and for what is read without them.
    - `check`: whether to prove that each member gives what the factory's network gives with that file's weights.
    - `allow_nonfinite`: take weights that are NaN or infinite.

    **Raises:** `InputError` for files that cannot be read, or in more than one way, or not all in the same way, and for
    weights that are not finite where the factory's are; `MemberError` with every key, shape and dtype, of all files,
    that is not the model's; `UnsupportedError` for what cannot be ported exactly; `ParityError` when the proof fails.
    Warns with an `EqualMembersWarning` of members whose weights are all equal.

    >>> import tempfile, torch
    >>> factory = lambda: nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [Path(folder) / f"seed{seed}.pt" for seed in range(5)]
    ...     for path in paths:
    ...         torch.save({"model": factory().state_dict(), "model_ema": factory().state_dict()}, path)
    ...     ensemble = load_ensemble(factory, paths, (torch.ones(1, 3),), key="model_ema")
    >>> ensemble(torch.ones(64, 3)).shape
    (5, 64, 2)
    >>> ensemble.sources[4].file, str(ensemble.sources[4].taken)
    ('seed4.pt', 'taken from `model_ema`; left out: `model`')
    """
    files, arguments = check_paths(paths), Arguments.of(example_inputs, example_kwargs)
    choice = Choice(key, prefix, rename or {}, ignore)
    model = _make_model(factory)
    checkpoints = MemberFiles(files, Expected.of(model), choice)
    checkpoints.check()
    checkpoints.put_into(model, 0)
    opened = OpenAxes.of(arguments, arguments.names(model), batch_axis, dynamic)
    with ported_mode([model], mode), keep_caches_empty([model], arguments):
        name, lowered = type(model).__name__, convert(model, arguments, opened, input_layout)
        saved = checkpoints.expected.tensors
        unsaved = {key: tensor.clone() for key, tensor in tensors_of(model).items() if key not in saved}
    del model
    gc.collect()  # an exported graph, which holds the model, is made of cycles
    stack = Stack(lowered.weights, len(files))
    sources = _fill_stack(stack, checkpoints, unsaved, allow_nonfinite)
    ensemble = build_ensemble(lowered, stack, name, batch_axis, input_layout).read_from(sources)
    if check:
        ensemble = ensemble.proven(_prove_ensemble(ensemble, factory, checkpoints, unsaved, arguments))
    warn_of_training(ensemble.graphdef, mode)
    return ensemble


def load_members(
    factory: Factory,
    paths: Sequence[str | Path],
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> list[nn.Module]:
    """The networks that `load_ensemble` ports, as PyTorch modules; all of them in memory.

    **Raises:** `InputError` and `MemberError` as `load_ensemble` does.
    """
    files, choice = check_paths(paths), Choice(key, prefix, rename or {}, ignore)
    models = [_make_model(factory) for _ in files]
    checkpoints = MemberFiles(files, Expected.of(models[0]), choice)
    checkpoints.check()
    for file in files:
        verified_checksum(file)
    return [checkpoints.put_into(model, k) for k, model in enumerate(models)]


def _make_model(factory: Factory) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(f"`factory` must be a function that makes the network; got {type(factory).__name__}")
    try:
        model = factory()
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"`factory` must make the network when it is called without arguments; got {describe_error(error)}",
            details=str(error),
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"`factory` must return a torch.nn.Module; got {type(model).__name__}")
    return model


def _fill_stack(
    stack: Stack, checkpoints: MemberFiles, unsaved: Mapping[str, Tensor], allow_nonfinite: bool
) -> tuple[Source, ...]:
    """Copies the members into the stack, one after another; a file's tensors are let go before the next is read."""
    bad: list[str] = []
    sources: list[Source] = []
    expected = checkpoints.expected
    for k, file in enumerate(checkpoints.files):
        digest = verified_checksum(file)
        tensors, taken = checkpoints.read(k)
        if changed := list(expected.problems(tensors)):
            raise InputError(f"`{file}` changed while it was being read: {'; '.join(changed)}")
        if not allow_nonfinite:
            bad += [f"  member {checkpoints.named(k)}, {row}" for row in nonfinite_values(tensors, expected.nonfinite)]
        stack.put(k, {**unsaved, **tensors})
        sources.append(Source(file.name, digest, taken))
        del tensors
    check_rows(bad)
    warn_of_equal_members(stack, [checkpoints.named(k) for k in range(len(checkpoints))])
    return tuple(sources)


def _prove_ensemble(
    ensemble: Ensemble,
    factory: Factory,
    checkpoints: MemberFiles,
    unsaved: Mapping[str, Tensor],
    arguments: Arguments,
) -> Proof | None:
    size = sum(tensor.nbytes for tensor in tensors_of(factory()).values())
    together = max(1, _PROVEN_TOGETHER // max(1, size))
    failed, reports = [], []
    for start in range(0, len(checkpoints), together):
        chosen = range(len(checkpoints))[start : start + together]
        models = [_with_unsaved(checkpoints.put_into(factory(), k), unsaved) for k in chosen]
        report = parity.check(models, ensemble[start : start + len(chosen)], arguments, thorough=False)
        reports.append(report)
        if not report.passed:
            failed.append(f"members {', '.join(map(checkpoints.named, chosen))}:\n{report.failures}")
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
