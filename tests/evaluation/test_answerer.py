"""One process that answers: its limits, what it takes along from training, and how it fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config import RunConfig
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import CheckpointError, ConfigError, DataError
from megatron_vlm.platform import World
from tests.ranks import run_ranks
from tests.training_case import recipe

pytestmark = pytest.mark.distributed

# "user" and its marks stand around the text.
PROMPT = "what?"


def _picture(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _lengths(world: World, config: RunConfig, asked: int) -> tuple[int, int]:
    """Tokens of the prompt, and of the answer of a model that never ends one."""
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer(config, byte_tokenizer(), None) as answerer:
        letter = byte_tokenizer().encode("a")[0]
        answerer._next_tokens = lambda prompts, given: [letter] * len(prompts)  # type: ignore
        (answer,) = answerer.answer([Question(PROMPT)], asked)
        return len(answerer._prompt(Question(PROMPT)).ids), len(answer)


def test_an_answer_ends_with_the_models_longest_sample(nano_data: Path, tmp_path: Path) -> None:
    words = ("model.language.max_position_embeddings=128",)
    config = recipe(nano_data, tmp_path, *words)
    ((prompt, answer),) = run_ranks(1, _lengths, config, 500)
    assert prompt + answer == 128
    assert run_ranks(1, _lengths, config, 7) == [(prompt, 7)]


def _refuses(world: World, config: RunConfig) -> list[str]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    said = []
    with Answerer(config, byte_tokenizer(), None) as answerer:
        for pictures, names, asked in (
            ((b"just notes",), ("notes.txt",), 4),
            ((_picture(28, 28), _picture(2, 900)), ("a.png", "b.png"), 4),
            ((_picture(28, 28), _picture(2, 900)), (), 4),
            ((), (), 0),
            ((), (), -1),
        ):
            with pytest.raises((DataError, ConfigError)) as caught:
                answerer.answer([Question("<image>" * len(pictures), pictures, names)], asked)
            said.append(str(caught.value))
    return said


def test_errors_name_the_picture(nano_data: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(1, _refuses, recipe(nano_data, tmp_path))
    assert said[0].startswith("notes.txt: ") and "0x" not in said[0]
    assert said[1].startswith("b.png: picture of 2x900")
    assert said[2].startswith("picture 2: picture of 2x900")
    assert all("expected 1 or more" in text for text in said[3:])


def _tries_again(world: World, config: RunConfig, missing: Path) -> list[str]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    with pytest.raises(CheckpointError):
        Answerer(config, byte_tokenizer(), missing)
    with Answerer(config, byte_tokenizer(), None) as answerer:
        return answerer.answer([Question(PROMPT)], 2)


def test_after_a_failed_load_the_process_can_load_another(nano_data: Path, tmp_path: Path) -> None:
    config = recipe(nano_data, tmp_path)
    (answers,) = run_ranks(1, _tries_again, config, tmp_path / "missing")
    assert len(answers) == 1


def _dtypes(world: World, config: RunConfig) -> set[str]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer(config, byte_tokenizer(), None) as answerer:
        answerer.answer([Question("<image>?", (_picture(56, 56),))], 2)
        model = answerer.model
        assert model.encoder is not None and model.engine.fp8 is None
        return {str(p.dtype) for p in (*model.encoder.parameters(), *model.chunks[0].parameters())}


def test_an_fp8_run_answers_in_bf16(nano_data: Path, tmp_path: Path) -> None:
    config = recipe(nano_data, tmp_path, "training.precision=fp8_current")
    (found,) = run_ranks(1, _dtypes, config)
    assert found == {"torch.bfloat16"}


def _devices(world: World, config: RunConfig) -> set[str]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    class Elsewhere(torch.nn.Module):
        """An encoder whose weights are not on the CPU."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))
            self.seen: set[str] = set()

        def forward(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
            self.seen = {pixels.device.type, grids.device.type}
            return torch.zeros(4, config.model.language.hidden_size)

    with Answerer(config, byte_tokenizer(), None) as answerer:
        encoder: Any = Elsewhere()
        answerer.model.encoder = encoder
        answerer._prompt(Question("<image>", (_picture(56, 56),)))
        return encoder.seen


def test_pixels_and_grids_go_where_the_encoder_is(nano_data: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _devices, recipe(nano_data, tmp_path)) == [{"meta"}]


def _scores(world: World, config: RunConfig) -> dict[str, Any]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    seen = Question("which?", (_picture(56, 84), _picture(28, 28)))
    with Answerer(config, byte_tokenizer(), None) as answerer:
        ids = byte_tokenizer().encode("some text")
        together = answerer.logits([seen, ids, Question(PROMPT)])
        alone = answerer.logits([seen]) + answerer.logits([ids])
        chosen: list[int] = []
        pick = answerer._next_tokens
        answerer._next_tokens = lambda *given: chosen.append(pick(*given)[0]) or chosen[-1:]  # type: ignore
        answerer.answer([seen], 1)
        return {
            "together": together,
            "alone": alone,
            "chosen": chosen,
            "prompt": answerer._prompt(seen).ids,
            "given": ids,
        }


def test_logits_of_prompts_side_by_side(nano_data: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, _scores, recipe(nano_data, tmp_path))
    (seen, seen_logits), (ids, logits), (_, last) = found["together"]
    assert seen == found["prompt"] and ids == found["given"]
    assert seen_logits.shape == (len(seen), byte_tokenizer().vocab_size)
    assert last.shape[1] == byte_tokenizer().vocab_size
    for mine, (_, other) in zip((seen_logits, logits), found["alone"], strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)
    assert found["chosen"] == [int(seen_logits[-1].argmax())]
    # Causal: what comes later changes nothing; and every position has scores of its own.
    assert len({tuple(row) for row in logits.tolist()}) == len(ids)
