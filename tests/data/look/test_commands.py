"""`mvlm data stats` and `mvlm data show` as they are typed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import load_recipe
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.training.datasets import open_training_data
from tests.data.templates import LLAMA, NAMED, tokenizer_of
from tests.data.test_built_templates import CONVERSATIONS, write_conversations

pytestmark = pytest.mark.unit

RECIPE = """
model: dots-vlm-nano
training: {train_iters: 50, seq_length: 128, global_batch_size: 4}
data:
  train:
    pictures: {path: FOLDER/nano/train, weight: 3}
    "te[red]xt": {path: FOLDER/text/train, weight: 1}
  schedule:
    - {tokens: 3000, weights: {pictures: 1, "te[red]xt": 1}}
    - {tokens: 9999999, weights: {pictures: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, nano_data: Path, text_data: Path) -> Path:
    path = tmp_path / "two.yaml"
    text = RECIPE.replace("FOLDER/nano", str(nano_data)).replace("FOLDER/text", str(text_data))
    path.write_text(text)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", "stats", *words]) == 0
    return capsys.readouterr().out


def test_stats_of_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, str(recipe), "--json", "data.pad_multiple=32"))
    assert (found["seq_length"], found["pad_multiple"], found["model"]) == (
        128, 32, "dots-vlm-nano",
    )  # fmt: skip
    stream = open_training_data(load_recipe(recipe, ["data.pad_multiple=32"])).stream
    rows, _ = stream.take(stream.start(), 200)
    planned = found["planned"]
    assert (planned["rows"], planned["rows_of_run"], planned["data_end"]) == (200, 200, False)
    tokens = sum(int(row.length.sum()) for row in rows)
    assert planned["tokens"] == tokens
    assert planned["fill"] == pytest.approx(tokens / (200 * 128))
    assert planned["fill"] + planned["padding"] + planned["tails"] == pytest.approx(1)
    for number, source in enumerate(found["sources"]):
        assert source["name"] == stream.sources[number].name
        own = sum(int(row.length[row.source == number].sum()) for row in rows)
        assert source["planned_tokens"] == own
        assert source["rows_per_epoch"] == pytest.approx(source["tokens"] * 200 / own)
        assert source["steps_per_epoch"] == pytest.approx(source["rows_per_epoch"] / 4)
        assert source["epochs_of_run"] == pytest.approx(200 / source["rows_per_epoch"])


