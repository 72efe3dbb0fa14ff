"""Exported folders in a process that has only transformers, against the trainer's own answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.models.hf.families import family_for, read_model
from megatron_vlm.models.hf.own import ARCHITECTURES as OWN
from megatron_vlm.platform import World
from tests.data.samples import encoded, picture
from tests.ranks import run_ranks
from tests.release.folders import CONFIGS, write_small_files
from tests.release.released import perturb, released_weights
from tests.training_case import RECIPE

OUTSIDE = Path(__file__).with_name("outside.py")
NEW_TOKENS = 32
QUESTIONS: list[tuple[str, list[tuple[int, int]]]] = [
    ("what is it?", []),
    ("which?", [(56, 84)]),
    ("first <image> and second <image>?", [(30, 61), (200, 90)]),
]


def run_outside(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run outside.py in `folder`."""
    environment = os.environ | {
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, OUTSIDE, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def _write_and_answer(
    world: World, config: RunConfig, folder: Path, questions: list[Any]
) -> list[dict[str, Any]]:
    """Fill a model with noise, write it as files, and answer the questions with it."""
    from safetensors.torch import save_file

    from megatron_vlm.evaluation.generate import Answerer, Question

    found: list[dict[str, Any]] = []
    with Answerer(config, byte_tokenizer(), None) as answerer:
        encoder, (decoder,) = answerer.model.encoder, answerer.model.chunks
        assert encoder is not None
        perturb(encoder, seed=1)
        perturb(decoder, seed=2)
        # Buffers and weights; the rest of the engine's state is no tensor.
        state = {k: v for k, v in decoder.state_dict().items() if isinstance(v, torch.Tensor)}
        wanted = {name for name, _ in decoder.named_parameters()}
        state = {k: v for k, v in state.items() if k in wanted or k.endswith("expert_bias")}
        weights = released_weights(encoder.state_dict(), state, config.model.language)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        steps: list[torch.Tensor] = []
        decoder.output_layer.register_forward_hook(lambda m, i, out: steps.append(out[0][:, 0]))
        for text, files in questions:
            question = Question(text, tuple(Path(file).read_bytes() for file in files))
            prompt = answerer._prompt(question)
            steps.clear()
            (said,) = answerer.answer([question], NEW_TOKENS)
            found.append(
                {
                    "prompt": prompt.ids,
                    "features": prompt.features.detach() if files else None,
                    "logits": torch.cat(steps).detach(),
                    "text": said,
                }
            )
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same questions to the trainer and to the folder, `ours` and `theirs`."""
    folder = tmp_path_factory.mktemp("exported")
    config = load_recipe(str(RECIPE), ["training.precision=fp32", "model.language.vocab_size=263"])
    questions = []
    for number, (text, sizes) in enumerate(QUESTIONS):
        files = []
        for ordinal, size in enumerate(sizes):
            file = folder / f"{number}-{ordinal}.png"
            file.write_bytes(encoded(picture(*size, seed=number)))
            files.append(str(file))
        questions.append((text, files))
    write_small_files(folder, config.model, byte_tokenizer().to_json(), "float32")
    (ours,) = run_ranks(1, _write_and_answer, config, folder, questions)
    request = {
        "max_new_tokens": NEW_TOKENS,
        "questions": [{"text": text, "pictures": files} for text, files in questions],
    }
    (folder / "request.json").write_text(json.dumps(request))
    result = folder / "result.pt"
    said = run_outside(folder, "answer", folder, folder / "request.json", result).stderr
    return {"ours": ours, "theirs": torch.load(result), "said": said, "folder": folder}


def _close(mine: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    assert mine.shape == other.shape
    return float((mine - other).abs().max()) <= tolerance * float(mine.abs().max())


@pytest.mark.distributed
def test_nothing_is_missing_or_left_over(answers: dict[str, Any]) -> None:
    assert not any(answers["theirs"]["loading"].values())
    assert answers["theirs"]["dtype"] == "torch.float32"
    assert answers["theirs"]["classes"] == [
        "MegatronVlmConfig",
        "MegatronVlmForConditionalGeneration",
        "MegatronVlmProcessor",
    ]
    # Progress bars apart, loading and answering say nothing.
    lines = answers["said"].replace("\r", "\n").splitlines()
    assert not [line for line in lines if line.strip() and "Loading weights" not in line]


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_answers(answers: dict[str, Any], number: int) -> None:
    ours, theirs = answers["ours"][number], answers["theirs"]["answers"][number]
    assert theirs["prompt"] == ours["prompt"]
    if ours["features"] is not None:
        assert _close(ours["features"], theirs["features"], 1e-5)
    assert _close(ours["logits"], theirs["logits"], 1e-5)
    assert len(theirs["tokens"]) == NEW_TOKENS and len(set(theirs["tokens"])) > 3
    assert theirs["tokens"] == ours["logits"].argmax(1).tolist()
    assert theirs["text"] == ours["text"]
    assert theirs["without_cache"] == theirs["tokens"]


@pytest.mark.distributed
def test_a_batch_answers_as_each_alone(answers: dict[str, Any]) -> None:
    theirs = answers["theirs"]
    assert theirs["together"] == [one["tokens"] for one in theirs["answers"]]
    # Beams of a batch see the pictures of their own prompt.
    pad = byte_tokenizer().pad_id
    alone = [beam for beams in theirs["beams"] for beam in beams]
    for beam, other in zip(theirs["samples"], alone, strict=True):
        assert [t for t in beam if t != pad] == [t for t in other if t != pad]


@pytest.mark.distributed
def test_places_and_pictures_that_differ_are_refused(answers: dict[str, Any]) -> None:
    more, none = answers["theirs"]["refusals"]
    assert "input_ids hold" in more and "but the pictures have" in more
    assert "there are no pixel_values" in none


@pytest.mark.distributed
def test_the_example_of_the_documents(answers: dict[str, Any]) -> None:
    text = (OUTSIDE.parents[2] / "docs" / "transformers.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    folder = answers["folder"]
    (folder / "door.png").write_bytes(encoded(picture(40, 60)))
    (folder / "example.py").write_text(block)
    done = run_outside(folder, "example", folder, "example.py")
    assert done.stdout.strip()


@pytest.mark.unit
def test_every_decoder_from_files_and_back(tmp_path: Path) -> None:
    """Of random weights, behind the released encoder and behind one with other options."""
    other = {"gated_linear_unit": False, "merge": "average"}
    folders = {}
    for name in ("megatron_vlm", "dots_vlm", "dots_ocr"):
        for options in ({}, other):
            config = dict(CONFIGS[name]) | {"vocab_size": 263, "rms_norm_eps": 1e-3}
            decoder = config["model_type"]
            if options:
                config["model_type"], decoder = "megatron_vlm", _DECODERS[name]
                config["architectures"] = [OWN[decoder]]
            config["vision_config"] = config["vision_config"] | options
            config["tie_word_embeddings"] = name == "dots_ocr"
            _, model = read_model(config, "config.json")
            folder = tmp_path / f"{decoder}_{bool(options)}"
            folder.mkdir()
            write_small_files(folder, model, byte_tokenizer().to_json(), "float32")
            folders[folder] = family_for(model).architecture
    assert len(set(folders.values())) == 5
    run_outside(tmp_path, "round_trip", *folders)


_DECODERS = {"megatron_vlm": "dots1", "dots_vlm": "deepseek_v3", "dots_ocr": "qwen2"}
