"""Settings of XLA's compiler that plans choose, by device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxensemble.errors import InputError

COMPILERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cpu": {"eigen": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}},
    "gpu": {"graphs": {"xla_gpu_graph_min_graph_size": 1}},
}
"""Options of XLA by JAX's name of the platform and the name in a plan.

XLA gives products, convolutions and reductions on CPUs to the library YNNPACK. Under `eigen` products and convolutions
go to Eigen, which is faster with most sizes, and far faster with gradients: `make bench-lowering` measures both.

On GPUs XLA launches five kernels or more as one CUDA graph; under `graphs` fewer, too, as `make gpu-programs` shows. It
was not measured on a GPU yet, so only `tune` tries it.
"""


def compiler_names() -> list[str]:
    """Returns the names that are known on any platform."""
    return [name for known in COMPILERS.values() for name in known]


def compiler_options(name: str | None, platform: str) -> dict[str, Any]:
    """Returns XLA's options for the name in a plan.

    **Raises:** `InputError` for a name that the platform, or this version of XLA, does not have.

    >>> compiler_options(None, "cpu")
    {}
    """
    if name is None:
        return {}
    options = COMPILERS.get(platform, {}).get(name)
    if options is None or not _is_known(tuple(options.items())):
        known = ", ".join(map(repr, COMPILERS.get(platform, {}))) or "none"
        reason = f"on {platform} there are {known}" if options is None else f"JAX {jax.__version__} lacks it"
        raise InputError(f"`compiler` of a plan is {name!r}, but {reason}: leave it out")
    return dict(options)


def has_compiler(name: str, platform: str) -> bool:
    """Returns whether a platform, and this version of XLA, has the options of a name."""
    options = COMPILERS.get(platform, {}).get(name)
    return options is not None and _is_known(tuple(options.items()))


@functools.cache
def _is_known(options: tuple[tuple[str, Any], ...]) -> bool:
    """Returns whether XLA takes options: it refuses a program that is compiled with one it does not know."""
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compile_with(function: Callable[..., Any], name: str | None, platform: str, static: str) -> Callable[..., Any]:
    """Returns `jax.jit` of a function under the settings that a plan names; the same object for equal arguments.

    `static` is the name of the argument that is a part of the program.
    """
    return _jit(function, static, tuple(compiler_options(name, platform).items()))


@functools.cache
def _jit(function: Callable[..., Any], static: str, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=(static,), compiler_options=dict(options) or None)
