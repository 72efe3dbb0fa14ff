"""`mvlm data build` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.index import open_dataset
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
