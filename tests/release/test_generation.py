"""Trained, saved, exported, answered: 32 greedy tokens of ours and of transformers' are the same.

Through the real commands' functions, for each kind of decoder, with pictures and without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.platform import World
from tests.data.samples import encoded, picture
from tests.parallel.layouts import DEEPSEEK, DENSE
from tests.ranks import run_ranks
from tests.release.test_hub_models import NEW_TOKENS, QUESTIONS, run_outside
from tests.training_case import recipe, train_case

# A vocabulary of 384 rows for a tokenizer of 263: what has no token is never answered.
SHAPES: dict[str, tuple[str, ...]] = {
    "dots1": (),
    # transformers knows one epsilon for what is compressed.
    "deepseek_v3": (*DEEPSEEK, "model.language.layernorm_epsilon=1e-6"),
    "qwen2": (
        DENSE,
        "model.language.qk_layernorm=false",
        "model.language.add_qkv_bias=true",
        "model.language.num_query_groups=2",
    ),
}
CASES = [
    pytest.param(shape, marks=[] if shape == "deepseek_v3" else [pytest.mark.slow])
    for shape in SHAPES
]
TRAINING = ("training.train_iters=4", "training.precision=fp32")


def _answers(world: World, run_dir: Path, questions: list[Any]) -> list[dict[str, Any]]:
    """Tokens of each prompt, logits of each step, and the text."""
    from megatron_vlm.evaluation.generate import Answerer, Question

    found: list[dict[str, Any]] = []
    with Answerer.from_checkpoint(run_dir) as answerer:
        (decoder,) = answerer.model.chunks
        steps: list[torch.Tensor] = []
        decoder.output_layer.register_forward_hook(lambda m, i, out: steps.append(out[0][:, 0]))
        for text, files in questions:
            question = Question(text, tuple(Path(file).read_bytes() for file in files))
            steps.clear()
            (said,) = answerer.answer([question], NEW_TOKENS)
            logits = torch.cat(steps).detach()
            chosen = logits[:, : answerer.tokenizer.vocab_size].argmax(1).tolist()
            prompt = answerer._prompt(question).ids
            found.append({"prompt": prompt, "logits": logits, "tokens": chosen, "text": said})
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("shape", CASES)
def test_with_pictures(shape: str, nano_data: Path, tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint

    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    train_case(recipe(nano_data, run_dir, *TRAINING, *SHAPES[shape]), 1)
    export_checkpoint(run_dir, folder)
    questions = []
    for number, (text, sizes) in enumerate(QUESTIONS):
        files = [tmp_path / f"{number}-{ordinal}.png" for ordinal in range(len(sizes))]
        for file, size in zip(files, sizes, strict=True):
            file.write_bytes(encoded(picture(*size, seed=number)))
        questions.append((text, [str(file) for file in files]))
    (ours,) = run_ranks(1, _answers, run_dir, questions)
    asked = [{"text": text, "pictures": files} for text, files in questions]
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"max_new_tokens": NEW_TOKENS, "questions": asked}))
    run_outside(tmp_path, "answer", folder, request, tmp_path / "result.pt")
    theirs = torch.load(tmp_path / "result.pt")
    assert not any(theirs["loading"].values())
    for mine, other in zip(ours, theirs["answers"], strict=True):
        assert other["prompt"] == mine["prompt"]
        assert other["tokens"] == mine["tokens"]
        assert other["text"] == mine["text"]
        gap = (other["logits"] - mine["logits"]).abs().max() / mine["logits"].abs().max()
        assert float(gap) < 1e-5


@pytest.mark.distributed
@pytest.mark.parametrize("shape", CASES)
def test_text_alone(shape: str, text_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_vlm.release.exporting import export_checkpoint

    words = [*SHAPES[shape], "model.vision=null"]
    if shape == "deepseek_v3":
        # transformers' class tells of the prediction's weights only where they are layer 61.
        words.append("model.language.mtp_num_layers=null")
    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    train_case(recipe(text_data, run_dir, *TRAINING, *words), 1)
    export_checkpoint(run_dir, folder)
    (ours,) = run_ranks(1, _answers, run_dir, [(text, []) for text, sizes in QUESTIONS[:2]])
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for mine, (text, _) in zip(ours, QUESTIONS, strict=False):
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == mine["prompt"]
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        assert out[0, len(mine["prompt"]) :].tolist() == mine["tokens"]
