"""A build that was ended early goes on: whatever the moment, the same bytes in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data import build as build_module
from megatron_vlm.data import build_publish
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.build_state import BuildState, only_one
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.shards import ShardWriter
from megatron_vlm.errors import DataError
from tests.data.samples import entry, picture, snapshot

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "megabyte" of a kilobyte."""
    monkeypatch.setattr(build_module, "_MEGABYTE", 1024)


def write_source(folder: Path, count: int = 10) -> Path:
    """Pictures, texts, and bad entries at the start, between and at the end."""
    entries: list[Any] = ["bad"]
    for number in range(count):
        name = f"{number}.png"
        picture(60, 60, number).save(folder / name)
        entries.append(entry("q", f"a{number}", [name] * (number % 3), id=number))
        if number % 4 == 0:
            entries.append(entry("q", "a", ["none.png"], id=f"lost {number}"))
    (folder / "source.json").write_text(json.dumps([*entries, {"id": "last"}]))
    return folder / "source.json"


def run(source: Path, out: Path, **options: Any) -> None:
    build_dataset(source, out, **{"shard_mb": 24, "workers": 2, **options})


KILLED = """
import os, shutil, sys
from pathlib import Path
from megatron_vlm.data import build

build._MEGABYTE = 1024
# A kill loses nothing that was written; only a loss of power would.
os.fsync = lambda descriptor: None
source, template, work = map(Path, sys.argv[1:])
changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

def run(out, deadly):
    calls = 0

    def watch(event, args):
        nonlocal calls
        writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if (writes or event in changes) and str(args[0]).startswith(str(out)):
            calls += 1
            if calls == deadly:
                os._exit(9)

    child = os.fork()
    if not child:
        sys.addaudithook(watch)
        build.build_dataset(source, out, overwrite=True, workers=1, shard_mb=12)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for deadly in range(1, 200):
    out = work / str(deadly)
    shutil.copytree(template, out)
    code = run(out, deadly)
    # And once more, later on.
    again = run(out, 3 + deadly % 7)
    last = run(out, 0) if again else 0
    print(code, last)
    if not code:
        break
"""


def test_killed_at_every_change_and_run_again(tmp_path: Path) -> None:
    source = write_source(tmp_path, 6)
    run(source, tmp_path / "whole", shard_mb=12)
    wanted = snapshot(tmp_path / "whole")
    assert len(open_dataset(tmp_path / "whole").shard_names) == 4
    assert len(wanted[next(name for name in wanted if "rejected" in name)].splitlines()) == 4
    (tmp_path / "other.json").write_text(json.dumps([entry("q", "old")]))
    run(tmp_path / "other.json", tmp_path / "set")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", KILLED, source, tmp_path / "set", tmp_path / "work"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    codes = [line.split() for line in done.stdout.splitlines()]
    assert codes == [["9", "0"]] * (len(codes) - 1) + [["0", "0"]]
    assert len(codes) > 40
    for number in range(1, len(codes) + 1):
        assert snapshot(tmp_path / "work" / str(number)) == wanted, number


SLOWLY = """
import sys, time
from pathlib import Path
from megatron_vlm.data import build, shards

build._MEGABYTE = 1024
member = shards.ShardWriter._member

def slowly(*args):
    time.sleep(0.004)
    return member(*args)

shards.ShardWriter._member = slowly
source, out = map(Path, sys.argv[1:])
build.build_dataset(source, out, workers=3, shard_mb=24, show_progress=True)
"""


def test_killed_by_the_system_again_and_again(tmp_path: Path) -> None:
    source = write_source(tmp_path, 40)
    run(source, tmp_path / "whole")
    command = [sys.executable, "-c", SLOWLY, str(source), str(tmp_path / "set")]

    def complete() -> int:
        return len(list((tmp_path / "set").glob("building.tmp/shard-*.json")))

    for kill in range(3):
        before = complete()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and complete() < before + 2:
            time.sleep(0.002)
        time.sleep(0.007 * kill)
        process.send_signal(signal.SIGKILL)
        assert process.stderr is not None
        assert ("going on at entry" in process.stderr.read()) == bool(before)
        assert process.wait() == -signal.SIGKILL
        assert complete() >= before + 2
    subprocess.run(command, check=True, capture_output=True)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def interrupted(source: Path, out: Path, shards: int, **options: Any) -> None:
    """A build that Ctrl-C ends once so many shards are complete."""
    original = ShardWriter.add

    def add(writer: ShardWriter, encoded: Any) -> None:
        if len(writer._complete) == shards:
            raise KeyboardInterrupt
        original(writer, encoded)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "add", add)
        run(source, out, **options)


def entries_read(source: Path, out: Path, **options: Any) -> int:
    """Entries that a build encodes."""
    numbers = []
    original = build_module.encode_entry

    def counted(given: Any, *args: Any, **settings: Any) -> Any:
        numbers.append(given.number)
        return original(given, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "encode_entry", counted)
        run(source, out, **options)
    return len(numbers)


