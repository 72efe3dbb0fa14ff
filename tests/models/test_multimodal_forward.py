"""Decoders with M-RoPE against transformers' own, given the angles of its Qwen2-VL.

One loss and the gradient of every weight; ours packed into rows, theirs each document alone. What
stands in for pictures are ordinary tokens at a picture's positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.config import LanguageConfig
from tests.deepseek_map import deepseek_config, to_deepseek
from tests.dots1_map import dots1_config, to_dots1
from tests.models import test_deepseek_forward, test_dots1_forward
from tests.models.test_dots1_forward import DOCUMENTS, SEQ_LENGTH, TOLERANCE, our_step, random_rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.unit

# Of each document: first token, rows, columns.
PICTURES: list[list[list[tuple[int, int, int]]]] = [
    [[(2, 2, 3), (9, 1, 4)], [], [(0, 3, 2)]],
    [[(5, 4, 5)], [(1, 2, 2)]],
]
CASES = {
    "dots1": test_dots1_forward.SMALL | {"mrope_section": (1, 1, 2)},
    "deepseek": test_deepseek_forward.SMALL | {"mtp_num_layers": None, "mrope_section": (2, 1, 1)},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_match_transformers(case: str) -> None:
    language = LanguageConfig(**CASES[case])
    rows = random_rows(language, torch.Generator().manual_seed(len(case)))
    (ours,) = run_ranks(1, our_step, language, rows, _in_rows())
    rename = to_dots1 if case == "dots1" else _to_deepseek
    loss, gradients = _their_step(case, rename(ours["weights"], language), language, rows)
    assert ours["losses"]["lm_loss"] == pytest.approx(loss, rel=TOLERANCE)
    renamed = rename(ours["gradients"], language)
    assert renamed.keys() == gradients.keys()
    for name, expected in gradients.items():
        found = renamed[name].reshape(expected.shape)
        assert expected.norm() > 0, name
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), name
    # The positions matter: without them the loss is another.
    plain = LanguageConfig(**(CASES[case] | {"mrope_section": None}))
    (flat,) = run_ranks(1, our_step, plain, rows)
    assert abs(flat["losses"]["lm_loss"] - loss) > 1e-3


def _in_rows() -> list[tuple[int, int, int]]:
    """The pictures by their places in the micro-batch, documents padded to 4."""
    found = []
    for row, (lengths, pictures) in enumerate(zip(DOCUMENTS, PICTURES, strict=True)):
        first = row * SEQ_LENGTH
        for length, inside in zip(lengths, pictures, strict=True):
            found += [(first + start, high, wide) for start, high, wide in inside]
            first += -(-length // 4) * 4
    return found


def _positions(length: int, pictures: list[tuple[int, int, int]]) -> torch.Tensor:
    """`[3, length]`, token by token."""
    found: list[tuple[int, int, int]] = []
    following = 0
    begins = {start: (high, wide) for start, high, wide in pictures}
    while len(found) < length:
        high, wide = begins.get(len(found), (0, 0))
        if high:
            here = following
            found += [(here, here + r, here + c) for r in range(high) for c in range(wide)]
            following += max(high, wide)
        else:
            found.append((following,) * 3)
            following += 1
    return torch.tensor(found).t()


class _Angles(torch.nn.Module):
    """In the place of a model's rotary embedding: that of one document after another."""

    def __init__(self, language: LanguageConfig, positions: Iterator[torch.Tensor]) -> None:
        super().__init__()
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

        assert language.mrope_section is not None
        rope = {
            "rope_type": "default",
            "rope_theta": language.rotary_base,
            "mrope_section": list(language.mrope_section),
        }
        heads, channels = language.num_attention_heads, language.rotary_channels
        self.inner = Qwen2VLRotaryEmbedding(
            Qwen2VLTextConfig(
                hidden_size=heads * channels, num_attention_heads=heads, rope_parameters=rope
            )
        )
        self.positions = positions

    def forward(self, hidden: torch.Tensor, _: torch.Tensor) -> Any:
        return self.inner(hidden, next(self.positions)[:, None])


def _to_deepseek(tensors: dict[str, torch.Tensor], _: LanguageConfig) -> dict[str, torch.Tensor]:
    return to_deepseek(tensors)


def _their_step(
    case: str, weights: dict[str, torch.Tensor], language: LanguageConfig, rows: list
) -> tuple[float, dict[str, torch.Tensor]]:
    from transformers import DeepseekV3ForCausalLM, Dots1ForCausalLM

    model: Any
    if case == "dots1":
        model = Dots1ForCausalLM(dots1_config(language, attn_implementation="sdpa"))
    else:
        model = DeepseekV3ForCausalLM(deepseek_config(language, attn_implementation="sdpa"))
    model = model.double()
    # Its default, grouped_mm, knows no float64.
    model.set_experts_implementation("eager")
    model.load_state_dict(weights)
    documents = [torch.tensor(document) for row in rows for document in row]
    pictures = [inside for row in PICTURES for inside in row]
    model.model.rotary_emb = _Angles(
        language,
        (_positions(len(d), inside) for d, inside in zip(documents, pictures, strict=True)),
    )
    targets = sum(len(document) - 1 for document in documents)
    total = 0.0
    for document in documents:
        logits = model(input_ids=document[None]).logits[0]
        loss = F.cross_entropy(logits[:-1], document[1:], reduction="sum") / targets
        loss.backward()
        total += float(loss.detach())
    return total, {name: value.grad for name, value in model.named_parameters()}
