"""The demo empties no folder but its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlm.demo.folder import RESULT, claim
from megatron_vlm.errors import ConfigError

pytestmark = pytest.mark.unit


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("marker", [None, "[]", "not JSON", '{"format": "another"}'])
def test_a_strangers_folder_is_left_as_it_is(tmp_path: Path, marker: str | None) -> None:
    # A run of someone's, with a result of its own.
    for name in (RESULT, "config.yaml", "checkpoints/iter_0000001/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    if marker is not None:
        (tmp_path / "demo.json").write_text(marker)
    before = _contents(tmp_path)
    with pytest.raises(ConfigError, match="was not made by `mvlm demo`") as caught:
        claim(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert _contents(tmp_path) == before


def test_new_and_empty_folders_become_the_demos(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        folder = claim(path)
        assert (folder.samples, folder.finished) == (None, False)
        folder.note_samples(70)
        assert claim(path).samples == 70


def test_clearing_keeps_the_data_and_what_others_put_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = claim(run)
    kept = ("data/train/dataset.json", "notes.txt", "demo.json")
    for name in (*kept[:2], "checkpoints/iter_1/a", "logs/b", "metrics.jsonl", RESULT):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "board").write_text("mine")
    (run / "tensorboard").symlink_to(elsewhere)
    assert folder.finished
    folder.clear()
    assert set(_contents(run)) == set(kept) and not folder.finished
    assert (elsewhere / "board").read_text() == "mine"
    assert json.loads((run / "demo.json").read_text())["samples"] is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run: cannot be written"):
        claim(tmp_path / "file" / "run")
