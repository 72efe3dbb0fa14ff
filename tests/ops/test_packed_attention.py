"""Packed attention against a plain float64 softmax, segment by segment: values and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops.attention import packed_attention, packed_attention_with_mask_lengths
from megatron_vlm.ops.segments import plan_buckets

pytestmark = pytest.mark.unit

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference, relative to the largest value of the reference or to 1."""

MIXED = [3, 0, 40, 1, 17, 300, 16, 16, 0, 75]
"""Empty, tiny, equal neighbours, and long enough to be left alone."""


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def reference(
    q: Tensor, k: Tensor, v: Tensor, visible: list[Tensor], scale: float | None = None
) -> Tensor:
    """Softmax attention, one segment and one head at a time; `visible` [queries, keys] each."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q_start = kv_start = 0
    rows = []
    for mask in visible:
        q_part = q[q_start : q_start + mask.shape[0]]
        k_part = k[kv_start : kv_start + mask.shape[1]]
        v_part = v[kv_start : kv_start + mask.shape[1]]
        q_start, kv_start = q_start + mask.shape[0], kv_start + mask.shape[1]
        columns = []
        for head in range(heads):
            shared = head * kv_heads // heads
            weights = torch.exp(q_part[:, head] @ k_part[:, shared].T * scale) * mask
            # Where no key is visible the sum is zero, and so must be the result.
            total = weights.sum(1, keepdim=True).clamp_min(1e-300)
            columns.append(weights / total @ v_part[:, shared])
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)


def self_masks(lengths: list[int], causal: bool) -> list[Tensor]:
    masks = [torch.ones(n, n, dtype=torch.float64) for n in lengths]
    return [mask.tril() for mask in masks] if causal else masks


def tensors(
    dtype: torch.dtype, tokens: tuple[int, int], heads: int, kv_heads: int, dims: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(tokens[0], heads, dims[0], dtype=dtype, requires_grad=True),
        torch.randn(tokens[1], kv_heads, dims[0], dtype=dtype, requires_grad=True),
        torch.randn(tokens[1], kv_heads, dims[1], dtype=dtype, requires_grad=True),
    )


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        largest = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=TOLERANCE[dtype] * largest)


def check(
    lengths: list[int],
    dtype: torch.dtype,
    *,
    causal: bool,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (16, 16),
    scale: float | None = None,
) -> None:
    tokens = sum(lengths)
    inputs = tensors(dtype, (tokens, tokens), heads, kv_heads, dims)
    out = packed_attention(*inputs, bounds(lengths), causal=causal, scale=scale)
    assert out.shape == (tokens, heads, dims[1])
    seed = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, seed)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = reference(*exact, self_masks(lengths, causal), scale)
    expected_gradients = torch.autograd.grad(expected, exact, seed.double())
    assert_close([out, *gradients], [expected, *expected_gradients], dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference_in_every_dtype(dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    check(MIXED, dtype, causal=causal)


@pytest.mark.parametrize("seed", range(12))
def test_equals_reference_on_random_shapes(seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 5, 16, draw.randint(1, 220)]) for _ in range(draw.randint(1, 14))]
    kv_heads = draw.choice([1, 2, 3])
    check(
        [*lengths, 2],
        draw.choice([torch.float64, torch.float32]),
        causal=draw.random() < 0.5,
        heads=kv_heads * draw.choice([1, 2, 4]),
        kv_heads=kv_heads,
        dims=(draw.choice([8, 24, 32]), draw.choice([8, 24, 32])),
        scale=draw.choice([None, 0.3]),
    )


@pytest.mark.parametrize("lengths", [[700], [16] * 40, [8, 8, 5, 8, 8], [0, 0, 7], [1] * 9])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_one_many_equal_and_empty_segments(lengths: list[int], causal: bool) -> None:
    torch.manual_seed(1)
    check(lengths, torch.float64, causal=causal)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_still_send_gradients(lengths: list[int]) -> None:
    inputs = tensors(torch.float32, (0, 0), 4, 2, (8, 16))
    out = packed_attention(*inputs, bounds(lengths), causal=True)
    assert out.shape == (0, 4, 16)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_other_segments_never_enter() -> None:
    """Not-a-number in one segment must stay there, forward and backward, padding included."""
    lengths = [5, 9, 7, 30]
    q, k, v = (torch.randn(51, 2, 8) for _ in range(3))
    for x in (q, k, v):
        x[5:14] = float("nan")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for causal in (True, False):
        out = packed_attention(*inputs, bounds(lengths), causal=causal)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        for x in (out, *gradients):
            assert x[5:14].isnan().all()
            assert not x[:5].isnan().any() and not x[14:].isnan().any()


def test_strided_slices_of_a_fused_projection() -> None:
    torch.manual_seed(2)
    fused = torch.randn(sum(MIXED), 3, 4, 16, dtype=torch.float64)
    q, k, v = fused.unbind(1)
    ours = packed_attention(q, k, v, bounds(MIXED), causal=False)
    assert_close([ours], [reference(q, k, v, self_masks(MIXED, False))], torch.float64)


def test_a_plan_made_in_evaluation_serves_training() -> None:
    """Tensors made in inference mode cannot be saved for a backward pass."""
    plan_buckets.cache_clear()
    lengths = [5, 9, 4]
    q, k, v = tensors(torch.float64, (18, 18), 2, 2, (8, 8))
    with torch.inference_mode():
        packed_attention(q, k, v, bounds(lengths), causal=False)
    packed_attention(q, k, v, bounds(lengths), causal=False).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([5, 6], "number of tokens, 10"), ([12, -2], "must rise"), ([], "number of tokens, 10")],
)
def test_bounds_that_do_not_fit_are_refused(lengths: list[int], message: str) -> None:
    q, k, v = tensors(torch.float32, (10, 10), 2, 2, (8, 8))
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, bounds(lengths), causal=True)


@pytest.mark.parametrize(("heads", "kv_tokens", "value_heads"), [(3, 10, 2), (4, 10, 1), (4, 9, 2)])
def test_shapes_that_do_not_fit_are_refused(heads: int, kv_tokens: int, value_heads: int) -> None:
    q, k = torch.randn(10, heads, 8), torch.randn(kv_tokens, 2, 8)
    v = torch.randn(kv_tokens, value_heads, 8)
    with pytest.raises(ValueError, match=r"got \[10|tokens"):
        packed_attention(q, k, v, bounds([10]), causal=True)


def zigzag(length: int, ranks: int, rank: int) -> Tensor:
    """Places of the tokens that a context-parallel rank holds: one early and one late chunk."""
    chunks = torch.arange(length).chunk(2 * ranks) if length else (torch.arange(0),) * 2 * ranks
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


@pytest.mark.parametrize("gathered", ["natural", "rank_by_rank"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_context_parallel_ranks_together_equal_one(
    dtype: torch.dtype, ranks: int, gathered: str
) -> None:
    """Each rank's zig-zag share of the queries against all keys; key gradients add up."""
    torch.manual_seed(3)
    lengths = [16, 48, 0, 8, 208, 40]
    starts = bounds(lengths)[:-1].tolist()
    inputs = tensors(dtype, (sum(lengths), sum(lengths)), 4, 2, (16, 24))
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = reference(*exact, self_masks(lengths, True))
    seed = torch.randn_like(expected).to(dtype)
    expected_gradients = torch.autograd.grad(expected, exact, seed.double())

    kv_places = [torch.arange(n) for n in lengths]
    if gathered == "rank_by_rank":
        kv_places = [torch.cat([zigzag(n, ranks, r) for r in range(ranks)]) for n in lengths]
    kv_rows = torch.cat([p + s for p, s in zip(kv_places, starts, strict=True)])
    total = [torch.zeros_like(x, dtype=torch.float64) for x in (expected, *exact)]
    for rank in range(ranks):
        q_places = [zigzag(n, ranks, rank) for n in lengths]
        rows = torch.cat([p + s for p, s in zip(q_places, starts, strict=True)])
        q, k, v = inputs
        out = packed_attention_with_mask_lengths(
            q[rows],
            k[kv_rows],
            v[kv_rows],
            bounds([len(p) for p in q_places]),
            bounds(lengths),
            torch.cat(q_places),
            torch.cat(kv_places),
        )
        total[0][rows] = out.detach().double()
        gradients = torch.autograd.grad(out, inputs, seed[rows])
        for sum_, part in zip(total[1:], gradients, strict=True):
            sum_ += part.double()
    assert_close([x.to(dtype) for x in total], [expected, *expected_gradients], dtype)