def test_stats_of_what_is_held_out(
    recipe: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = text_data / "held_out"
    found = json.loads(run(capsys, str(recipe), "--json", f"data.validation.words={held}"))
    alone = json.loads(run(capsys, str(held), "--json"))["sources"][0]
    told = found["held_out"]["words"]
    assert told["samples"] == alone["samples"] > 0
    assert {name: alone[name] for name in told} == told
    out = run(capsys, str(recipe), f"data.validation.words={held}")
    assert "held out" in out and "words" in out
    assert main(["data", "stats", str(recipe), f"data.validation.words={tmp_path}/none"]) == 2
    assert capsys.readouterr().err.startswith("mvlm: error: data.validation.words: ")


def test_stats_of_what_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = write_conversations(tmp_path / "source", CONVERSATIONS[:1])
    for source, said in ((entries, "is no recipe"), (tmp_path / "none", "does not exist")):
        assert main(["data", "stats", str(source)]) == 2
        told = capsys.readouterr().err
        assert said in told and "mvlm data build" in told


def test_show_tells_the_chat_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_conversations(tmp_path / "source", CONVERSATIONS[:1])
    odd = TemplateText(LLAMA + "{# <b>\u202e</b> #}", NAMED["llama"])
    pages = {}
    for name, template in (("templated", odd), ("plain", None)):
        tokenizer = tokenizer_of("llama")
        build_dataset(source, tmp_path / name, tokenizer=tokenizer, template=template, workers=1)
        out = tmp_path / f"{name}.html"
        words = ["--rows", "1", "--seq-length", "512", "--out", str(out)]
        assert main(["data", "show", str(tmp_path / name), *words]) == 0
        pages[name] = out.read_text()
    capsys.readouterr()
    assert "written by a chat template" in pages["templated"]
    shown = re.search(
        r"<summary>chat template of set</summary><pre>(.*?)</pre>", pages["templated"], re.S
    )
    assert shown is not None
    text = html.unescape(shown[1])
    named = "bos_token: <|begin_of_text|>\neos_token: <|eot_id|>\n\n"
    assert text == named + LLAMA + "{# <b>[U+202E]</b> #}"
    assert "built-in chat format" in pages["plain"] and "chat template" not in pages["plain"]


def test_tables(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "a.png"
    out = run(capsys, str(recipe), "--rows", "40", "--plot", str(plot))
    assert plot.stat().st_size > 10_000
    # A source's name is no markup of the terminal's.
    assert "te[red]xt" in out
    assert "40 rows of the run's 200 planned, of 128 tokens: " in out
    assert "padding to data.pad_multiple=16" in out
    assert "data.schedule goes on to token 9,999,999" in out
    assert f"drawn: {plot}" in out


def test_stats_of_a_folder(
    nano_data: Path, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(run(capsys, str(text_data / "train"), "--json", "--seq-length", "64"))
    (source,) = found["sources"]
    assert (found["planned"]["data_end"], source["pictures"]) == (True, 0)
    assert source["planned_samples"] == source["samples"] == 96
    assert source["planned_tokens"] == source["tokens"] == source["text_tokens"]
    assert source["rows_per_epoch"] == pytest.approx(found["planned"]["rows"])
    assert source["steps_per_epoch"] is source["epochs_of_run"] is None
    # Options and overrides in any order; the model decides how long pictures are.
    words = ["--model", "dots-vlm-nano", str(nano_data / "train"), "data.pad_multiple=64", "--json"]
    found = json.loads(run(capsys, *words))
    assert found["sources"][0]["pictures"] == 112
    assert (found["seq_length"], found["pad_multiple"]) == (8192, 64)


def test_what_a_run_would_refuse_is_told(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, str(recipe), "--seq-length", "64", "data.schedule=[]")
    assert "data.long_samples=refuse: a run would stop" in out
    show = ["data", "show", str(recipe), "--seq-length", "64", "--out", str(tmp_path / "a.html")]
    assert main(show) == 2
    assert "more than training.seq_length 64" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["stats", "{nano}/train"], "has 112 pictures, whose tokens follow from a model's sizes"),
        (["stats", "{nano}"], "holds no dataset.json; expected a recipe, or a folder"),
        (["stats", "nowhere"], "there is no recipe named 'nowhere'"),
        (["stats", "{text}/train", "--plot", "a.gif"], "drawings end in .png, .svg, .pdf"),
        (["stats", "{text}/train", "--rows", "0"], "'0'; expected a whole number above 0"),
        (["stats", "{text}/train", "--model", "none"], "there is no model named 'none'"),
        (["stats", "{text}/train", "data.colour=1"], "data.colour"),
        (["stats", "{text}/train", "--sed", "1"], "did you mean --seed?"),
        (["show", "{text}/train", "--rows", "257"], "--rows 257: at most 256"),
        (["show", "{text}/train", "--start", "-1"], "--start -1: expected the number of a row"),
        (["show", "{text}/train", "--start", "1000000"], "the data end after"),
        (["show", "{text}/train", "--jpeg", "96"], "--jpeg 96: expected a quality from 1 to 95"),
        (["show", "{text}/train", "--out", "page.txt"], "expected a name that ends in .html"),
        (["show", "{text}/train", "--out", "/dev/null/a.html"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_line(
    nano_data: Path,
    text_data: Path,
    words: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.format(nano=nano_data, text=text_data) for word in words]
    try:
        assert main(["data", *given]) == 2
    except SystemExit as left:
        assert left.code == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
