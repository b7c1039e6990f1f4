"""PyTorch's own operator database (torch.testing._internal): values and gradients in float64, many operators at once.

One sample of some dozens of operators; all of them, each with up to three, among the slow tests. `make operators`
writes the outcome of each into `docs/coverage.md`.
"""

import pytest

from benchmarks.zoo import operators, outcomes, samples

ENTRIES = samples.entries()
RECORDED = outcomes.load()

TOGETHER = {
    "elementwise": """
        abs acos add addcdiv addcmul angle asinh atan2  ceil clamp complex copysign cos digamma
        div.no_rounding_mode erf erfinv exp expm1 float_power floor fmax fmin fmod frac heaviside hypot i0 igamma
        isfinite ldexp lerp lgamma log1p logaddexp logit maximum nan_to_num nextafter polygamma.polygamma_n_1 pow
        rad2deg reciprocal remainder round rsqrt sigmoid sign sinc special.i1e special.ndtr special.xlog1py
        special.zeta tanh trunc where xlogy
    """,
    "reduced-and-ordered": """
        all amax aminmax any argmax argsort count_nonzero cummax cumprod cumsum dist kthvalue logcumsumexp logsumexp
        max.reduction_with_dim mean median mode msort nanmean nanmedian nansum norm.fro prod quantile sort std sum
        topk trace var var_mean
    """,
    "shaped-and-indexed": """
        block_diag broadcast_to cat chunk column_stack diag diag_embed diagonal diff expand flatten flip gather
        index_add index_put index_reduce.amax index_select kron linalg.diagonal masked_fill masked_scatter
        meshgrid.list_of_tensors movedim narrow permute put repeat reshape roll rot90 scatter scatter_add
        scatter_reduce.mean select slice_scatter split squeeze stack take_along_dim tile transpose tril unfold
        unflatten unsqueeze
    """,
    "networks": """
        addmm baddbmm bmm cdist einsum matmul nn.functional.avg_pool2d
        nn.functional.conv2d nn.functional.conv_transpose1d nn.functional.cosine_similarity
        nn.functional.cross_entropy nn.functional.embedding nn.functional.gelu nn.functional.glu
        nn.functional.grid_sample nn.functional.huber_loss nn.functional.interpolate.bilinear nn.functional.layer_norm
        nn.functional.max_unpool2d nn.functional.pad.reflect nn.functional.pdist nn.functional.prelu
        nn.functional.scaled_dot_product_attention nn.functional.softplus torch.ops.aten._safe_softmax.default
    """,
}
"""Operators that are ported in one module."""


@pytest.mark.thinned
@pytest.mark.parametrize("group", TOGETHER)
def test_operators_in_one_module(group: str) -> None:
    given = [samples.samples_of(ENTRIES[name], 1)[0] for name in TOGETHER[group].split() if name in ENTRIES]
    assert operators.judged(given) == ("exact", "")


def test_what_is_recorded_is_the_database() -> None:
    """The recorded database is PyTorch 2.13's; other versions have a few more or less operators."""
    assert len(ENTRIES.keys() & RECORDED.keys()) > 640
    assert {name for names in TOGETHER.values() for name in names.split()} <= RECORDED.keys()


def test_nothing_is_wrong_and_nothing_crashes() -> None:
    assert [outcome for outcome in RECORDED.values() if outcome.status in ("wrong", "crashed")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ENTRIES)
def test_operator(name: str) -> None:
    found = operators.outcome(name, ENTRIES[name])
    assert found.status not in ("wrong", "crashed"), found.reason
    if name in RECORDED:
        assert outcomes.STATUSES.index(found.status) <= outcomes.STATUSES.index(RECORDED[name].status), found.reason
