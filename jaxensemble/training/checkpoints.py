"""Checkpoints of `fit` on disk, from which a killed run goes on to the same bits. Orbax writes them."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxensemble.dtypes import is_key
from jaxensemble.errors import InputError
from jaxensemble.files.durable import as_path
from jaxensemble.training.fingerprint import named_arrays
from jaxensemble.training.identity import run_differences

_KEPT = 2
"""Number of checkpoints that are kept. The one being written never replaces the only whole one."""

_SHOWN = 8
"""Number of differences from another run that an error lists."""


class Checkpoints:
    """A directory of checkpoints, one for each of the latest epochs.

    `settings` must be the same whenever a run goes on.

    **Raises:** `InputError` for a path that is no local directory.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        if "://" in str(path) or (as_path(path, "checkpoints").exists() and not Path(path).is_dir()):
            raise InputError(f"`checkpoints` must be a directory on this machine; got {path}")
        try:
            import orbax.checkpoint as ocp  # takes seconds to import
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "checkpoints are written by orbax: pip install 'jaxensemble[train]'", name=error.name
            ) from error
        self._ocp: Any = ocp
        self.settings = json.loads(json.dumps(settings))  # in the form in which they are read back
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, create=True, enable_async_checkpointing=False)
        self.path = Path(path).absolute()
        self._manager: Any = ocp.CheckpointManager(self.path, options=options)

    def save(self, epoch: int, tree: Any, record: Any) -> None:
        """Writes the arrays of `tree`, and a record for JSON, after `epoch` epochs. Ctrl-C waits meanwhile."""
        with _delay_interruption():
            self._write(epoch, tree, record)

    def _write(self, epoch: int, tree: Any, record: Any) -> None:
        content = {"settings": self.settings, "shapes": _shapes(named_arrays(tree)), "record": record}
        arguments = self._ocp.args.Composite(
            arrays=self._ocp.args.StandardSave(named_arrays(tree)),
            content=self._ocp.args.JsonSave(json.loads(json.dumps(content))),
        )
        self._manager.save(epoch, args=arguments)

    def epoch(self) -> int | None:
        """Returns the number of epochs in the latest checkpoint; None without a checkpoint."""
        # A checkpoint whose writing was interrupted has a name that is no number.
        return max((int(path.name) for path in self.path.iterdir() if path.name.isdigit()), default=None)

    def latest(self, tree: Any) -> tuple[Any, Any] | None:
        """Returns the arrays of the latest checkpoint, in the structure of `tree`, and its record; None without one.

        **Raises:** `InputError` for a checkpoint of another run, and for one that cannot be read.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        content = self._restore(epoch, content=self._ocp.args.JsonRestore()).content
        if not (isinstance(content, dict) and content.keys() == {"settings", "shapes", "record"}):
            raise self._unreadable_error(epoch, "it holds something else")
        wrong = run_differences(self.settings, content["settings"]) or [
            f"{name}: {wanted}, was {found}"
            for name, wanted, found in _unequal_shapes(_shapes(named_arrays(tree)), content["shapes"])
        ]
        if wrong:
            more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise InputError(
                f"{self.path} holds checkpoints of another run. Name another directory, or begin as that run did: from "
                "models and a key of the same seeds, with the same data, loss and optimizer. To train longer, pass the "
                "state with which that run began, and more `epochs`; a state that `fit` returned begins a new run."
                + "".join(f"\n  {line}" for line in wrong[:_SHOWN])
                + more
            )
        arrays = self._restore(epoch, arrays=self._ocp.args.StandardRestore(named_arrays(tree))).arrays
        leaves, treedef = jax.tree.flatten(tree)
        restored = [_restore_key(leaf, arrays[name]) for leaf, name in zip(leaves, named_arrays(tree), strict=True)]
        return treedef.unflatten(restored), content["record"]

    def _restore(self, epoch: int, **items: Any) -> Any:
        try:
            return self._manager.restore(epoch, args=self._ocp.args.Composite(**items))
        except Exception as error:  # orbax raises many kinds for a folder that is incomplete or not its own
            raise self._unreadable_error(epoch, f"{type(error).__name__}: {str(error)[:200]}") from error

    def _unreadable_error(self, epoch: int, reason: str) -> InputError:
        return InputError(
            f"{self.path / str(epoch)} cannot be read as a checkpoint of `fit` ({reason}): name another directory, or "
            "remove that folder to go on from the checkpoint before it"
        )

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


@contextlib.contextmanager
def _delay_interruption() -> Iterator[None]:
    """Delays Ctrl-C until the block ends: orbax writes in threads of its own, which fail when interrupted."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield  # no handler can be set or restored here
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _unequal_shapes(now: Mapping[str, str], then: Mapping[str, str]) -> list[tuple[str, str, str]]:
    pairs = ((name, now.get(name, "nothing"), then.get(name, "nothing")) for name in dict.fromkeys((*now, *then)))
    return [(name, a, b) for name, a, b in pairs if a != b]


def _restore_key(leaf: Any, array: Any) -> Any:
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if is_key(leaf) else array
