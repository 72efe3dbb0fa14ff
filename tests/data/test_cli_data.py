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
    assert "sample 1 (id lost): image 'b.png'" in out
    assert open_dataset(tmp_path / "out").num_samples == 2
    tokenizer = ["--tokenizer", str(tmp_path / "out" / "tokenizer.json")]
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
