"""`mvlm data verify`: every byte that differs is found, in any file, and named."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data import build as build_module
from megatron_vlm.data.build_progress import ReadProgress
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.verify import verify_dataset
from megatron_vlm.errors import DataError
from tests.data.samples import build, entry, files_of, picture

pytestmark = pytest.mark.unit


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetIndex:
    """Twelve samples, some with pictures, in three shards or more; one entry was left out."""
    monkeypatch.setattr(build_module, "_MEGABYTE", 1024)
    entries = []
    for number in range(12):
        name = f"{number}.png"
        picture(40, 40, number).save(tmp_path / name)
        entries.append(entry("q", f"answer {number}", [name] * (number % 3)))
    return build(tmp_path, [*entries, entry("q", "a", ["none.png"])], shard_mb=24)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each, as Python's own tarfile finds them."""
    with tarfile.open(path) as tar:
        for member in tar:
            yield member.name, member.offset_data, member.size


def reason_of(folder: Path, name: str) -> str:
    (damage,) = verify_dataset(folder).damaged
    assert damage.name == name
    return damage.reason


def test_a_whole_set(
    tmp_path: Path, built: DatasetIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify_dataset(tmp_path / "set")
    files = list(files_of(tmp_path).iterdir())
    assert len(built.shard_names) >= 3
    assert (found.files, found.damaged) == (len(files), ())
    assert found.bytes == sum(path.stat().st_size for path in files)
    assert main(["data", "verify", str(tmp_path / "set"), "--workers", "2"]) == 0
    assert f"all {len(files)} files (0.00 GB) are as they were built" in capsys.readouterr().out


def test_every_file_is_compared_and_every_damage_is_named(
    tmp_path: Path, built: DatasetIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that a run would not notice: their sizes stay."""
    paths = sorted(built.folder.iterdir())
    names = [path.name for path in paths]
    for path in paths:
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        assert [damage.name for damage in verify_dataset(tmp_path / "set").damaged] == [path.name]
        path.write_bytes(whole)
    for path in paths:
        flip(path, path.stat().st_size - 1)
    assert {damage.name for damage in verify_dataset(tmp_path / "set").damaged} == set(names)
    assert main(["data", "verify", str(tmp_path / "set")]) == 2
    told = capsys.readouterr()
    assert {line.split(":")[0] for line in told.out.splitlines()} == set(names)
    assert told.err.count("\n") == 1
    assert f"set: {len(names)} of {len(names)} files are not as they were built: " in told.err
    assert f"and {len(names) - 3} more; copy them again" in told.err


def test_any_single_byte_of_a_shard(tmp_path: Path, built: DatasetIndex) -> None:
    name = built.shard_names[1]
    path = built.folder / name
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    for offset in rng.integers(len(whole), size=60):
        flip(path, int(offset))
        assert reason_of(tmp_path / "set", name).startswith("its bytes are not those that")
        path.write_bytes(whole)
    assert not verify_dataset(tmp_path / "set").damaged


def test_the_first_sample_that_shows_the_damage_is_named(
    tmp_path: Path, built: DatasetIndex
) -> None:
    """Each member of a shard is damaged in turn, by tarfile's account of where it lies."""
    name = built.shard_names[1]
    path = built.folder / name
    whole = path.read_bytes()
    seen = set()
    for member, offset, size in list(members(path)):
        sample = int(member.split(".")[0])
        extension = member.split(".", 1)[1].lstrip("0123456789.")
        seen.add(extension)
        # A brace, the type of the numbers, a checksum.
        at = {"json": offset, "tokens.npy": offset + 3, "png": offset + size - 15}[extension]
        flip(path, at)
        reason = reason_of(tmp_path / "set", name)
        assert f"it first shows in sample {sample} (entry {sample}, " in reason
        assert f", at {member}: " in reason
        path.write_bytes(whole)
        # Its header.
        flip(path, offset - 512)
        reason = reason_of(tmp_path / "set", name)
        at_or_before = {f"in or after sample {sample - before} " for before in (0, 1)}
        assert any(words in reason for words in at_or_before)
        assert f"no member of a tar begins at byte {offset - 512:,}" in reason
        path.write_bytes(whole)
    assert seen == {"json", "tokens.npy", "png"}
    # Two samples: the first is named.
    places = {member: offset for member, offset, _ in members(path) if member.endswith(".json")}
    for offset in reversed(places.values()):
        flip(path, offset)
    assert f"at {min(places)}: not valid JSON" in reason_of(tmp_path / "set", name)


def test_damage_that_still_reads_is_found_and_placed_nowhere(
    tmp_path: Path, built: DatasetIndex
) -> None:
    name = built.shard_names[0]
    path = built.folder / name
    place = path.read_bytes().index(b"answer")
    flip(path, place)
    assert "cannot be told: all of them can still be read" in reason_of(tmp_path / "set", name)
    open_dataset(tmp_path / "set")


def test_a_hole_of_zeros(tmp_path: Path, built: DatasetIndex) -> None:
    """What a disk gives for blocks that were never written: to a tar reader, an end."""
    path = built.folder / built.shard_names[0]
    content = bytearray(path.read_bytes())
    content[: 1 << 13] = bytes(1 << 13)
    path.write_bytes(content)
    reason = reason_of(tmp_path / "set", path.name)
    assert "in or after sample 0 " in reason and "begins at byte 0" in reason


def test_files_that_are_cut_or_gone(tmp_path: Path, built: DatasetIndex) -> None:
    first, second = (built.folder / name for name in built.shard_names[:2])
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    found = {damage.name: damage.reason for damage in verify_dataset(tmp_path / "set").damaged}
    assert found == {
        first.name: f"has {size - 100:,} bytes; {size:,} were built",
        second.name: "is missing",
    }


def test_what_cannot_be_verified(tmp_path: Path, built: DatasetIndex) -> None:
    path = tmp_path / "set" / "dataset.json"
    record = json.loads(path.read_text())

    def refused(words: str, **changes: object) -> None:
        path.write_text(json.dumps({**record, **changes}))
        with pytest.raises(DataError, match=words) as caught:
            verify_dataset(tmp_path / "set")
        assert "\n" not in str(caught.value)

    older = [{"name": shard["name"], "bytes": shard["bytes"]} for shard in record["shards"]]
    refused(r"set: was built before digests .* cannot be verified; build it again", shards=older)
    open_dataset(tmp_path / "set")
    refused("was built before digests", rejections={})
    refused("'../x' or its sha256", shards=[{**record["shards"][0], "name": "../x"}])
    refused("its sha256 'no' is none", shards=[{**record["shards"][0], "sha256": "no"}])
    refused("folder '..', file", folder="..")
    refused("field 'name' is missing", index={"sha256": "0" * 64})
    refused("format_version 3", format_version=3)
    # Every file is whole, and the record does not fit them.
    refused("column .* entries, but the data set implies", samples=record["samples"] + 1)
    path.unlink()
    with pytest.raises(DataError, match=r"dataset\.json: missing"):
        verify_dataset(tmp_path / "set")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        verify_dataset(tmp_path / "nowhere")


def test_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("megatron_vlm.data.build_progress.time.monotonic", lambda: now)
    with ReadProgress(shown=True).start(0, 10**12) as progress:
        for _ in range(40):
            now += 1
            progress.advance(2 * 10**9)
    line = "verifying: 60.00 of 1,000.00 GB, 2,000 MB/s, 8 minutes left"
    assert capsys.readouterr().err.splitlines() == [line]
