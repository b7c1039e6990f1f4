"""Loading of ensembles from checkpoint files, one member at a time."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jaxensemble.devices.placement import Placement
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, ParityError, describe_error
from jaxensemble.network.proof import Proof
from jaxensemble.network.sources import Source
from torch_bridge import parity
from torch_bridge.checkpoints.choice import Choice
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.files import verified_checksum
from torch_bridge.checkpoints.member_files import MemberFiles, check_paths, count_paths
from torch_bridge.graph.caches.tensors import keep_caches_empty
from torch_bridge.graph.examples import Arguments, BatchAxis
from torch_bridge.graph.modes.switch import PortedMode, ported_mode, warn_of_training
from torch_bridge.graph.sizes.open_axes import Dynamic, OpenAxes
from torch_bridge.lowering.convert import convert
from torch_bridge.members.finite import check_no_rows, nonfinite_values
from torch_bridge.members.stack import Stack, warn_of_equal_members
from torch_bridge.members.tensors import tensors_of
from torch_bridge.parity.result import proof_of
from torch_bridge.porting.ensemble import build_ensemble

Factory = Callable[[], nn.Module]

_PROVEN_TOGETHER = 32 << 20
"""Most bytes of weights in modules while an ensemble is proven: small members are proven together."""


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
    mesh: Any = None,
    members: str = "members",
    rows: str | None = None,
) -> Ensemble:
    """Ports M checkpoint files of one PyTorch network, in the memory of the ensemble and one member.

    All files are checked before anything is built: their keys, shapes and dtypes must be the model's, and the weights
    must be in the same place of each file. Then each file is copied into the stack in turn. Buffers that PyTorch does
    not save come from the factory's model. The ensemble's `sources` say what was taken from each file, and what was
    left out; they are saved with it.

    **Arguments:**

    - `factory`: a function without arguments that makes the network, with any weights.
    - `paths`: a file for each member: `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` of `torch.save`, which are read
      without running code in them. See [`read_state_dict`][torch_bridge.checkpoints.read_state_dict].
    - `example_inputs`, `example_kwargs`, `batch_axis`, `dynamic`, `input_layout`, `mode`: as in `to_ensemble`.
    - `key`: the key of one of several sets of weights in a file: `"model_ema"`, `"ema.state_dict"`.
    - `prefix`: the prefix that is removed from every name: `"encoder."`.
    - `rename`: names, or beginnings of names, with their replacements: `{"fc": "head"}`.
    - `ignore`: patterns of names that are left out: `["queue", "projector.*"]`. See
      [`Choice`][torch_bridge.checkpoints.Choice] for all four arguments and their defaults.
    - `check`: whether to prove that each member's outputs equal those of the factory's network with the file's weights.
    - `allow_nonfinite`: whether weights may be NaN or infinite.
    - `mesh`, `members`, `rows`: the devices for the members, as in [`Ensemble.over`][jaxensemble.Ensemble.over]. Each
      process reads the files of the members on its own devices alone, and compares these with each other. Where
      members are in several processes, nothing is proven (`check=False` says so), `sources` is None, and the factory
      must make the same buffers in all of them where PyTorch saves none.

    **Raises:** `InputError` for files that cannot be read, can be read in more than one way, or are not all read in the
    same way, and for weights that are not finite where the factory's are; `MemberError` with every key, shape and dtype
    in the files that differs from the model's; `UnsupportedError` for networks that cannot be ported exactly;
    `ParityError` when the proof fails. Warns with an `EqualMembersWarning` if members have equal weights.

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
    placement = None if mesh is None else Placement.of(mesh, members, rows, count_paths(paths))
    has_all = placement is None or placement.is_local
    if check and not has_all:
        raise InputError(
            "`check` must be False where members are in several processes: prove the ensemble in one process, and save "
            "it there, or check one of its members with torch_bridge.check"
        )
    own = None if placement is None else placement.own_members
    files, arguments = check_paths(paths, own), Arguments.of(example_inputs, example_kwargs)
    choice = Choice(key, prefix, rename or {}, ignore)
    model = _make_model(factory)
    checkpoints = MemberFiles(files, Expected.of(model), choice, own)
    checkpoints.check()
    checkpoints.put_into(model, 0)
    opened = OpenAxes.of(arguments, arguments.names(model), batch_axis, dynamic)
    with ported_mode([model], mode), keep_caches_empty([model], arguments):
        name, lowered = type(model).__name__, convert(model, arguments, opened, input_layout)
        saved = checkpoints.expected.tensors
        unsaved = {key: tensor.clone() for key, tensor in tensors_of(model).items() if key not in saved}
    del model
    gc.collect()  # the exported graph holds the model in reference cycles
    stack = Stack(lowered.weights, len(files))
    sources = _fill_stack(stack, checkpoints, unsaved, allow_nonfinite)
    ensemble = build_ensemble(lowered, stack, name, batch_axis, input_layout, placement)
    ensemble = ensemble.read_from(sources if has_all else None)
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
    """Returns the networks that `load_ensemble` ports, as PyTorch modules, all in memory.

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
    """Copies the members into the stack one by one, and frees the tensors of a file before reading the next."""
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
    check_no_rows(bad)
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
        part = ensemble[start : start + len(chosen)]
        part = part if part.placement is None else part.over(None)
        report = parity.check(models, part, arguments, thorough=False)
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
    """Copies the ensemble's unsaved buffers into a model and returns it: a factory may draw others."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for key, tensor in unsaved.items():
        if buffers[key].shape == tensor.shape:  # a buffer of another size grows with the first call
            buffers[key].copy_(tensor)
    return model
