"""What a card says where a run says less, more than once, or something odd."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.errors import ConfigError
from megatron_vlm.release import curve
from megatron_vlm.release.card import layout_in_words, model_card
from megatron_vlm.release.choosing import Candidate
from megatron_vlm.release.facts import training_facts
from megatron_vlm.release.history import History, read_history
from megatron_vlm.release.licences import front_matter, parse_licence
from tests.training_case import RECIPE

pytestmark = pytest.mark.unit

NOTHING = History()
VERIFIED = {
    "max_relative_difference": 3e-7,
    "transformers": "5.23.0",
    "positions": 8,
    "compared": 8,
    "prompts": 2,
    "pictures": 0,
}


def _write(run: Path, *lines: object) -> History:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(text))
    return read_history(run)


def _step(iteration: int, loss: float, **more: float) -> dict[str, float]:
    return {"iteration": iteration, "consumed_tokens": iteration * 10, "lm_loss": loss, **more}


def test_the_last_line_of_an_iteration_counts(tmp_path: Path) -> None:
    history = _write(
        tmp_path,
        _step(1, 5.0),
        _step(2, 4.0, validation_loss_a=9.0),
        _step(3, 3.0, validation_loss_a=8.0, validation_loss_b=7.0),
        # The run was set back to 1 and went on without `b`.
        _step(2, 4.5),
        _step(3, 3.5, validation_loss_a=8.5),
        _step(4, 3.0, grad_norm=1.0),
    )
    assert history.losses(3) == {"lm_loss": 3.5}
    assert history.validation(4) == {"validation_loss_a": (8.5, 3)}
    assert history.validation(2) == {} and history.losses(9) == {}
    assert history.curve(3) == {
        "lm_loss": [(10, 5.0), (20, 4.5), (30, 3.5)],
        "validation_loss_a": [(30, 8.5)],
    }


def test_torn_and_odd_lines_are_left_out(tmp_path: Path) -> None:
    odd = (
        "[1]",
        "null",
        '{"lm_loss": 1}',
        '{"iteration": "2"}',
        '{"iteration": true}',
        "[" * 10**5,
    )
    history = _write(
        tmp_path, _step(1, 5.0), *odd, "", _step(2, float("nan")), '{"iteration": 3, "lm'
    )
    assert list(history.steps) == [1, 2] and history.unreadable == len(odd) + 1
    assert history.curve() == {"lm_loss": [(10, 5.0)]}
    assert read_history(tmp_path / "nowhere") == History()


def _facts(tmp_path: Path, *overrides: str, history: History = NOTHING, **more: Any) -> Any:
    from megatron_vlm.config import dump_yaml

    config: RunConfig = load_recipe(str(RECIPE), ["data.train=somewhere/train", *overrides])
    checkpoint = tmp_path / "iter_0000003"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.yaml").write_text(dump_yaml(config))
    state = {
        "progress": {"iteration": 3, "consumed_tokens": 1234},
        "data": {
            "content_sha256 of data.train.train": "ab" * 32,
            "samples of data.train.train": 77,
        },
        "layout": {"world_size": 8, "tp": 2, "vpp": None, "dp": 4, "sequence_parallel": True},
        "versions": {"torch": "1|2"},
    }
    facts = training_facts(Candidate(checkpoint, 3, 1234, state), history)
    return {
        "release": "x-iter_0000003-1.23K-tokens",
        "name": "x",
        **facts,
        "licence": None,
        "base_model": None,
        "verification": None,
        "export": {
            "architecture": "Class",
            "dtype": "bfloat16",
            "weights": "as trained",
            "bytes": 5,
        },
        "options": {"with_optimizer": False},
        "files": {},
        **more,
    }


def test_a_set_that_is_gone_or_was_built_again_is_told_by_the_checkpoint(tmp_path: Path) -> None:
    facts = _facts(tmp_path)
    assert facts["data"]["train"] == [
        {
            "source": "train",
            "name": "train",
            "content_sha256": "ab" * 32,
            "samples": 77,
            "pictures": None,
            "text_tokens": None,
            "loss_tokens": None,
            "licence": None,
            "known_from": "the checkpoint",
        }
    ]
    assert "| training | train | 77 | not known | not known | not told |" in model_card(facts)
    folder = tmp_path / "again"
    folder.mkdir()
    record = {"content_sha256": "ab" * 32, "samples": 77, "pictures": 5, "license": "CC-BY-4.0"}
    for content, licence in (("ab", "CC-BY-4.0"), ("cd", None)):
        text = json.dumps(record | {"content_sha256": content * 32})
        (folder / "dataset.json").write_text(text)
        (found,) = _facts(tmp_path, f"data.train={folder}")["data"]["train"]
        assert (found["licence"], found["samples"]) == (licence, 77)
        assert found["content_sha256"] == "ab" * 32


def test_what_comes_from_outside_is_no_markup(tmp_path: Path) -> None:
    stage = "a|b](http://x) <b> `c`\\n## d"
    card = model_card(_facts(tmp_path, f'training.stage="{stage}"'))
    (row,) = (line for line in card.splitlines() if line.startswith("| Stage"))
    assert row == "| Stage | a\\|b\\](http://x) \\<b\\> \\`c\\` ## d |"
    assert "| torch | 1\\|2 |" in card


@pytest.mark.parametrize(
    ("overrides", "words", "value"),
    [
        (["optimizer.lr_warmup_iters=0"], "constant at 0.003", 3e-3),
        ([], "2 steps of linear warm-up to 0.003, then constant", 3e-3),
        (
            ["optimizer.lr_warmup_iters=1"],
            "1 step of linear warm-up to 0.003, then constant",
            3e-3,
        ),
        (
            ["optimizer.lr_decay_style=cosine", "optimizer.lr_decay_iters=4"],
            "2 steps of linear warm-up to 0.003, then cosine to 0 at step 4",
            1.5e-3,
        ),
        (
            ["optimizer.lr_decay_style=cosine", "optimizer.lr_warmup_iters=0"],
            "from 0.003, cosine to 0 at step 10",
            None,
        ),
    ],
)
def test_schedules_in_words(
    tmp_path: Path, overrides: list[str], words: str, value: float | None
) -> None:
    rate = _facts(tmp_path, *overrides)["learning_rate"]
    assert rate["in_words"] == words and rate["from"] == "the schedule"
    assert value is None or rate["value"] == pytest.approx(value)
    written = History({3: _step(3, 1.0, learning_rate=7e-5)}, found=True)
    assert _facts(tmp_path, *overrides, history=written)["learning_rate"]["value"] == 7e-5


def test_cards_of_all_kinds_parse(tmp_path: Path) -> None:
    history = History({3: _step(3, float("nan"), my_loss=2.5)}, found=True)
    more: dict[str, Any] = {
        "licence": "GPL-3.0-only",
        "base_model": "someone/something",
        "verification": VERIFIED | {"positions": 10},
        "options": {"with_optimizer": True},
        "files": {curve.FILE: 1},
    }
    words = ("checkpoint.load=far/away/older", "model.vision=null")
    facts = _facts(tmp_path, *words, history=history, **more)
    card = ModelCard(model_card(facts))
    assert card.data.license == "gpl-3.0" and card.data.base_model == "someone/something"
    for text in (
        "started from older, with its optimizer",
        "at 8 positions of 2 prompts; 2 more were left out",
        "| lm\\_loss, training | not finite | 3 |",
        "| my\\_loss, training | 2.5000 | 3 |",
        "8 processes: TP 2, DP 4, SP",
        "checkpoint.load=FOLDER/checkpoint",
        "its `config.yaml` has the paths of the machine",
        f"]({curve.FILE})",
    ):
        assert text in card.content, text
    assert json.loads(json.dumps(facts, allow_nan=False))["losses"]["training"]["lm_loss"] is None


def test_rounded_weights_are_told_from_those_that_were_trained(tmp_path: Path) -> None:
    history = History({3: _step(3, 2.5)}, found=True)
    export = {"architecture": "C", "dtype": "bfloat16", "bytes": 5}
    for weights, rounded in (("rounded from float32", True), ("as trained", False)):
        more = {"export": export | {"weights": weights}, "verification": VERIFIED}
        card = model_card(_facts(tmp_path, history=history, **more))
        assert ("with these same weights (bfloat16, rounded from float32)" in card) is rounded
        assert ("Measured in training, with its own weights" in card) is rounded
        assert f"| Weights in these files | bfloat16, {weights}, 5 bytes |" in card


def test_where_counting_began_is_said(tmp_path: Path) -> None:
    load = "checkpoint.load=far/away/older"
    for words, counted in (
        ([], ""),
        ([load], ""),
        ([load, "checkpoint.load_optimizer=false"], " in this run"),
    ):
        facts = _facts(tmp_path, *words)
        facts["consumed"]["documents"] = 154
        card = model_card(facts)
        assert f"iteration 3 of 10 planned{counted}." in card
        assert f"| Tokens seen{counted} | 1,234, without padding, those of pictures" in card
        assert f"| Documents seen{counted} | 154, 2.00 times the training set |" in card


def test_a_card_is_true_wherever_its_folder_lies(tmp_path: Path) -> None:
    words = ("training.seq_length=64", "model.language.num_query_groups=2")
    card = model_card(_facts(tmp_path, *words))
    assert "| Attention heads | 4, 2 of keys and values |" in card
    assert 'folder = "."  # the folder of this file' in card
    assert "mvlm import FOLDER checkpoints/x-iter_0000003-1.23K-tokens" in card
    assert 'revision="iter_0000003-1.23K-tokens"' in card
    assert "pip install torch 'transformers>=5.10' pillow" in card
    assert "at most; trained here on rows of 64 tokens |" in card


@pytest.mark.parametrize("more", [{}, {"validation_loss_b": 7.0}])
def test_one_held_out_set_is_told_once(tmp_path: Path, more: dict[str, float]) -> None:
    step = _step(3, 1.0, validation_loss=8.0, validation_loss_a=8.0, **more)
    card = model_card(_facts(tmp_path, history=History({3: step}, found=True)))
    assert "| validation\\_loss\\_a | 8.0000 | 3 |" in card
    assert ("| validation\\_loss | 8.0000 | 3 |" in card) is bool(more)


def test_what_was_not_verified_is_said(tmp_path: Path) -> None:
    apart = "the layer of multi-token prediction, which transformers loads apart"
    for model, ahead in (("deepseek-v3-twin", True), ("dots-llm1-twin", False)):
        card = model_card(_facts(tmp_path, f"model={model}", verification=VERIFIED))
        assert "**Verified**" in card and (apart in card) is ahead
    assert apart not in model_card(_facts(tmp_path, "model=deepseek-v3-twin"))


def test_batches_have_no_ramp(tmp_path: Path) -> None:
    facts = _facts(tmp_path, "training.global_batch_size=6", "training.seq_length=64")
    assert facts["batch"]["ramp"] is None
    assert "| Batch | 6 rows at every step (no ramp), 384 tokens at most" in model_card(facts)


def test_layouts_in_words() -> None:
    assert layout_in_words({}) == "not known"
    assert layout_in_words({"world_size": 1, "tp": 1}) == "1 process"


@pytest.mark.parametrize(
    ("given", "spdx", "hub"),
    [
        (None, None, {"license": "other", "license_name": "none-given"}),
        ("Other", "other", {"license": "other"}),
        ("apache-2.0", "Apache-2.0", {"license": "apache-2.0"}),
        ("mit", "MIT", {"license": "mit"}),
        ("agpl-3.0-or-later", "AGPL-3.0-or-later", {"license": "agpl-3.0"}),
        ("OLDAP-2.8", "OLDAP-2.8", {"license": "other", "license_name": "oldap-2.8"}),
    ],
)
def test_licences(given: str | None, spdx: str | None, hub: dict[str, str]) -> None:
    assert parse_licence(given) == spdx and front_matter(spdx) == hub
    assert ModelCard(f"---\n{yaml.safe_dump(hub)}---\n").data.license == hub["license"]


@pytest.mark.parametrize("text", ["", "free", "MIT OR Apache-2.0", "LicenseRef-mine", "../MIT"])
def test_no_licences(text: str) -> None:
    with pytest.raises(ConfigError, match="--licence .*SPDX identifier"):
        parse_licence(text)


def test_the_curve_marks_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {i: _step(i, 5 - i / 2000) for i in range(1, 5001)}
    history = History(steps, found=True)
    one, two = (curve.draw(history, i, i * 10, "x") for i in (1000, 4000))
    assert one is not None and two is not None and one != two
    assert one == curve.draw(history, 1000, 10_000, "x")
    assert len(curve._thinned(history.curve()["lm_loss"])) <= 2000
    with Image.open(io.BytesIO(one)) as image:
        assert image.format == "PNG"
    assert curve.draw(History(found=True), 1, 10, "x") is None
    # Where nothing is known of this very step, the others are still drawn.
    assert curve.draw(history, 9999, 99_990, "x") is not None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curve.draw(history, 1000, 10_000, "x") is None
