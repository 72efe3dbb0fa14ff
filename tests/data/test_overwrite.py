"""Replacing a data set: what is never removed, and that a whole set is there at every moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data import build as build_module
from megatron_vlm.data import build_publish
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.index import open_dataset
from megatron_vlm.errors import DataError
from tests.data.samples import build, entry, files_of, mixed_entries, picture, snapshot

pytestmark = pytest.mark.unit


def test_folders_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty and holds no data set"):
            build(tmp_path, [entry("q", "a")], overwrite=overwrite)
    (tmp_path / "set" / "thesis.txt").unlink()
    build(tmp_path, [entry("q", "a")])
    with pytest.raises(DataError, match="--overwrite"):
        build(tmp_path, [entry("q", "b"), entry("q", "c")])
    assert open_dataset(tmp_path / "set").num_samples == 1
    (tmp_path / "set" / "notes.txt").write_text("kept")
    (files_of(tmp_path) / "notes.txt").write_text("kept too")
    old = files_of(tmp_path)
    assert build(tmp_path, [entry("q", "b"), entry("q", "c")], overwrite=True).num_samples == 2
    assert (tmp_path / "set" / "notes.txt").read_text() == "kept"
    assert [path.name for path in old.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [[entry("q", "a")], {"shards": [], "format_version": 1}, "{"])
def test_a_file_that_happens_to_be_called_dataset_json_is_no_data_set(
    tmp_path: Path, overwrite: bool, content: Any
) -> None:
    mine = tmp_path / "set"
    mine.mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (mine / "dataset.json").write_text(text)
    (mine / "tokenizer.json").write_text("my own")
    (mine / "shard-00000.tar").write_text("my own")
    before = snapshot(mine)
    with pytest.raises(DataError, match="is not empty and holds no data set"):
        build(tmp_path, [entry("q", "a")], overwrite=overwrite)
    if isinstance(content, list):
        with pytest.raises(DataError, match="is not empty and holds no data set"):
            build_dataset(mine / "dataset.json", mine, overwrite=overwrite)
    assert snapshot(mine) == before


def test_what_is_being_read_is_not_removed(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a")])
    old = index.folder
    for name in ("source.json", "tokenizer.json"):
        kept = (old / name).read_bytes() if (old / name).exists() else None
        (old / name).write_text(json.dumps([entry("q", "b")]))
        (tmp_path / "link.json").unlink(missing_ok=True)
        (tmp_path / "link.json").symlink_to(old / name)
        before = snapshot(tmp_path / "set")
        with pytest.raises(DataError, match=r"link\.json: lies among the files that replacing"):
            build_dataset(tmp_path / "link.json", tmp_path / "set", overwrite=True)
        with pytest.raises(DataError, match=f"{name}: lies among the files that replacing"):
            build(tmp_path, [entry("q", "c")], overwrite=True, inputs=[old / name])
        assert snapshot(tmp_path / "set") == before
        (old / name).unlink()
        if kept:
            (old / name).write_bytes(kept)
    # The set's own tokenizer is in the new set too.
    build(tmp_path, [entry("q", "c")], overwrite=True, inputs=[index.tokenizer_path])
    assert not old.exists()


def test_overwriting_leaves_nothing_of_the_old_set(tmp_path: Path) -> None:
    index = build(tmp_path, mixed_entries(tmp_path), shard_mb=1)
    assert len(index.shard_names) > 1
    new = build(tmp_path, [entry("q", "a")], overwrite=True)
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "dataset.json",
        new.folder.name,
    }
    assert {path.name for path in new.folder.iterdir()} == {
        *("index.safetensors", "origins.json", "rejected.jsonl"),
        *("shard-00000.tar", "tokenizer.json"),
    }


def test_a_damaged_set_is_mended_by_building_it_again(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a")])
    before = snapshot(tmp_path / "set")
    (index.folder / "shard-00000.tar").write_bytes(b"cut")
    build(tmp_path, [entry("q", "a")], overwrite=True)
    assert snapshot(tmp_path / "set") == before


def test_a_failed_build_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, [entry("q", "a")])
    before = snapshot(tmp_path / "set")
    calls = []

    def fail_late(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args, **options)  # type: ignore[arg-type]

    original = build_module.encode_entry
    monkeypatch.setattr(build_module, "encode_entry", fail_late)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, [entry("q", "b")] * 9, overwrite=True, workers=1)
    assert snapshot(tmp_path / "set") == before


KILLED = """
import os, shutil, sys
from pathlib import Path
from megatron_vlm.data.build import build_dataset