def test_queries_without_visible_keys_are_zero() -> None:
    """Segments without keys or without queries, and a query before every key."""
    torch.manual_seed(4)
    q_lengths, kv_lengths = [3, 2, 0, 4], [5, 0, 6, 7]
    inputs = tensors(torch.float64, (9, 18), 2, 1, (8, 8))
    q_positions = torch.tensor([4, 0, 2, 7, 8, 1, 0, 3, 9])
    kv_positions = torch.cat([torch.randperm(5), torch.arange(6), torch.arange(2, 9)])
    visible, q_start, kv_start = [], 0, 0
    for q_length, kv_length in zip(q_lengths, kv_lengths, strict=True):
        rows = q_positions[q_start : q_start + q_length]
        columns = kv_positions[kv_start : kv_start + kv_length]
        visible.append((columns[None, :] <= rows[:, None]).double())
        q_start, kv_start = q_start + q_length, kv_start + kv_length
    out = packed_attention_with_mask_lengths(
        *inputs, bounds(q_lengths), bounds(kv_lengths), q_positions, kv_positions
    )
    seed = torch.randn_like(out)
    expected = reference(*inputs, visible)
    assert (out[3:7] == 0).all() and (out[[0, 1, 2, 7, 8]] != 0).all()
    assert_close(
        [out, *torch.autograd.grad(out, inputs, seed)],
        [expected, *torch.autograd.grad(expected, inputs, seed)],
        torch.float64,
    )


