"""Names: which ones may stand in the source as they are, and how to make the others safe.

Every name in a `Network` may come from a file that someone else wrote. Nothing reaches the source but identifiers
checked here and literals.
"""

import keyword
import re
from collections.abc import Iterable

from flax import nnx

from jaxensemble.errors import InputError
from jaxensemble.network.vocabulary import IMPORTS

TAKEN = frozenset({*IMPORTS, *keyword.kwlist, "_", "self", "rngs"}) | {
    "complex", "getattr", "range", "setattr", "super", "ValueError"
}  # fmt: skip
"""Names that nothing in the source may be given."""


_RESERVED = frozenset(dir(nnx.Module))


def check_child(name: str, path: str) -> None:
    """Refuses the name of a child that would hide what every `nnx.Module` needs.

    **Raises:** `InputError` for such a name.
    """
    if name in _RESERVED or name.startswith(("_pytree__", "_object__")):
        raise InputError(f"{path!r} cannot be a child of a Flax module: nnx.Module has {name!r} itself; rename it")


def make_identifier(name: str, default: str) -> str:
    """The name with whatever an identifier cannot hold left out, or `default` where nothing is left.

    >>> make_identifier("my-block", "x"), make_identifier("3", "x"), make_identifier("class", "x")
    ('my_block', 'x', 'class_')
    """
    name = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:40]
    if not name or name[0].isdigit():
        return default
    return f"{name}_" if name in TAKEN else name


def snake_case(name: str) -> str:
    """
    >>> snake_case("SqueezeExcitation"), snake_case("LPPool2d")
    ('squeeze_excitation', 'lp_pool2d')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def unused_name(name: str, taken: Iterable[str]) -> str:
    """`name`, numbered from 2 on where it is taken.

    >>> unused_name("Block", {"Block", "Block2"}), unused_name("BlockV2", {"BlockV2"})
    ('Block3', 'BlockV2_2')
    """
    taken = set(taken)
    number, candidate, stem = 2, name, f"{name}_" if name[-1:].isdigit() else name
    while candidate in taken:
        number, candidate = number + 1, f"{stem}{number}"
    return candidate
