"""Embeddings."""

import torch

from jaxensemble.network.network import Arg
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import settled_value
from torch_bridge.lowering.dtypes import dtype_argument, param_dtype
from torch_bridge.lowering.layouts.layout import Layout, new_group, plain_layout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.embedding.default")
def embedding(
    b: Builder,
    weight: Value,
    indices: Operand,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:
    """Rows of a table. An index out of range, which PyTorch refuses, gives NaN."""
    return _rows(b, b.value(weight), indices, padding_idx, scale_grad_by_freq)


def _rows(b: Builder, weight: Value, indices: Operand, padding_idx: int, by_frequency: bool) -> Value:
    """Rows of a table, by a layer where one can hold the table."""
    count, features = (int(size) for size in weight.shape)
    options: dict[str, Arg] = {"num_embeddings": count, "features": features}
    extra: dict[str, Arg] = {} if padding_idx < 0 else {"padding_idx": padding_idx}
    extra |= {"scale_grad_by_freq": True} if by_frequency else {}
    type_ = "layers.Embed" if extra else "nnx.Embed"
    path = b.claim(type_, options | extra | param_dtype(weight), {"embedding": (weight, None)})
    indices = settled_value(b, b.value(indices))  # after the claim: constants have no place within a layer
    if path is not None:
        rows = b.emit(f"layer:{path}", indices.expr)
    else:
        rows = b.emit("ops.embed", b.plain(weight).expr, indices.expr, **extra)
    last, layout = new_group(features), indices.layout
    return b.laid(rows, Layout((*layout.dims, last), (*layout.axes, last)), weight.dtype)


@register("aten.one_hot.default")
def one_hot(b: Builder, x: Value, num_classes: int = -1) -> Value:
    """One-hot vectors. An index out of range, which PyTorch refuses, gives zeros."""
    if num_classes < 0:
        raise b.unsupported("the number of classes depends on the values; pass num_classes")
    x = settled_value(b, x)
    last = new_group(num_classes)
    expr = b.emit("nnx.one_hot", x.expr, num_classes, dtype=dtype_argument(b, torch.int64))
    return b.laid(expr, Layout((*x.layout.dims, last), (*x.layout.axes, last)))


@register("aten.embedding_bag.padding_idx", "aten.embedding_bag.default")
def embedding_bag(
    b: Builder,
    weight: Value,
    indices: Operand,
    offsets: Operand,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Operand | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Value, ...]:
    """Bags in one line, beginning at `offsets`, or the rows of a matrix, which PyTorch flattens."""
    if scale_grad_by_freq:
        raise b.unsupported("scale_grad_by_freq is not carried for embedding bags; set it to False")
    rows = _rows(b, b.value(weight), indices, -1, False)
    args: list[Arg] = [b.plain(rows).expr, b.plain(offsets).expr, ("sum", "mean", "max")[mode]]
    options: dict[str, Arg] = {}
    if per_sample_weights is not None:
        options["weights"] = b.plain(per_sample_weights).expr
    if include_last_offset:
        options["include_last_offset"] = True
    if padding_idx is not None:
        left_out = padding_idx % int(weight.shape[0])
        options["mask"] = b.plain(b.elementwise("!=", indices, left_out, dtype=torch.bool)).expr
    return (b.laid(b.emit("ops.bags", *args, **options), plain_layout(b.result_shape), weight.dtype),)