# A kill loses nothing that was written; only a loss of power would.
os.fsync = lambda descriptor: None
source, template, work = map(Path, sys.argv[1:])
changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
for deadly in range(1, 40):
    out, calls = work / str(deadly), 0

    def watch(event, args):
        global calls
        writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if (writes or event in changes) and str(args[0]).startswith(str(out)):
            calls += 1
            if calls == deadly:
                os._exit(9)

    shutil.copytree(template, out)
    child = os.fork()
    if not child:
        sys.addaudithook(watch)
        build_dataset(source, out, overwrite=True, workers=1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code)
    if not code:
        break
"""


def test_a_kill_at_any_moment_leaves_a_whole_set(tmp_path: Path) -> None:
    """Killed before every single change that a build makes to the folder, one after another."""
    before = build(tmp_path, [entry("q", "old")]).content_sha256
    (tmp_path / "other.json").write_text(json.dumps([entry("q", "new")] * 2))
    build_dataset(tmp_path / "other.json", tmp_path / "other")
    after = open_dataset(tmp_path / "other").content_sha256
    (tmp_path / "work").mkdir()
    arguments = [tmp_path / "other.json", tmp_path / "set", tmp_path / "work"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], check=True, capture_output=True, text=True
    )
    codes = [int(code) for code in done.stdout.split()]
    assert codes == [9] * (len(codes) - 1) + [0]
    states = [tmp_path / "work" / str(number) for number in range(1, len(codes) + 1)]
    found = [open_dataset(state).content_sha256 for state in states]
    for state, content in zip(states, found, strict=True):
        wanted = snapshot(tmp_path / ("set" if content == before else "other"))
        assert wanted.items() <= snapshot(state).items()
    assert snapshot(states[-1]) == snapshot(tmp_path / "other")
    switched = found.index(after)
    assert found == [before] * switched + [after] * (len(found) - switched)
    assert switched > 8 and len(found) - switched > 4


FULL = """
import resource, sys
from pathlib import Path
from megatron_vlm.data.build import build_dataset
from megatron_vlm.errors import DataError

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    build_dataset(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True, workers=2)
except DataError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [5_000, 70_000])
def test_a_full_disk_leaves_the_old_set_and_nothing_else(tmp_path: Path, limit: int) -> None:
    build(tmp_path, [entry("q", "a")])
    before = snapshot(tmp_path / "set")
    picture(200, 200).save(tmp_path / "a.png")
    source = tmp_path / "large.json"
    source.write_text(json.dumps([entry("q", "a", ["a.png"])] * 20))
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "set"), str(limit)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert "cannot be written (File too large)" in done.stdout
    assert snapshot(tmp_path / "set") == before
    assert not (tmp_path / "set" / "building.tmp").exists()


def test_a_build_that_cannot_switch_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    def unwanted(*args: object, **options: object) -> None:
        raise AssertionError("encoded again")

    before = build(tmp_path, [entry("q", "a")])
    source = [entry("q", "b")]
    with monkeypatch.context() as patch:
        patch.setattr(build_publish, "write_atomic", full)
        with pytest.raises(DataError, match="cannot be written .No space left"):
            build(tmp_path, source, overwrite=True)
    assert open_dataset(tmp_path / "set").content_sha256 == before.content_sha256
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encode_entry", unwanted)
        build_dataset(tmp_path / "source.json", tmp_path / "set", overwrite=True)
    assert open_dataset(tmp_path / "set").content_sha256 != before.content_sha256
    build_dataset(tmp_path / "source.json", tmp_path / "other")
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "other")


def test_what_an_interrupted_build_left_is_replaced(tmp_path: Path) -> None:
    build(tmp_path, [entry("q", "a")])
    (tmp_path / "set" / "dataset.json").rename(tmp_path / "set" / "dataset.json.tmp")
    (tmp_path / "set" / "building.tmp").mkdir()
    (tmp_path / "set" / "building.tmp" / "shard-00000.tar").write_bytes(b"half")
    with pytest.raises(DataError, match=r"dataset\.json: missing"):
        open_dataset(tmp_path / "set")
    index = build(tmp_path, [entry("q", "b")])
    left = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert left == sorted([index.folder.name, "dataset.json"])