def test_positions_and_segments_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(torch.float32, (4, 6), 2, 2, (8, 8))
    places = torch.arange(4), torch.arange(6)
    with pytest.raises(ValueError, match="one place for each of 4 queries and 6 keys"):
        packed_attention_with_mask_lengths(q, k, v, bounds([4]), bounds([6]), *reversed(places))
    with pytest.raises(ValueError, match="same segments"):
        packed_attention_with_mask_lengths(q, k, v, bounds([4]), bounds([2, 4]), *places)


@pytest.mark.parametrize("width", [32, 256, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_every_segment_has_one_place_in_the_plan(seed: int, width: int) -> None:
    draw = random.Random(seed)
    kv_lengths = tuple(draw.choice([0, 8, draw.randint(1, 150)]) for _ in range(30))
    q_lengths = tuple(n // draw.choice([1, 2, 4]) for n in kv_lengths)
    plan = plan_buckets(q_lengths, kv_lengths, width, torch.device("cpu"))
    placed = [segment for group in plan.groups for segment in group]
    assert sorted(placed) == [i for i in range(30) if q_lengths[i] and kv_lengths[i]]
    for i, place in enumerate(plan.places):
        assert (place is None) == (i not in placed)
        assert place is None or plan.groups[place[0]][place[1]] == i
    if width == 32:
        assert len(plan.groups) < len(placed) / 2, "short segments must share kernel calls"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("knows_gqa", [True, False])
def test_torchs_own_is_asked_in_words_it_knows(
    knows_gqa: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 knows no shared keys, later ones do. What it is asked for is computed here."""
    from torch.nn.attention import varlen

    from megatron_vlm.ops import attention

    def plain(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **more):  # type: ignore[no-untyped-def]
        assert more == ({"enable_gqa": True} if knows_gqa else {})
        assert (max_q, max_k) == (17, 17) and cu_q is cu_k
        assert window_size == ((-1, 0) if causal else (-1, -1))
        assert knows_gqa or q.shape[1] == k.shape[1]
        return reference(q, k, v, self_masks([5, 17], causal), scale)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    options = {"window_size", "scale", *(["enable_gqa"] if knows_gqa else [])}
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset(options))
    q, k, v = tensors(torch.float64, (22, 22), 4, 2, (10, 6))
    cu_seqlens = bounds([5, 17])
    found = attention._varlen(q, k, v, (cu_seqlens, cu_seqlens), causal, 0.3, (None, None))
    expected = reference(q, k, v, self_masks([5, 17], causal), 0.3)
    torch.testing.assert_close(found, expected)


def test_varlen_is_told_of_queries_and_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    from megatron_vlm.ops import attention

    def plain(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):  # type: ignore[no-untyped-def]
        assert (max_q, max_k, window_size) == (5, 17, (-1, -1))
        assert (cu_q.tolist(), cu_k.tolist()) == ([0, 5, 9], [0, 7, 24])
        return reference(q, k, v, [torch.ones(5, 7), torch.ones(4, 17)], scale)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset())
    monkeypatch.setattr(attention, "_varlen_fits", lambda q, v: True)
    q, k, v = tensors(torch.float64, (9, 24), 2, 2, (8, 8))
    for longest in (None, None), (5, 17):
        found = packed_attention(
            q,
            k,
            v,
            bounds([5, 4]),
            causal=False,
            max_seqlen=longest[0],
            cu_seqlens_kv=bounds([7, 17]),
            max_seqlen_kv=longest[1],
        )
        expected = reference(q, k, v, [torch.ones(5, 7), torch.ones(4, 17)])
        torch.testing.assert_close(found, expected)


FEWER_QUERIES = [2, 0, 8, 1, 17, 20, 16, 4, 0, 75]
"""Queries of segments whose keys are MIXED: all of some, few or none of others."""


def check_fewer_queries(dtype: torch.dtype, device: str) -> None:
    tokens = (sum(FEWER_QUERIES), sum(MIXED))
    inputs = [x.detach().to(device).requires_grad_() for x in tensors(dtype, tokens, 4, 2, (24, 8))]
    out = packed_attention(
        *inputs,
        bounds(FEWER_QUERIES).to(device),
        causal=False,
        max_seqlen=max(FEWER_QUERIES),
        cu_seqlens_kv=bounds(MIXED).to(device),
        max_seqlen_kv=max(MIXED),
    )
    seed = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, seed)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
    masks = [
        torch.ones(queries, keys, dtype=torch.float64)
        for queries, keys in zip(FEWER_QUERIES, MIXED, strict=True)
    ]
    expected = reference(*exact, masks)
    expected_gradients = torch.autograd.grad(expected, exact, seed.double().cpu())
    assert_close([x.cpu() for x in (out, *gradients)], [expected, *expected_gradients], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fewer_queries_than_keys(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    check_fewer_queries(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fewer_queries_than_keys_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    check_fewer_queries(dtype, "cuda")


def test_bounds_of_keys_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(torch.float64, (3, 5), 2, 2, (8, 8))
    with pytest.raises(ValueError, match="cu_seqlens_kv with a causal mask"):
        packed_attention(q, k, v, bounds([3]), causal=True, cu_seqlens_kv=bounds([5]))
    with pytest.raises(ValueError, match="bounds 1 segments and cu_seqlens_kv 2"):
        packed_attention(q, k, v, bounds([3]), causal=False, cu_seqlens_kv=bounds([2, 3]))
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 5"):
        packed_attention(q, k, v, bounds([3]), causal=False, cu_seqlens_kv=bounds([4]))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_reference_on_a_gpu(dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(5)
    tokens = sum(MIXED)
    inputs = [x.detach().cuda() for x in tensors(dtype, (tokens, tokens), 4, 2, (20, 24))]
    for x in inputs:
        x.requires_grad_()
    out = packed_attention(*inputs, bounds(MIXED).cuda(), causal=causal, max_seqlen=max(MIXED))
    seed = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, seed)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
    expected = reference(*exact, self_masks(MIXED, causal))
    expected_gradients = torch.autograd.grad(expected, exact, seed.double().cpu())
    assert_close([x.cpu() for x in (out, *gradients)], [expected, *expected_gradients], dtype)
