"""Signs of eigenvectors and singular vectors, which each library chooses for itself.

PyTorch and XLA call two builds of LAPACK on the CPU, and cuSOLVER in two ways on GPUs. Half of the signs differ.
Networks seldom depend on the signs: they compute a function of a matrix, or fix the signs themselves.
"""

import copy
import operator
import zlib
from typing import Any

import torch
from torch import Tensor, fx, nn

from jaxensemble.errors import UnsupportedError
from torch_bridge.compat import TorchDispatchMode, pytree
from torch_bridge.graph.examples import Arguments
from torch_bridge.graph.nodes import source_line
from torch_bridge.members.constant_weights import randomise_constants

_ATEN = torch.ops.aten
_VECTORS: dict[Any, tuple[int, ...]] = {
    _ATEN.linalg_eigh.default: (1,),
    _ATEN._linalg_eigh.default: (1,),
    _ATEN.linalg_svd.default: (0, 2),
    _ATEN._linalg_svd.default: (0, 2),
}
"""Operations, and the numbers of the results whose signs have no meaning."""


def check_signs(model: nn.Module, graph: fx.Graph, inputs: Arguments) -> None:
    """Checks that a forward with eigenvectors or singular vectors gives the same outputs for other signs.

    **Raises:** `UnsupportedError` if the outputs differ.
    """
    found = [node for node in graph.nodes if _is_used(node)]
    if not found:
        return
    model = copy.deepcopy(model).eval()
    randomise_constants(model, seed=0)  # a last layer of zeros would hide all layers before it
    first, second = (_outputs(model, inputs, seed) for seed in (0, 1))
    if not all(map(_is_close, first, second)):
        where = "; ".join(dict.fromkeys(filter(None, map(source_line, found))))
        raise UnsupportedError(
            f"{type(model).__name__} depends on the signs of eigenvectors or singular vectors, which PyTorch and XLA "
            f"choose differently{f' ({where})' if where else ''}. Fix them, as in v = torch.where(v.sum(-2, "
            "keepdim=True) < 0, -v, v), or compute a function of the matrix: v @ torch.diag_embed(f(w)) @ v.mT."
        )


def _is_used(node: fx.Node) -> bool:
    results = _VECTORS.get(node.target, ())
    return any(user.args[1] in results and user.users for user in node.users if user.target is operator.getitem)


def _outputs(model: nn.Module, inputs: Arguments, seed: int) -> list[Tensor]:
    copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _OtherSigns(seed):
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(copies.call(model)) if isinstance(leaf, Tensor)]


def _is_close(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point() and not first.is_complex():
        return bool(torch.equal(first, second))
    finite = torch.isfinite(first) & torch.isfinite(second)
    size = first[finite].abs().max() if finite.any() else torch.ones(())
    limit = float(size) * torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=0, atol=limit, equal_nan=True)


class _OtherSigns(TorchDispatchMode):
    """Vectors with random signs, or with random phases where they are complex.

    Singular vectors beyond the rank are rotated: they are not determined by the matrix.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _ATEN._linalg_eigh.default and result[1].numel():
            values, vectors = result
            return values, vectors * _phases(self._generator(values), values, vectors)
        if func is _ATEN._linalg_svd.default and result[0].numel():
            u, s, vt = result
            generator, rank = self._generator(s), s.shape[-1]
            phases = _phases(generator, s, u)
            u = torch.cat([u[..., :rank] * phases, _turn_columns(generator, u[..., rank:])], -1)
            vt = torch.cat([vt[..., :rank, :] * phases.mH, _turn_columns(generator, vt[..., rank:, :].mT).mT], -2)
            return u, s, vt
        return result

    def _generator(self, values: Tensor) -> torch.Generator:
        """A generator seeded by the matrices: the same matrices get the same signs at every call."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(values.cpu().contiguous().numpy().tobytes()))


def _phases(generator: torch.Generator, values: Tensor, vectors: Tensor) -> Tensor:
    """A sign or phase for each vector, `[..., 1, k]`."""
    angle = torch.rand((*values.shape[:-1], 1, values.shape[-1]), generator=generator).to(vectors.device)
    if vectors.is_complex():
        return torch.exp(2j * torch.pi * angle).to(vectors.dtype)
    return (angle < 0.5).to(vectors.dtype) * 2 - 1


def _turn_columns(generator: torch.Generator, columns: Tensor) -> Tensor:
    """The columns, rotated at random within their span."""
    count = columns.shape[-1]
    turn = torch.linalg.qr(torch.randn((count, count), generator=generator, dtype=torch.float64))[0]
    return columns @ turn.to(columns)
