"""Programs compiled for a GPU that is not there, and their contents: kernels, moved arrays, loops and temporaries.

XLA needs the plugin of CUDA for this, and no GPU, driver or library of NVIDIA. It cannot measure: which library runs a
product, and its tiles, are guesses. All counts are those of the program that it would run.
"""

import dataclasses
import functools
import importlib.metadata
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from jaxensemble import Ensemble, Plan, TrainState
from jaxensemble.devices.placement import SHARED, Placement
from jaxensemble.running.compiled import MembersProgram
from jaxensemble.running.finish import FigureSteps, PredictionSteps
from jaxensemble.running.plan import guess_plan
from jaxensemble.running.runner import Arguments, Runner
from jaxensemble.training.data import as_data
from jaxensemble.training.planning import make_step
from jaxensemble.training.step import compile_step, next_state

PLUGIN = "jax-cuda13-plugin"

CARD = Path(__file__).parent.parent / "gpu_programs" / "h200.txtpb"
"""The card to compile for. The file says where its numbers are from."""

_MOVES = frozenset(
    {"concatenate", "convert", "copy", "dynamic-slice", "pad", "reshape", "reverse", "slice", "transpose"}
)
_VIEWS = frozenset({"bitcast", "broadcast", "constant", "get-tuple-element", "parameter", "tuple"})
_INSTRUCTION = re.compile(
    r"^ *(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<step>[a-z][a-z0-9-]*)\((?P<read>[^)]*)\)"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_THUNK = re.compile(r"^(?P<indent> *)\d+: (?P<kind>k\w+) ")
_CONTROL = frozenset({"kCommandBuffer", "kConditional", "kSequential", "kWhile"})


def missing() -> str | None:
    """The reason why nothing can be compiled for a GPU here; None if it can."""
    try:
        version = importlib.metadata.version(PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        return f"{PLUGIN} is not installed: `make gpu-programs` does it"
    return None if version == jax.__version__ else f"{PLUGIN} is {version}, but jax is {jax.__version__}"


@functools.cache
def devices(count: int) -> list[Any]:
    """GPUs that are not there, of one host."""
    name = f"1x1x{count}"
    topology = topologies.get_topology_desc(platform="cuda", topology=name, target_config=CARD.read_text("utf-8"))
    return topology.devices


def placement(members: int, count: int) -> Placement:
    """Members over so many GPUs."""
    return Placement.of(Mesh(np.array(devices(count)), ("members",)), "members", None, members)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a compiled program.

    - `launches`: kernels, and calls of libraries, that one run starts. In loops, those of one round.
    - `graphs`: CUDA graphs. `outside`: launches that are in none of them.
    - `loops`: loops driven by the host.
    - `moved`: kernels that do nothing but move an array at least as large as the smallest kernel of all members, and
      `moved_weights`: those which read a weight.
    - `temporaries`: their bytes.
    """

    launches: int
    graphs: int
    outside: int
    loops: int
    moved: list[str]
    moved_weights: list[str]
    temporaries: int
    text: str = dataclasses.field(repr=False)
    thunks: str = dataclasses.field(repr=False)


def contents_of(compile_with: Callable[[dict[str, Any]], Any], smallest: int) -> Contents:
    """Compiles a program with options that write out what it starts, and reads it."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_with({"xla_gpu_autotune_level": "0", "xla_dump_to": folder})
        # The second file has CUDA graphs, and is there if there are any.
        thunks = sorted(Path(folder).glob("*.thunk_sequence*.txt"), key=lambda path: len(path.name))[-1].read_text(
            "utf-8"
        )
    text = compiled.as_text()
    found = [match.groupdict() for match in map(_THUNK.match, thunks.splitlines()) if match]
    kinds = [thunk["kind"] for thunk in found]
    launches = [thunk for thunk in found if thunk["kind"] not in _CONTROL]
    moved = [*_moved(text, smallest)]
    return Contents(
        launches=len(launches),
        graphs=kinds.count("kCommandBuffer"),
        outside=_outside(found),
        loops=kinds.count("kWhile"),
        moved=[name for name, _ in moved],
        moved_weights=[name for name, is_weight in moved if is_weight],
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        text=text,
        thunks=thunks,
    )


def forward(
    ensemble: Ensemble,
    inputs: tuple[Any, ...],
    *,
    each: bool = False,
    plan: Plan | None = None,
    gpus: int = 1,
    finish: Any = None,
) -> Contents:
    """The contents of the program of a call, as an H200 gets it: with the guessed plan, and with scales folded.

    With `gpus`, members are over so many of them, and the program is that of one.
    """
    given = Arguments.of(ensemble.network, inputs, {}, None, each=each)
    workload = Runner(ensemble.state, ensemble.network, None).workload(given)
    spread = placement(len(ensemble), gpus) if gpus > 1 else None
    call = dataclasses.replace(workload.call, platform="gpu", placement=spread)
    workload = dataclasses.replace(workload, device=devices(gpus)[0], call=call)
    call = workload.with_plan(guess_plan(workload.demand, math.inf) if plan is None else plan)
    call = dataclasses.replace(call, fold=True, finish=finish)
    return contents_of(lambda options: MembersProgram(workload, call, options).run, _smallest(ensemble))


def prediction(ensemble: Ensemble, inputs: tuple[Any, ...], figure: str, *, gpus: int) -> Contents:
    """The contents of a program that gives a figure of the prediction of members over so many GPUs."""
    steps = PredictionSteps.of("classification", {}, ensemble.network)
    assert steps is not None
    finish = FigureSteps(steps, (figure,))
    return forward(ensemble, inputs, gpus=gpus, finish=finish)


def training_step(ensemble: Ensemble, inputs: tuple[Any, ...], *, each: bool = False, gpus: int = 1) -> Contents:
    """The contents of a step of stochastic gradient descent with momentum, as an H200 gets it."""
    state = TrainState.create(ensemble, optax.sgd(0.1, momentum=0.9), jax.random.key(0))
    rows = inputs[0].shape[:2] if each else inputs[0].shape[:1]
    data, _ = as_data(ensemble, inputs, np.zeros(rows, "int32"), None, each=each)
    step = make_step(state, data, None, cross_entropy, each=each, plan=Plan())
    spread = placement(len(ensemble), gpus) if gpus > 1 else None
    step = dataclasses.replace(step, call=dataclasses.replace(step.call, platform="gpu", placement=spread))
    shared: Any = SingleDeviceSharding(devices(1)[0]) if spread is None else spread.sharding(SHARED)
    stacked: Any = shared if spread is None else spread.sharding(spread.stacked)

    def place(tree: Any, here: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)

    state = place(state, shared).map_members(lambda tree: place(tree, stacked))
    lowered = compile_step(next_state, step).lower(
        state, place(data, stacked if each else shared), None, None, step=step
    )
    return contents_of(lowered.compile, _smallest(ensemble))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _smallest(ensemble: Ensemble) -> int:
    """The bytes of the smallest kernel: a parameter with two axes or more beside the members."""
    return min(leaf.nbytes for leaf in jax.tree.leaves(ensemble.params) if leaf.ndim > 2)


def _outside(thunks: list[dict[str, str]]) -> int:
    """The launches that are in no CUDA graph."""
    count, graph = 0, None
    for thunk in thunks:
        depth = len(thunk["indent"])
        if graph is not None and depth <= graph:
            graph = None
        if thunk["kind"] == "kCommandBuffer":
            graph = depth
        elif thunk["kind"] not in _CONTROL and graph is None:
            count += 1
    return count


def _moved(text: str, smallest: int) -> Iterator[tuple[str, bool]]:
    """The kernels that only move an array of so many bytes, and whether they read an array of the program's inputs."""
    steps: dict[str, set[str]] = {}
    main: dict[str, dict[str, str]] = {}
    inside = ""
    for line in text.splitlines():
        if (start := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line)) is not None:
            inside = "" if line.startswith("ENTRY") else start[1]
        elif (match := _INSTRUCTION.match(line)) is not None:
            steps.setdefault(inside, set()).add(match["step"])
            if not inside:
                called = re.search(r"calls=%([\w.-]+)", line)
                main[match["name"]] = match.groupdict() | {"calls": called[1] if called else ""}
    for name, one in main.items():
        run = steps[one["calls"]] if one["step"] == "fusion" else {one["step"]}
        if run & _MOVES and run <= _MOVES | _VIEWS and _bytes(one["shape"]) >= smallest:
            yield f"{name} {one['shape']}", any(_is_weight(main, read) for read in _operands(one))


def _operands(instruction: dict[str, str]) -> list[str]:
    return re.findall(r"%([\w.-]+)", instruction["read"])


def _is_weight(main: dict[str, dict[str, str]], name: str) -> bool:
    while main[name]["step"] == "bitcast":
        (name,) = _operands(main[name])
    return main[name]["step"] == "parameter" and name.startswith(("arrays", "state"))


def _bytes(shape: str) -> int:
    """The bytes of arrays, as XLA writes their shapes.

    >>> _bytes("(f32[2,3]{1,0}, bf16[4])"), _bytes("pred[]")
    (32, 1)
    """
    found = _SHAPE.findall(shape)
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(int(bits or 8) // 8, 1) for _, bits, sizes in found
    )
