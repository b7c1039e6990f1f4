"""What may lie beside the weights in a pickle, and is read as nothing: hyperparameters, dates, random states.

Training scripts save their arguments with the weights. PyTorch's loader refuses their classes, as any class could run
code. Here each name of a fixed list stands for an empty object of our own, which takes whatever it is given and keeps
none of it. So nothing of `argparse`, numpy or other libraries is called for a file, nothing is imported, and the values
are not to be had. What is not in the list is refused as ever.
"""

import collections
import contextlib
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
"""Classes and functions by the names that pickles have for them."""

MAPPINGS = (
    "addict.addict.Dict",
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
"""The same, of those that are filled as dicts are. They are read as dicts."""


class Hyperparameters:
    """Takes the place of an object that is not weights. It is empty, whatever it is made of or set to."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> "Hyperparameters":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Mapping:
    def __new__(cls, *_: Any) -> Any:
        return collections.OrderedDict()  # which PyTorch's loader fills


_STAND_INS = [
    (type(name.rpartition(".")[2].replace("_reconstruct", "ndarray"), (base,), {"__slots__": ()}), name)
    for base, names in ((Hyperparameters, ATTRIBUTES), (_Mapping, MAPPINGS))
    for name in names
]
_LOCK = threading.Lock()


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """While it lasts, PyTorch's loader reads every name of the list as an empty object.

    What was allowed before stays so, and is what it was afterwards.

    >>> import argparse, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     torch.save(argparse.Namespace(lr=0.1), file.name)
    ...     with allowed():
    ...         found = torch.load(file.name, weights_only=True)
    >>> type(found).__name__, hasattr(found, "lr")
    ('Namespace', False)
    """
    with _LOCK, torch.serialization.safe_globals(list(_STAND_INS)):  # the list is the whole process's
        yield
