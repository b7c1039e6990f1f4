"""Random numbers in a comparison: PyTorch's models get the numbers that the ensemble drew.

The network is lowered again with all its draws among its outputs. While a model's forward runs, PyTorch's random
operations return these numbers, one after the other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jaxensemble.ensemble import Ensemble
from jaxensemble.errors import RandomnessError
from torch_bridge.lowering.rules.draws import is_draw
from torch_bridge.parity.reference import CannotRun


def can_draw(ensemble: Ensemble, arrays: tuple[Any, ...], *, each: bool = False) -> bool:
    """Returns whether a call with these inputs draws random numbers. With `each`, every member has its own inputs."""
    if not ensemble.rngs:
        return False
    try:
        jax.eval_shape(lambda: ensemble.each(*arrays) if each else ensemble(*arrays))
    except RandomnessError:
        return True
    return False


class Draws:
    """The random numbers that the members of an ensemble drew in its last call, for the models to draw.

    **Arguments:**

    - `models`: copies that nothing else runs. Each gets hooks that take its numbers from here, and copies of it do the
      same. Without models, nothing is drawn, and results stay as they are.
    - `key`: the random key by which the ensemble draws.
    """

    def __init__(self, models: Sequence[nn.Module], key: jax.Array):
        self.key = key
        self.replays = [_Replay() for _ in models]
        for model, replay in zip(models, self.replays, strict=True):
            model.register_forward_pre_hook(replay.begin)
            model.register_forward_hook(replay.end, always_call=True)

    def __bool__(self) -> bool:
        return bool(self.replays)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a call of the ensemble."""
        return {"key": self.key} if self else {}

    def outputs(self, result: Any) -> Any:
        """The outputs of a call, whose draws are kept."""
        if not self:
            return result
        outputs, drawn = result
        for k in range(len(self.replays)):
            self.give(k, drawn)
        return outputs

    def give(self, member: int, drawn: Sequence[jax.Array]) -> None:
        """Gives a member the numbers to draw: its part of arrays `[M, ...]`."""
        self.replays[member].numbers = [np.asarray(array[member]) for array in drawn]

    def forget(self) -> None:
        """Lets the models draw numbers of their own again."""
        for replay in self.replays:
            replay.numbers = None

    def attach(self, models: Sequence[nn.Module]) -> None:
        """Adds hooks to further copies of the models, so that they draw the same numbers."""
        for model, replay in zip(models, self.replays, strict=True):
            model.register_forward_pre_hook(replay.begin)
            model.register_forward_hook(replay.end, always_call=True)


class _Replay(TorchDispatchMode):
    """A mode in which a model's forward draws the given `numbers`."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[np.ndarray] | None = None
        self._waiting: list[np.ndarray] = []
        self._runs = 0

    def __deepcopy__(self, memo: Any) -> "_Replay":
        return self

    def begin(self, model: nn.Module, args: Any) -> None:
        if self.numbers is not None:
            self._waiting = list(self.numbers)
            self._runs += 1
            self.__enter__()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._runs:
            self._runs -= 1
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_dropout.default:  # dropout on GPUs
            x, p, _ = args
            kept = self._next(x.shape, func).to(x.device).bool()
            return x * kept / (1 - p), kept
        if not is_draw(func):
            return func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            target = args[0]
            return target.copy_(self._next(target.shape, func))
        drawn = func(*args, **(kwargs or {}))
        return self._next(drawn.shape, func).to(drawn)

    def _next(self, shape: Any, func: Any) -> Tensor:
        if not self._waiting or self._waiting[0].shape != tuple(shape):
            expected = f"{list(self._waiting[0].shape)}" if self._waiting else "no more numbers"
            raise CannotRun(f"{func} draws {list(shape)} where the ported network draws {expected}")
        return torch.from_numpy(np.array(self._waiting.pop(0)))
