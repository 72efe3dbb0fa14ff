"""Random access to shards, and every way in which a shard can be wrong."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data import fetch
from megatron_vlm.data.chat import encode_conversation
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.samples import build, entry, mixed_entries, picture

pytestmark = pytest.mark.unit


def turns_of(item: dict[str, Any]) -> list[tuple[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [(roles[turn["from"]], turn["value"]) for turn in item["conversations"]]


def test_samples_and_pictures_come_back_from_many_threads(tmp_path: Path) -> None:
    entries = mixed_entries(tmp_path)
    index = build(tmp_path, entries, shard_mb=1)
    tokenizer = byte_tokenizer()

    def check(sample: int) -> int:
        item = entries[sample]
        images = item.get("images", [])
        expected = encode_conversation(tokenizer, turns_of(item), len(images))  # type: ignore[arg-type]
        np.testing.assert_array_equal(reader.read_tokens(sample), expected)
        for ordinal, name in enumerate(images):
            assert reader.read_encoded(sample, ordinal) == (tmp_path / name).read_bytes()
        return len(images)

    order = np.random.default_rng(0).permutation(np.repeat(range(len(entries)), 3)).tolist()
    with SampleReader(index) as reader, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(check, order)) == 3 * index.num_pictures
        columns = index.columns
        expected = 3 * (columns.sample_size.sum() + columns.picture_size.sum())
        assert reader.bytes_read == expected


def test_a_reader_may_be_used_after_closing(tmp_path: Path) -> None:
    reader = SampleReader(build(tmp_path, [entry("q", "a")]))
    first = reader.read_tokens(0)
    reader.close()
    reader.close()
    np.testing.assert_array_equal(reader.read_tokens(0), first)
    reader.close()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_of_other_writers(version: tuple[int, int]) -> None:
    tokens = np.arange(14, dtype=np.int32).reshape(2, 7)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, tokens, version=version)
    np.testing.assert_array_equal(fetch._parse_npy(buffer.getvalue(), 7), tokens)


def test_no_such_picture(tmp_path: Path) -> None:
    with (
        SampleReader(build(tmp_path, [entry("q", "a")])) as reader,
        pytest.raises(IndexError),
    ):
        reader.read_encoded(0, 0)


def test_truncated_and_missing_shards_are_named(tmp_path: Path) -> None:
    # Changed after opening: opening itself would have refused.
    index = build(tmp_path, mixed_entries(tmp_path, 8))
    shard = index.folder / "shard-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000])
    with SampleReader(index) as reader:
        reader.read_tokens(0)
        with pytest.raises(
            DataError, match=r"shard-00000\.tar: cannot be read .truncated: .* ends at 3000"
        ):
            reader.read_tokens(7)
        with pytest.raises(DataError, match=r"shard-00000\.tar: cannot be read .truncated"):
            reader.read_encoded(7, 2)
    shard.unlink()
    with (
        SampleReader(index) as reader,
        pytest.raises(DataError, match=r"shard-00000\.tar: cannot be read .No such file"),
    ):
        reader.read_tokens(0)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_damaged_content_names_the_sample(tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("q", "a", ["a.png"]), entry("r", "b", ["a.png"])])
    shard = index.folder / "shard-00000.tar"
    tokens = int(index.columns.sample_offset[1])
    with SampleReader(index) as reader:
        # 128 bytes of header, then the ids: the placeholder is gone.
        overwrite(shard, tokens + 128 + 4, np.int32(65).tobytes())
        with pytest.raises(DataError, match="sample 1 .*not what the index says"):
            reader.read_tokens(1)
        # The flags follow the ids: a placeholder may not become a target in place of a token.
        overwrite(shard, tokens + 128 + 4, np.int32(258).tobytes())
        assert reader.read_tokens(1)[1, 1] == 0
        flags = reader.read_tokens(1)[1].copy()
        flags[[1, -1]] = 1, 0
        overwrite(shard, tokens + 128 + flags.nbytes, flags.tobytes())
        with pytest.raises(DataError, match="sample 1 .*not what the index says"):
            reader.read_tokens(1)
        overwrite(shard, tokens, b"nonsense")
        with pytest.raises(DataError, match="sample 1 .*tokens are damaged"):
            reader.read_tokens(1)
        assert reader.read_tokens(0).shape[0] == 2


def test_index_of_another_set(tmp_path: Path) -> None:
    picture(30, 40).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("q", "a", ["a.png"])])
    from safetensors.numpy import load_file, save_file

    path = index.folder / "index.safetensors"
    columns = load_file(path)
    columns["picture_width"][:] = 41
    columns["sample_loss_tokens"][:] += 1
    save_file(columns, path, metadata={"format_version": "1"})
    record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert record["index"]["bytes"] == path.stat().st_size
    index = open_dataset(tmp_path / "set")
    with SampleReader(index) as reader:
        with pytest.raises(DataError, match="not what the index says"):
            reader.read_tokens(0)


def test_storage_that_goes_away_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = build(tmp_path, mixed_entries(tmp_path, 8))
    shard = index.folder / "shard-00000.tar"
    reader = SampleReader(index, retry_seconds=30)
    first = reader.read_tokens(0)
    # What a network file system does: the open file is stale, and the name leads nowhere.
    os.truncate(shard, 0)
    content = shard.with_suffix(".away")
    with SampleReader(index) as impatient, pytest.raises(DataError, match="truncated"):
        impatient.read_tokens(1)
    shard.unlink()
    build(tmp_path, mixed_entries(tmp_path, 8), overwrite=True)
    shard.rename(content)
    Timer(1.0, lambda: content.rename(shard)).start()
    started = monotonic()
    assert reader.read_tokens(0).tolist() == first.tolist()
    assert monotonic() - started > 0.5
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "trying again for" in told[0] and str(shard) in told[0]


def test_closing_ends_the_trying(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a")])
    (index.folder / "shard-00000.tar").unlink()
    reader = SampleReader(index, retry_seconds=600)
    Timer(0.3, reader.close).start()
    started = monotonic()
    with pytest.raises(DataError, match="cannot be read"):
        reader.read_tokens(0)
    assert monotonic() - started < 60