def test_ctrl_c_keeps_complete_shards_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path)
    run(source, tmp_path / "whole")
    interrupted(source, tmp_path / "set", 2, show_progress=True)
    assert "2 complete shards stay; the same command goes on there" in capsys.readouterr().err
    kept = {path.name for path in (tmp_path / "set" / "building.tmp").iterdir()}
    suffixes = ("tar", "columns", "rejected", "json")
    assert kept == {"resume.json"} | {f"shard-0000{n}.{s}" for n in (0, 1) for s in suffixes}
    folder = tmp_path / "set" / "building.tmp"
    records = [json.loads((folder / f"shard-0000{n}.json").read_text()) for n in (0, 1)]
    samples, first = sum(r["samples"] for r in records), records[1]["next_entry"]
    total = len(json.loads(source.read_text()))
    read = entries_read(source, tmp_path / "set", show_progress=True)
    assert read == total - first < total
    said = capsys.readouterr().err
    assert f"2 shards of {samples} samples are complete; going on at entry {first}\n" in said
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_an_interruption_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    interrupted(write_source(tmp_path), tmp_path / "set", 0)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("change", ["source", "touched", "option", "tokenizer", "version"])
def test_another_build_starts_anew(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path)
    interrupted(source, tmp_path / "set", 2)
    options: dict[str, Any] = {}
    total = len(json.loads(source.read_text()))
    if change == "source":
        source.write_text(source.read_text().replace("a3", "b3"))
    elif change == "touched":
        later = source.stat().st_mtime_ns + 10**9
        os.utime(source, ns=(later, later))
    elif change == "option":
        options = {"shard_mb": 25}
    elif change == "tokenizer":
        tokenizer = build_module.byte_tokenizer()
        tokenizer._backend.add_tokens(["zebra"])
        options = {"tokenizer": tokenizer}
    else:
        monkeypatch.setattr("megatron_vlm.data.build_state.version", lambda package: "another")
    assert entries_read(source, tmp_path / "set", **options) == total
    run(source, tmp_path / "whole", **options)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("suffix", ["tar", "columns", "rejected", "json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_written_again(tmp_path: Path, suffix: str, damage: str) -> None:
    source = write_source(tmp_path)
    run(source, tmp_path / "whole")
    interrupted(source, tmp_path / "set", 3)
    path = tmp_path / "set" / "building.tmp" / f"shard-00001.{suffix}"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] or b"more")
    first = json.loads((path.parent / "shard-00000.json").read_text())["next_entry"]
    total = len(json.loads(source.read_text()))
    assert entries_read(source, tmp_path / "set") == total - first
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_a_full_disk_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path)
    run(source, tmp_path / "whole")
    original = ShardWriter._member

    def full(writer: ShardWriter, name: str, content: bytes) -> tuple[int, int]:
        if len(writer._complete) == 2:
            raise OSError(28, "No space left on device", name)
        return original(writer, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_member", full)
        with pytest.raises(DataError, match="No space left"):
            run(source, tmp_path / "set")
    assert entries_read(source, tmp_path / "set") < len(json.loads(source.read_text()))
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("shard_mb", [12, 24, 10_000])
def test_ended_just_before_the_end(tmp_path: Path, shard_mb: int) -> None:
    """Whether the last bad entries follow the last shard or lie in it."""
    source = write_source(tmp_path)
    run(source, tmp_path / "whole", shard_mb=shard_mb)

    def ended(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildState, "publish", ended)
        run(source, tmp_path / "set", shard_mb=shard_mb)
    assert entries_read(source, tmp_path / "set", shard_mb=shard_mb) <= 2
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_ended_once_the_set_was_in_place(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    run(source, tmp_path / "whole")

    def ended(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildState, "remove", ended)
        run(source, tmp_path / "set")
    left = snapshot(tmp_path / "set")
    assert snapshot(tmp_path / "whole").items() < left.items()
    with pytest.raises(DataError, match="add --overwrite"):
        run(source, tmp_path / "set", shard_mb=12)
    assert snapshot(tmp_path / "set") == left
    assert entries_read(source, tmp_path / "set") == 0
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_what_another_build_was_about_to_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(build_publish, "write_atomic", full)
        with pytest.raises(DataError, match="No space left"):
            run(source, tmp_path / "set")
    run(source, tmp_path / "set", shard_mb=12)
    run(source, tmp_path / "whole", shard_mb=12)
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_files_that_were_to_be_published_and_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path)
    run(source, tmp_path / "whole")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(build_publish, "write_atomic", full)
        with pytest.raises(DataError, match="No space left"):
            run(source, tmp_path / "set")
    [moved] = (tmp_path / "set").glob("*/index.safetensors")
    moved.unlink()
    run(source, tmp_path / "set")
    assert snapshot(tmp_path / "set") == snapshot(tmp_path / "whole")


def test_two_builds_at_once(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    (tmp_path / "set").mkdir()
    with only_one(tmp_path / "set"), pytest.raises(DataError, match="another process is building"):
        run(source, tmp_path / "set")
    run(source, tmp_path / "set")


def test_a_set_cannot_lie_inside_its_source(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    with pytest.raises(DataError, match="lies inside the source"):
        run(tmp_path / "texts", tmp_path / "texts" / "set")
    run(tmp_path / "texts", tmp_path / "set")
    assert open_dataset(tmp_path / "set").kind == "document"
