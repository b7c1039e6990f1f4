"""Parts of JAX and Flax that are not public, or that differ from version to version.

Tried with JAX 0.10.2 and Flax 0.12.8 (Python 3.11), JAX 0.11.2 and Flax 0.12.12 (3.12), JAX 0.12.0 and Flax 0.12.12
(3.12 and 3.13). `pyproject.toml` admits no JAX beyond these minors: add the next one once `make test` passes with it.

Before JAX 0.11, a program is a `Jaxpr`, or a `ClosedJaxpr` with its constants. Since 0.11 both are one class, whose
attribute `jaxpr` is the program itself. So no code asks which of the two classes a program has: both have steps, inputs
and outputs (`eqns`, `invars`, `constvars`, `outvars`), and `constants` returns the constants.
"""

from collections.abc import Sequence
from typing import Any

from flax.nnx.graphlib import LeafAttr, NodeAttr, NodeDef, NodeRef, VariableDef
from jax._src.config import trace_context
from jax._src.core import trace_state_clean
from jax.core import Tracer
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.layout import Format, Layout
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

__all__ = [
    "Format",
    "Jaxpr",
    "JaxprEqn",
    "Layout",
    "LeafAttr",
    "Literal",
    "NodeAttr",
    "NodeDef",
    "NodeRef",
    "Program",
    "Tracer",
    "Var",
    "VariableDef",
    "broadcast_one_to_all",
    "constants",
    "is_program",
    "jaxpr_as_fun",
    "replace_steps",
    "reset_compilation_cache",
    "run_step",
    "scan_counts",
    "trace_context",
    "trace_state_clean",
    "traced_function",
]

Program = ClosedJaxpr | Jaxpr


def is_program(value: Any) -> bool:
    """Returns whether a parameter of a step is a program."""
    return isinstance(value, ClosedJaxpr | Jaxpr)


def constants(program: Any) -> Sequence[Any]:
    """The values of a program's `constvars`; empty for a program without its constants.

    >>> import jax, numpy as np
    >>> program = jax.make_jaxpr(lambda x: x + np.arange(3))(1)
    >>> [value.tolist() for value in constants(program)]
    [[0, 1, 2]]
    """
    return getattr(program, "consts", ())


def replace_steps(program: Any, steps: Sequence[JaxprEqn]) -> Any:
    """Returns the program with other steps and the same constants."""
    if getattr(program, "jaxpr", program) is program:
        return program.replace(eqns=steps)
    return program.replace(jaxpr=program.jaxpr.replace(eqns=steps))


def traced_function(program: Any) -> str:
    """The function that a program was traced from, and its place: `silu at /.../jax/nn/functions.py:60`."""
    return program.debug_info.func_src_info


def scan_counts(step: JaxprEqn) -> tuple[int, int]:
    """Counts the operands of a `scan` that are the same in every step, and those that it carries from step to step.

    The scan splits all further operands along their first axis.

    >>> import jax
    >>> weighted = lambda x, w: jax.lax.scan(lambda total, row: (total * w + row, None), x[0], x)
    >>> program = jax.make_jaxpr(weighted)(jax.numpy.ones((2, 3)), 2.0)
    >>> scan_counts(program.eqns[-1])
    (1, 1)
    """
    if "ft_in" in step.params:  # since JAX 0.11
        constants, carried, _ = map(len, step.params["ft_in"].unpack())
        return constants, carried
    return step.params["num_consts"], step.params["num_carry"]


def reset_compilation_cache() -> None:
    """Makes JAX look at its settings of the cache of compiled programs again."""
    compilation_cache.reset_cache()


def run_step(step: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs one step of a program, and returns its results.

    >>> import jax
    >>> run_step(jax.make_jaxpr(jax.numpy.sin)(0.0).eqns[0], [0.0])
    [Array(0., dtype=float32, weak_type=True)]
    """
    given = step.primitive.get_bind_params(step.params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    with step.ctx.manager:  # settings, such as 64-bit types, that held where the step was traced
        results = step.primitive.bind(*functions, *operands, **params)
    return results if step.primitive.multiple_results else [results]
