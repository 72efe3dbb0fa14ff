"""The logits of a checkpoint by our own engine, in float32, with exactly the released weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.chat import read_template
from megatron_vlm.checkpoint.folder import TOKENIZER
from megatron_vlm.checkpoint.stored import StoredTensors
from megatron_vlm.config import load_recipe
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.engine.routers import routers
from megatron_vlm.evaluation.generate import Answerer, Question
from megatron_vlm.models.hf.tensors import EXPERT_BIAS
from megatron_vlm.models.language.router import SigmoidRouter
from megatron_vlm.release.dtypes import MAIN_WEIGHTS

SURE = 1e-5
"""Difference of two experts' scores, of at most some 1, below which their order is not sure between
two programs in float32. Our choice."""

MakeRows = Callable[[list[int], int], list[list[int]]]


@dataclass(frozen=True)
class Scored:
    """One prompt and what follows each of its tokens."""

    ids: list[int]
    logits: torch.Tensor
    """`[tokens, vocabulary]`, float32."""
    sure: torch.Tensor
    """`[tokens]` bool: whether every choice of experts up to there is sure."""


def trainer_logits(
    checkpoint: Path, dtype: str, make_rows: MakeRows, question: str, picture: bytes | None
) -> list[Scored]:
    """Logits of some rows of ids, and of a question with or without a picture.

    Runs in this process, on its first GPU if it has one, and leaves its process group again.

    Args:
        checkpoint: of any layout.
        dtype: what was released: weights are loaded finer, or rounded, as that was.
        make_rows: rows of ids from the usable ids and the longest row.
        question: comes last.
        picture: stands before the question; an encoded file.
    """
    config = load_recipe(checkpoint / "config.yaml", ["training.precision=fp32"])
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    with Answerer(config, tokenizer, checkpoint, read_template(checkpoint)) as answerer:
        _as_released(answerer, checkpoint, dtype)
        special = set(asdict(tokenizer.special_ids).values())
        usable = [i for i in range(tokenizer.vocab_size) if i not in special]
        rows = make_rows(usable, config.model.language.max_position_embeddings - 1)
        pictures = () if picture is None else (picture,)
        margins: list[torch.Tensor] = []
        for router in routers(list(answerer.model.chunks)):
            router.register_forward_hook(
                lambda router, inputs, _: margins.append(choice_margin(router, inputs[0]).cpu())
            )
        prompts: list[Question | list[int]] = [*rows, Question(question, pictures)]
        found = answerer.logits(prompts)
    lengths = [len(ids) for ids, _ in found]
    nearest = torch.full((sum(lengths),), torch.inf)
    for margin in margins:
        nearest = torch.minimum(nearest, margin.float())
    return [
        # What follows an unsure token has seen it.
        Scored(ids, logits.float(), (part.cummin(dim=0).values > SURE))
        for (ids, logits), part in zip(found, nearest.split(lengths), strict=True)
    ]


@torch.no_grad()
def choice_margin(router: SigmoidRouter, hidden: torch.Tensor) -> torch.Tensor:
    """How near each token came to other experts `[tokens]`: the smallest difference between a score
    that was taken and one that was not.

    Args:
        router: of one layer.
        hidden: its input `[tokens, 1, hidden]`.
    """
    scores = torch.sigmoid(router.gating(hidden)).flatten(0, -2) + router.expert_bias
    margin = torch.full(scores.shape[:1], torch.inf, device=scores.device)
    if router.groups is not None:
        groups, chosen = router.groups
        sums = scores.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
        margin = torch.minimum(margin, _gap(sums, chosen))
        scores = router._within_groups(scores, groups, chosen)
    return torch.minimum(margin, _gap(scores, router.top_k))


def _gap(scores: torch.Tensor, chosen: int) -> torch.Tensor:
    if chosen >= scores.shape[-1]:
        return torch.full(scores.shape[:1], torch.inf, device=scores.device)
    top = scores.topk(chosen + 1, dim=-1).values
    return top[..., -2] - top[..., -1]


@torch.no_grad()
def _as_released(answerer: Answerer, checkpoint: Path, dtype: str) -> None:
    """Give the model the very weights that a release in `dtype` has."""
    if dtype == "keep":
        return
    state: dict[str, Any] = answerer.model.sharded_state_dict()
    with StoredTensors(checkpoint) as stored:
        for name, entry in state.items():
            weights = entry.data
            if dtype == "bfloat16" and not name.endswith(EXPERT_BIAS):
                weights.copy_(weights.to(torch.bfloat16))
            if dtype == "float32" and MAIN_WEIGHTS + name in stored.tensors:
                finer = torch.empty(stored.tensors[MAIN_WEIGHTS + name].shape, dtype=torch.float32)
                stored.read(MAIN_WEIGHTS + name, 0, finer.view(-1))
                weights.copy_(finer.view(weights.shape))
