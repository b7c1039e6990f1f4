"""Hyperparameters, dates and random states in a pickle with weights, which are read as empty objects.

Training scripts save their arguments with the weights. PyTorch's loader refuses their classes, since any class could
run code. Here each name of a fixed list stands for an empty object of our own, which accepts any values and keeps none.
So a file calls nothing of `argparse`, numpy or other libraries, nothing is imported, and the values are not available.
Names that are not in the list are still refused.
"""

import collections
import contextlib
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import torch

ATTRIBUTES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "slice", "str", "tuple")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("bool_", "float16", "float32", "float64", "int32", "int64", "str_")),
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
    "decimal.Decimal",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.torch_version.TorchVersion",
    "typing.Any",
    "uuid.UUID",
)
"""Classes and functions, by their names in pickles."""

MAPPINGS = (
    "addict.addict.Dict",
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
"""Classes that are filled like dicts, by their names in pickles. They are read as dicts."""


class Hyperparameters:
    """Stand-in for an object that is not weights. It stays empty with any arguments and any state."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> "Hyperparameters":
        _check_thread()
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _check_thread() -> None:
    if not getattr(_THREAD, "reads", False):
        raise pickle.UnpicklingError(
            "this file was loaded while load_ensemble read another one in another thread, and PyTorch has one list of "
            "allowed classes for all threads: load it again, or under a lock"
        )


class _Mapping:
    def __new__(cls, *_: Any) -> Any:
        _check_thread()
        return collections.OrderedDict()  # PyTorch's loader fills it


_STAND_INS = [
    (type(name.rpartition(".")[2].replace("_reconstruct", "ndarray"), (base,), {"__slots__": ()}), name)
    for base, names in ((Hyperparameters, ATTRIBUTES), (_Mapping, MAPPINGS))
    for name in names
]
_NAMES = {*ATTRIBUTES, *MAPPINGS}
_LOCK = threading.Lock()
_THREAD = threading.local()


@contextlib.contextmanager
def allow_stand_ins() -> Iterator[None]:
    """Makes PyTorch's loader read every name of the list as an empty object, within a `with` block.

    Classes that were allowed before stay allowed. Those in the list are read as empty objects within the block, and
    are allowed again afterwards. PyTorch has one list of allowed classes for all threads. Files with such objects that
    another thread loads meanwhile are refused there, unless they only name a class; it is then a stand-in.

    >>> import argparse, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     torch.save(argparse.Namespace(lr=0.1), file.name)
    ...     with allow_stand_ins():
    ...         found = torch.load(file.name, weights_only=True)
    >>> type(found).__name__, hasattr(found, "lr")
    ('Namespace', False)
    """
    with _LOCK:
        theirs = [given for given in torch.serialization.get_safe_globals() if _pickled_name(given) in _NAMES]
        with torch.serialization.safe_globals(theirs):
            pass  # the end of this block removes them
        _THREAD.reads = True
        try:
            with torch.serialization.safe_globals(list(_STAND_INS)):
                yield
        finally:
            _THREAD.reads = False
            torch.serialization.add_safe_globals(theirs)


def _pickled_name(given: Any) -> str:
    """Returns the pickled name of an allowed class, which may be given as a pair of the class and the name."""
    return given[1] if isinstance(given, tuple) else f"{given.__module__}.{given.__qualname__}"
