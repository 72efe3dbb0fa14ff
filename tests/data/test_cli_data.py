"""`mvlm data build` as it is typed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_vlm.cli.main import main
from megatron_vlm.data.build_progress import BuildProgress
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.sources.opening import FORMS
from tests.data.samples import entry, picture

pytestmark = pytest.mark.unit


def write(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    picture(30, 30).save(folder / "pictures" / "a.png")
    entries = [entry("q", "a", ["a.png"]), entry("q", "a", ["b.png"], id="lost"), entry("q", "a")]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "build", str(write(tmp_path)), str(tmp_path / "out")]
    assert main([*command, "--image-root", str(tmp_path / "pictures")]) == 0
    out = capsys.readouterr().out
    assert "2 samples, 1 pictures" in out
    assert "1 samples rejected" in out
    assert "entry 1 (id lost): image 'b.png'" in out
    assert open_dataset(tmp_path / "out").num_samples == 2
    tokenizer = ["--tokenizer", str(open_dataset(tmp_path / "out").tokenizer_path)]
    assert main([*command, *tokenizer, "--overwrite", "--shard-size-mb", "3"]) == 0
    assert open_dataset(tmp_path / "out").num_pictures == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokenizer", "none.json"], "tokenizer none.json: cannot be read"),
        (["--image-root", "nowhere"], "nowhere: no such folder"),
        (["--shard-size-mb", "0"], "shard size 0 MB: expected at least 1"),
        (["--workers", "0"], "workers 0: expected at least 1"),
        (["--form", "poem"], "form 'poem': expected auto or one of"),
        (["--video-fps", "0"], "video fps 0.0: expected more than 0"),
        (["--video-fps", "nan"], "video fps nan: expected more than 0"),
        (["--video-max-tokens", "127"], "video tokens 127: expected at least the 128"),
        (["--model", "dots-vlm1"], "are for absolute coordinates"),
        (["--min-pixels", "1"], "are for absolute coordinates"),
        (["--coordinates", "absolute"], "what the model sees is not known"),
        (["--coordinates", "absolute", "--min-pixels", "3136"], "what the model sees is not known"),
        (
            ["--coordinates", "absolute", "--min-pixels", "3136", "--max-pixels", "3135"],
            "--min-pixels 3136, --max-pixels 3135: expected",
        ),
        (
            ["--coordinates", "absolute", "--min-pixels", "3136", "--model", "dots-vlm1"],
            "--model tells --min-pixels and --max-pixels too",
        ),
        (["--coordinates", "absolute", "--model", "no-such"], "there is no model named 'no-such'"),
        (["--coordinates", "absolute", "--model", "dots-llm1"], "has no vision tower"),
        (["--thinking-prompt", "x"], "only --thinking toggle has prompts"),
        (["--pdf-setting", "dpi"], "--pdf-setting dpi: expected NAME=VALUE with one of max_pages"),
        (["--pdf-setting", "colour=1"], "expected NAME=VALUE"),
        (["--pdf-setting", "max_pages=many"], "'many' is not of the type int"),
        (["--pdf-setting", "dpi=0"], "PDF setting dpi: 0.0"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    command = ["data", "build", str(write(tmp_path)), str(tmp_path / "out"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_id_cannot_fail_the_command_or_drive_the_terminal(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    ids = ["\ud800", "\x1b[2J\x07\n", {"deep": ["x" * 200]}, None]
    entries = [entry("q", "a", ["none.png"], id=given) for given in ids[:2]]
    # The three that are shown are the first.
    entries += [entry("q", "a", ["none.png"], id=ids[2]), entry("q", "a")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert main(["data", "build", str(tmp_path / "list.json"), str(tmp_path / "out")]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "(id \\ud800)" in out
    assert r"(id \x1b[2J\x07\n)" in out
    assert "\x1b" not in out and "\x07" not in out
    assert max(map(len, out.splitlines())) < 200
    path = out.split("see ")[1].splitlines()[0]
    assert len(Path(path).read_text().splitlines()) == 3
    assert open_dataset(tmp_path / "out").num_samples == 1


def test_a_tokenizer_among_the_files_that_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "build", str(write(tmp_path)), str(tmp_path / "out")]
    assert main(command) == 0
    other = open_dataset(tmp_path / "out").folder / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"[U]": 0, "yes": 1}, "unk_token": "[U]"}
    other.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    assert main([*command, "--overwrite", "--tokenizer", str(other)]) == 2
    assert f"{other}: lies among the files that replacing" in capsys.readouterr().err
    assert "yes" in other.read_text()


def test_absolute_coordinates_of_a_model(tmp_path: Path) -> None:
    picture(100, 200).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "<point:0>"}]
    thing = {"image": 0, "label": "cat", "point": [199, 99]}
    grounded = {"messages": turns, "images": ["a.png"], "objects": [thing]}
    (tmp_path / "x.jsonl").write_text(json.dumps(grounded))
    command = ["data", "build", str(tmp_path / "x.jsonl"), str(tmp_path / "out")]
    assert main([*command, "--coordinates", "absolute", "--model", "dots-vlm1"]) == 0
    rule = {"min_pixels": 3136, "max_pixels": 11289600, "unit": 28}
    index = open_dataset(tmp_path / "out")
    assert index.coordinates == {"convention": "absolute", **rule}
    pixels = ["--min-pixels", "3136", "--max-pixels", "11289600"]
    assert main([*command, "--overwrite", "--coordinates", "absolute", *pixels]) == 0
    assert open_dataset(tmp_path / "out").content_sha256 == index.content_sha256
    assert main([*command, "--overwrite"]) == 0
    assert open_dataset(tmp_path / "out").content_sha256 != index.content_sha256


def test_options_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in "abc"))
    command = ["data", "build", str(tmp_path / "x.jsonl"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "--form" in capsys.readouterr().err
    assert main([*command, "--text-field", "body"]) == 0
    index = open_dataset(tmp_path / "out")
    assert (index.kind, index.num_samples) == ("document", 3)
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n")
    counts = []
    for unit in ("file", "line", "paragraph"):
        out = tmp_path / unit
        assert main(["data", "build", str(tmp_path / "x.txt"), str(out), "--text-unit", unit]) == 0
        counts.append(open_dataset(out).num_samples)
    assert counts == [1, 3, 2]
    thought = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    turns = [{"role": "user", "content": "q"}, thought]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns}))
    digests = set()
    for number, options in enumerate(
        (
            *([], ["--thinking", "drop"], ["--thinking", "toggle"]),
            ["--thinking", "toggle", "--thinking-prompt", "Think."],
        )
    ):
        out = tmp_path / f"t{number}"
        assert main(["data", "build", str(tmp_path / "t.jsonl"), str(out), *options]) == 0
        digests.add(open_dataset(out).content_sha256)
    assert len(digests) == 4


def test_help_names_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "build", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for form in FORMS:
        assert form in said.split("--form FORM")[-1]


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("megatron_vlm.data.build_progress.time.monotonic", lambda: now)
    for total, pace in ((400, "0.5 entries/s, 10 minutes left"), (None, "0.5 entries/s")):
        progress = BuildProgress(shown=True)
        with progress.start(done=100, total=total):
            for entry_number in range(32):
                now += 2
                progress.advance(bytes_written=entry_number * 10**9)
        lines = capsys.readouterr().err.splitlines()
        of = " of 400" if total else ""
        assert lines[0] == f"building: 115{of} entries, 14.00 GB, {pace}"
        assert len(lines) == 2
    hidden = BuildProgress(shown=False)
    with hidden.start(0, 5):
        now += 100
        hidden.advance(0)
        hidden.tell("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [400, None])
def test_bar_on_a_terminal(total: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr("megatron_vlm.data.build_progress.Console", lambda stderr: terminal)
    progress = BuildProgress(shown=True)
    with progress.start(done=100, total=total):
        for _ in range(50):
            progress.advance(bytes_written=2 * 10**9)
    of = " of 400" if total else ""
    assert f"150{of} entries, 2.00 GB" in stream.getvalue()
