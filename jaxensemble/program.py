"""What a network's call is as a JAX program."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def primitives(function: Callable[..., Any], *args: Any) -> collections.Counter[str]:
    """How often each JAX primitive stands in the program of one call, nested programs included.

    The program is traced, not run; `args` may be `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> primitives(lambda x: jnp.sin(x).T + 1, jnp.ones((2, 3)))["transpose"]
    1
    """
    return collections.Counter(_names(jax.make_jaxpr(function)(*args).jaxpr))


def _names(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for param in equation.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                if isinstance(inner, ClosedJaxpr):
                    yield from _names(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from _names(inner)
