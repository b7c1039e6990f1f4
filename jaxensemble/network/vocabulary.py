"""Names that a network may contain: functions, layers and methods that its source calls, and identifiers."""

import importlib
import keyword
import re
from collections.abc import Iterable

from jaxensemble.errors import InputError

IMPORTS = {
    "jax": "import jax",
    "jnp": "import jax.numpy as jnp",
    "nnx": "from flax import nnx",
    "lax": "from jax import lax",
    "layers": "from jaxensemble import layers",
    "ops": "from jaxensemble import ops",
    "records": "from jaxensemble import records",
}
"""The modules whose functions and layers a network may name, and how the source imports each."""


OWN_MODULES = ("layers", "ops", "records")
"""The modules of `IMPORTS` that are part of this package."""


METHODS = frozenset(
    f".{name}"
    for name in """
    all any argmax argmin argsort astype clip conj cumprod cumsum dot flatten max mean min prod ravel repeat reshape
    round sort squeeze std sum swapaxes take transpose var view
    """.split()
)
"""The methods of an array that a network may call, in the form that the target of a call has."""


def is_identifier(name: str) -> bool:
    """Returns whether a name can be an attribute: ASCII (Python rewrites other letters), no keyword, not mangled.

    >>> is_identifier("conv1"), is_identifier("my-block"), is_identifier("class"), is_identifier("__x")
    (True, False, False, False)
    """
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def resolve_name(dotted: str) -> object:
    """Returns the object that a dotted name refers to: `nnx.Linear`, `jnp.concatenate`.

    **Raises:** `InputError` for a name that is in none of the modules of `IMPORTS`.
    """
    root, *rest = dotted.split(".")
    if root not in IMPORTS or not rest or not all(is_identifier(p) and not p.startswith("_") for p in rest):
        raise InputError(f"a layer or function has to be named like nnx.Linear or jnp.add; got {dotted!r}")
    found: object = _module(root)
    for part in rest:
        if not hasattr(found, part):
            raise InputError(f"{dotted!r} names nothing: {part!r} was not found")
        found = getattr(found, part)
    return found


def _module(root: str) -> object:
    full = {"jnp": "jax.numpy", "nnx": "flax.nnx", "lax": "jax.lax"}
    return importlib.import_module(full.get(root, f"jaxensemble.{root}" if root in OWN_MODULES else root))


_FUNCTIONS = re.compile(
    r"(jnp|ops|jnp\.(linalg|fft)|jax\.(nn|image|random|scipy\.special|scipy\.linalg))\.[a-z]\w*"
    r"|nnx\.(\w+_pool|dot_product_attention)"
)


_FORBIDDEN = re.compile(
    r"save|load|from|print|callback|piecewise|vectorize|apply_|while|cond|custom|jit|infeed|outfeed|fun[cm]|mask_indices"
)


_LAX_FUNCTIONS = frozenset(
    f"lax.{name}"
    for name in """
    abs acos acosh add argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e betainc bitwise_and bitwise_not
    bitwise_or bitwise_xor cbrt ceil clamp clz collapse complex concatenate conj convert_element_type cos cosh
    cumlogsumexp cummax cummin cumprod cumsum digamma div dot eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter polygamma
    population_count pow real reciprocal rem reshape rev round rsqrt select shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sort sqrt square squeeze stop_gradient sub tan tanh top_k transpose zeta
    """.split()
)
"""Functions of `jax.lax` that compute numbers from numbers.

The others call functions, communicate with other devices or have a state.
"""


TAKE_FUNCTIONS = frozenset({"ops.rnn", "ops.rnn_cell"})
"""The functions that take a function as an argument and call it once for each step of a sequence."""


def check_function(dotted: str) -> None:
    """Checks that a name is a function on arrays: one that reads no files and calls no function that it is given.

    Only `TAKE_FUNCTIONS` call functions that they are given: see `check_passed_functions`. Allowed are the functions of
    lax that compute numbers from numbers, and of nnx the activations (also in `jax.nn`), poolings and attention.

    **Raises:** `InputError` for any other name.
    """
    activation = re.sub(r"^nnx\.", "jax.nn.", dotted)
    known = _FUNCTIONS.fullmatch(dotted) or (_FUNCTIONS.fullmatch(activation) and callable(resolve_name(activation)))
    if not (known or dotted in _LAX_FUNCTIONS) or _FORBIDDEN.search(dotted) or not callable(resolve_name(dotted)):
        raise InputError(f"a network may call functions on arrays, such as jnp.add or jax.nn.gelu; got {dotted!r}")


def check_passed_functions(target: str, functions: Iterable[str]) -> None:
    """Checks that functions are arguments only of calls to one of `TAKE_FUNCTIONS`.

    **Raises:** `InputError` naming the functions.
    """
    listed = ", ".join(dict.fromkeys(functions))
    if listed and target not in TAKE_FUNCTIONS:
        takers = " and ".join(sorted(TAKE_FUNCTIONS))
        raise InputError(f"a network may pass functions only to {takers}; got {listed} as an argument of {target!r}")


def check_keyword(name: str) -> None:
    """Checks that a name can be the name of an argument.

    **Raises:** `InputError` for any other name.
    """
    if not is_identifier(name):
        raise InputError(f"the name of an argument has to be an identifier; got {name!r}")


def check_method(target: str) -> None:
    """Checks that a target is one of `METHODS`: a method of `jax.Array` that returns an array.

    **Raises:** `InputError` for any other target.
    """
    if target not in METHODS:
        raise InputError(f"a network may call these methods of an array: {', '.join(sorted(METHODS))}; got {target!r}")
