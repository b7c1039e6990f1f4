"""Scaled dot-product attention.

Heads are stored before features, as in Flax. PyTorch's transposes before and after the operation cost nothing.
"""

from collections.abc import Sequence

from jaxensemble.network.network import Arg, Ref, Var
from torch_bridge.lowering.builder import Builder
from torch_bridge.lowering.dims import relabel_dims, settled_value
from torch_bridge.lowering.layouts.layout import Group, Layout, new_group
from torch_bridge.lowering.rules.dropout import write_out_dropout
from torch_bridge.lowering.table import register
from torch_bridge.lowering.values import Operand, Value


@register("aten.scaled_dot_product_attention.default")
def scaled_dot_product_attention(
    b: Builder,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p:
        raise b.unsupported(
            f"dropout of attention weights in evaluation mode, dropout_p={dropout_p}; pass "
            "`dropout_p=self.p if self.training else 0.0`, as PyTorch's documentation asks for"
        )
    arrays, mask, options = _prepare_operands(b, (query, key, value), attn_mask, is_causal, scale, enable_gqa)
    return _attention_result(b, b.emit("ops.attention", *arrays, *mask, **options), enable_gqa)


@register("torch_bridge.attention.default")
def attention_with_dropout(
    b: Builder,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dropout_p: float,
    mode: str,
) -> Value:
    """Attention whose weights are dropped in training, as elements of `[..., H, L, S]`."""
    arrays, mask, options = _prepare_operands(b, (query, key, value), attn_mask, is_causal, scale, enable_gqa)
    weights = b.emit("ops.attention_weights", *arrays[:2], *mask, **options)
    if b.draw_mode is None:
        path = b.stateless_layer("nnx.Dropout", {"rate": dropout_p}, "attention_dropout")
        weights = b.emit(f"layer:{path}", weights)
    elif b.draw_mode == "training":
        shape = (*b.result_shape[:-1], b.value(key).shape[-2])
        weights = b.plain(write_out_dropout(b, b.new(weights, shape), dropout_p)).expr
    return _attention_result(b, b.emit("ops.attended", weights, arrays[2]), enable_gqa)


Prepared = tuple[list[Ref | Var], list[Ref | Var], dict[str, Arg]]
"""Query, key and value; a mask, if there is one; options."""


def _prepare_operands(
    b: Builder,
    operands: Sequence[Operand],
    attn_mask: Operand | None,
    is_causal: bool,
    scale: float | None,
    shared: bool,
) -> Prepared:
    """Query, key, value and mask in the arrangement of `ops.attention`, and its options."""
    arrays = [_heads_before_features(b, operand, shared) for operand in operands]
    mask = [] if attn_mask is None else [_add_heads(b, attn_mask, arrays[0].ndim > 3 or shared)]
    options: dict[str, Arg] = {"is_causal": True} if is_causal else {}
    options |= {} if scale is None else {"scale": scale}
    return [array.expr for array in arrays], mask, options


def _attention_result(b: Builder, expr: Ref, shared: bool) -> Value:
    """The result of attention, with PyTorch's dimensions."""
    dims = tuple(new_group(size) for size in b.result_shape)
    return b.laid(expr, Layout(dims, _axes(dims, shared)))


def _add_heads(b: Builder, mask: Operand, heads: bool) -> Ref | Var:
    """A mask with a dimension for heads, where queries have one."""
    value = b.plain(mask)
    dims = value.layout.dims
    return b.plain(value if heads or len(dims) < 3 else relabel_dims(value, (*dims[:-2], (), *dims[-2:]))).expr


def _heads_before_features(b: Builder, operand: Operand, shared: bool) -> Value:
    """`[..., H, L, E]` stored `[..., L, H, E]`. Without heads, there is one head."""
    value = settled_value(b, operand)
    return b.arrange(value, _axes(value.layout.dims, shared))


def _axes(dims: Sequence[Group], shared: bool) -> tuple[Group, ...]:
    """The stored order of dimensions. A single dimension before `[L, E]` is a batch, unless heads share keys."""
    *batch, length, features = dims
    heads = batch.pop() if len(batch) > 1 or (batch and shared) else ()
    return (*batch, length, heads, features)
