"""A checkpoint answers the same in one process, whatever layout trained it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.platform import World
from tests.parallel.layouts import LAYOUTS
from tests.ranks import run_ranks
from tests.training_case import recipe, train_case

# In float64 the layouts differ by 1e-14, so no near tie between two tokens is broken differently.
WORDS = ("training.precision=fp64", "training.train_iters=6")


def _picture(height: int, width: int) -> bytes:
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _answers(world: World, run_dir: Path, together: bool) -> list[str]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    questions = [
        Question("<image>ab?", (_picture(56, 84),)),
        Question("hello"),
        Question("<image>x<image>", (_picture(28, 28), _picture(30, 100))),
        Question("zz <image>", (_picture(112, 56),)),
    ]
    with Answerer.from_checkpoint(run_dir) as answerer:
        if together:
            return answerer.answer(questions, max_new_tokens=16)
        return [answerer.answer([question], max_new_tokens=16)[0] for question in questions]


def _positions(world: World, run_dir: Path) -> list[list[int]]:
    from megatron_vlm.evaluation.generate import Answerer, Question

    seen = []
    with Answerer.from_checkpoint(run_dir) as answerer:
        (decoder,) = answerer.model.chunks
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["packed_seq_params"].rotary_positions),
            with_kwargs=True,
        )
        questions = [
            Question("ab<image>", (_picture(56, 84),)),
            Question("<image><image>", (_picture(28, 56), _picture(56, 28))),
        ]
        answerer.answer(questions, max_new_tokens=1)
    return seen[0].tolist()


@pytest.mark.distributed
def test_questions_have_positions_in_three_dimensions(nano_data: Path, tmp_path: Path) -> None:
    words = ("training.train_iters=2", "model.language.mrope_section=[2,3,3]")
    train_case(recipe(nano_data, tmp_path / "run", *words), 1)
    (found,) = run_ranks(1, _positions, tmp_path / "run")
    # <|user|> a b, six of a picture of 2 x 3, <|end|> <|assistant|>; then with two pictures.
    first = ([0, 1, 2] + [3] * 6 + [6, 7], [0, 1, 2] + [3] * 3 + [4] * 3 + [6, 7])
    second = ([0, 1, 1, 3, 3, 5, 6], [0, 1, 1, 3, 4, 5, 6])
    assert found[0] == first[0] + second[0]
    assert found[1] == first[1] + second[1]
    assert found[2] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7] + [0, 1, 2, 3, 3, 5, 6]


@pytest.mark.distributed
def test_answers_do_not_depend_on_the_layout(nano_data: Path, tmp_path: Path) -> None:
    answers = {}
    for name in ("mbs2", "pp2_vpp2_ep2", "tp2_sp"):
        run_dir = tmp_path / name
        layout = LAYOUTS[name]
        train_case(recipe(nano_data, run_dir, *WORDS, *layout.overrides), layout.world_size)
        (answers[name],) = run_ranks(1, _answers, run_dir, True)
    assert answers["pp2_vpp2_ep2"] == answers["mbs2"] == answers["tp2_sp"]
    assert any(answers["mbs2"]), "every answer is empty: the comparison shows nothing"
    (alone,) = run_ranks(1, _answers, tmp_path / "mbs2", False)
    assert alone == answers["mbs2"], "answers depend on what they are packed with"
