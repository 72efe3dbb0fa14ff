"""What is compared of two programs' logits, and what is too close to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlm.data.pictures import decode_picture
from megatron_vlm.models.language.router import SigmoidRouter
from megatron_vlm.release import verification
from megatron_vlm.release.trainer_logits import Scored, choice_margin
from megatron_vlm.release.verification import VerificationError

pytestmark = pytest.mark.unit


def _choices(scores: torch.Tensor, top_k: int, groups: tuple[int, int] | None) -> torch.Tensor:
    if groups is not None:
        scores = SigmoidRouter._within_groups(scores, *groups)
    return scores.topk(top_k, dim=-1).indices.sort(dim=-1).values


@pytest.mark.parametrize("groups", [None, (4, 2), (4, 4)])
def test_no_smaller_change_than_the_margin_chooses_otherwise(
    groups: tuple[int, int] | None,
) -> None:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 16, generator=draw, dtype=torch.float64)
    bias = torch.randn(16, generator=draw, dtype=torch.float64) * 0.1
    router: Any = SimpleNamespace(
        gating=lambda hidden: hidden,
        expert_bias=bias,
        top_k=4,
        groups=groups,
        _within_groups=SigmoidRouter._within_groups,
    )
    margin = choice_margin(router, logits.unsqueeze(1))
    assert margin.shape == (64,) and bool((margin > 0).all())
    scores = torch.sigmoid(logits) + bias
    before = _choices(scores, 4, groups)
    differed = 0
    for _ in range(300):
        noise = torch.rand(64, 16, generator=draw, dtype=torch.float64) * 2 - 1
        # A group's score is the sum of two experts': four changes tell two of them apart.
        small = scores + noise * margin.unsqueeze(1) * 0.2499
        assert torch.equal(_choices(small, 4, groups), before)
        large = scores + noise * margin.unsqueeze(1) * 8
        differed += int((_choices(large, 4, groups) != before).any())
    assert differed > 250


def test_all_experts_are_no_choice() -> None:
    router: Any = SimpleNamespace(
        gating=lambda hidden: hidden, expert_bias=torch.zeros(3), top_k=3, groups=None
    )
    assert choice_margin(router, torch.zeros(2, 1, 3)).tolist() == [float("inf")] * 2


def test_rows_are_fixed_and_hold_no_special_tokens() -> None:
    usable = list(range(5, 300))
    rows = verification._rows(usable, 1000)
    assert rows == verification._rows(usable, 1000)
    assert [len(row) for row in rows] == [16] * 8
    ids = {token for row in rows for token in row}
    assert ids <= set(usable) and len(ids) > 100
    assert [len(row) for row in verification._rows([7], 3)] == [3] * 8


def test_the_picture_is_one() -> None:
    pixels = decode_picture(verification.synthetic_picture())
    assert pixels.shape == (61, 90, 3) and len(set(pixels[:, :, 0].flat)) > 30
    assert verification.synthetic_picture() == verification.synthetic_picture()


def _compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, theirs: torch.Tensor, sure: list[bool]
) -> verification.Verification:
    (tmp_path / "config.json").write_text("{}")
    mine = torch.tensor([[1.0, -4.0], [2.0, 0.0], [0.5, 1.0], [3.0, 3.0]])
    scored = [Scored([1, 2, 3, 4], mine, torch.tensor(sure))]
    monkeypatch.setattr(verification, "trainer_logits", lambda *_: scored)
    answer = ([([1, 2, 3, 4], mine + theirs)], "5.23.0")
    monkeypatch.setattr(verification, "_their_logits", lambda *_: answer)
    return verification.verify(tmp_path, tmp_path, "keep", "name")


def test_the_largest_difference_over_the_largest_logit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change = torch.zeros(4, 2)
    change[0, 0] = 4e-5
    found = _compare(monkeypatch, tmp_path, change, [True] * 4)
    assert found.max_relative_difference == pytest.approx(1e-5, rel=0.05)
    assert (found.positions, found.compared, found.pictures) == (4, 4, 0)
    change[1, 1] = 5e-5
    with pytest.raises(VerificationError, match=r"name: its logits .* differ .* by 2\.5e-05"):
        _compare(monkeypatch, tmp_path, change, [True] * 4)
    # What was unsure is not held against it.
    found = _compare(monkeypatch, tmp_path, change, [True, False, False, False])
    assert found.compared == 1


def test_nothing_to_compare_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="cannot be verified"):
        _compare(monkeypatch, tmp_path, torch.zeros(4, 2), [False] * 4)


def test_a_number_that_is_none_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change = torch.zeros(4, 2)
    change[2, 0] = float("nan")
    with pytest.raises(VerificationError, match="differ"):
        _compare(monkeypatch, tmp_path, change, [True] * 4)


def test_other_tokens_are_a_difference(tmp_path: Path) -> None:
    scored = Scored([1, 2], torch.ones(2, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(VerificationError, match="makes other tokens"):
        verification._differences(scored, ([1, 3], torch.ones(2, 3)), "name")
    # An embedding may have more rows than the tokenizer has tokens.
    assert verification._differences(scored, ([1, 2], torch.ones(2, 5)), "name") == [0.0, 0.0]
