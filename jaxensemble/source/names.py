"""Names that are safe in the source.

Every name in a `Network` may come from a file that someone else wrote. Only literals and identifiers that are checked
here reach the source.
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
    """Checks that the name of a child hides no attribute that every `nnx.Module` needs.

    **Raises:** `InputError` for a name that hides one.
    """
    if name in _RESERVED or name.startswith(("_pytree__", "_object__")):
        raise InputError(f"{path!r} cannot be a child of a Flax module: nnx.Module has {name!r} itself; rename it")


def make_identifier(name: str, default: str) -> str:
    """Returns a name without the characters that no identifier can hold, or `default` if nothing is left.

    >>> make_identifier("my-block", "x"), make_identifier("3", "x"), make_identifier("class", "x")
    ('my_block', 'x', 'class_')
    """
    name = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:40]
    if not name or name[0].isdigit():
        return default
    return f"{name}_" if name in TAKEN else name


def snake_case(name: str) -> str:
    """Returns the name of a class as the name of a function.

    >>> snake_case("SqueezeExcitation"), snake_case("LPPool2d")
    ('squeeze_excitation', 'lp_pool2d')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def unused_name(name: str, taken: Iterable[str]) -> str:
    """Returns `name`, with a number from 2 on if `name` is taken.

    >>> unused_name("Block", {"Block", "Block2"}), unused_name("BlockV2", {"BlockV2"})
    ('Block3', 'BlockV2_2')
    """
    taken = set(taken)
    number, candidate, stem = 2, name, f"{name}_" if name[-1:].isdigit() else name
    while candidate in taken:
        number, candidate = number + 1, f"{stem}{number}"
    return candidate
