"""The devices that the command line puts members on: those of this machine, or of all processes of a cluster."""

from typing import Any

import jax

from jaxensemble.artifact import Artifact
from jaxensemble.devices.placement import Placement
from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import InputError, first_line

AXIS = "members"


def find_mesh(count: int | None, *, distributed: bool) -> Any:
    """Returns a mesh of `count` devices of this machine, or of those of all processes; None without either.

    JAX must not have started, for a CPU to become several devices and for processes to find each other.

    **Raises:** `InputError` for both at once, for fewer devices, and where processes do not find each other.
    """
    if count is not None and distributed:
        raise InputError("--devices and --distributed exclude each other: --distributed takes all devices")
    if distributed:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "--distributed is for processes that a cluster such as Slurm or Open MPI has started together; JAX "
                f"says: {first_line(error)}"
            ) from error
        return jax.make_mesh((jax.device_count(),), (AXIS,))
    if count is None:
        return None
    _split_cpu(count)
    found = jax.local_devices()
    if len(found) < count:
        raise InputError(f"--devices must be at most {len(found)}, the number of devices of JAX; got {count}")
    return jax.make_mesh((count,), (AXIS,), devices=found[:count])


def is_first_process(mesh: Any) -> bool:
    """Returns whether this process prints and writes: JAX starts only for a mesh, which errors need not wait for."""
    return mesh is None or jax.process_index() == 0


def read_ensemble(artifact: Artifact, mesh: Any) -> Ensemble:
    """Reads an ensemble, onto a mesh if there is one.

    **Raises:** `InputError` for a damaged artifact, and for an older one where members are in several processes.
    """
    if mesh is None:
        return Ensemble.from_saved(artifact.read())
    placement = Placement.of(mesh, AXIS, None, artifact.manifest.members)
    if artifact.manifest.member_hashes is None and placement.is_local:
        return Ensemble.from_saved(artifact.read()).over(mesh, AXIS)
    return Ensemble.from_saved(artifact.read(placement), placement=placement)


def _split_cpu(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started: the devices that it has are counted
        return
