"""Numbers of sets and rows, against plain counts sample by sample."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.format import STILL
from megatron_vlm.data.geometry import target_size
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.look.plots import write_plots
from megatron_vlm.data.look.stats import rejected, row_stats, source_stats
from megatron_vlm.data.stream import RowStream
from megatron_vlm.errors import DataError
from tests.data.samples import VISION, build, entry, index_of, picture, stream_of

pytestmark = pytest.mark.unit


def some_index(count: int, seed: int, kind: str = "conversation") -> DatasetIndex:
    rng = random.Random(seed)
    text, pictures = [], []
    for _ in range(count):
        sizes = [(rng.randint(20, 400), rng.randint(20, 400)) for _ in range(rng.choice((0, 1, 4)))]
        text.append(rng.randint(8, 300))
        pictures.append([(place, *size) for place, size in enumerate(sizes)])
    return index_of(text, pictures, kind)


def tokens_of(height: int, width: int) -> int:
    high, wide = target_size(height, width, VISION)
    return high * wide // 28**2


def plain_count(index: DatasetIndex, seq_length: int, step: int) -> dict[str, object]:
    """One sample after another."""
    columns = index.columns
    found = dict.fromkeys(("samples", "too_long", "text", "picture", "targets", "pictures"), 0)
    lengths, by_pictures = [], {}
    for sample in range(0, index.num_samples, step):
        place = index.picture_range(sample)
        own = [
            tokens_of(int(columns.picture_height[i]), int(columns.picture_width[i])) for i in place
        ]
        text = int(columns.sample_text_tokens[sample]) - len(own)
        found["samples"] += 1
        found["text"] += text
        found["picture"] += sum(own)
        found["targets"] += int(columns.sample_loss_tokens[sample])
        found["pictures"] += len(own)
        found["too_long"] += text + sum(own) > seq_length
        lengths.append(text + sum(own))
        by_pictures[len(own)] = by_pictures.get(len(own), 0) + 1
    return {**found, "lengths": lengths, "by_pictures": by_pictures}


@pytest.mark.parametrize("kind", ["conversation", "preference"])
def test_an_epoch_is_counted(kind: str) -> None:
    index = some_index(200, 1, kind)
    stream = stream_of(index, seq_length=256, vision=VISION, long_samples="skip")
    found = source_stats(stream.sources[0])
    plain = plain_count(index, 256, 2 if kind == "preference" else 1)
    assert found.samples == plain["samples"]
    assert (found.too_long, found.left_out) == (plain["too_long"], plain["too_long"])
    assert found.too_long > 0
    assert (found.text_tokens, found.picture_tokens) == (plain["text"], plain["picture"])
    assert found.targets == plain["targets"]
    assert (found.pictures, found.frames, found.videos) == (plain["pictures"], 0, 0)
    lengths = plain["lengths"]
    assert isinstance(lengths, list) and found.longest == max(lengths)
    expected = [0] * len(found.length_counts)
    for length in lengths:
        for place, edge in enumerate(found.length_edges[1:]):
            if length < edge or place == len(expected) - 1:
                expected[place] += 1
                break
    assert found.length_counts.tolist() == expected
    by_pictures = plain["by_pictures"]
    assert isinstance(by_pictures, dict)
    assert {n: c for n, c in enumerate(found.pictures_per_sample.tolist()) if c} == by_pictures
    sizes = found.sizes
    assert sizes.every == 1 and len(sizes.height) == found.pictures
    assert sizes.tokens.sum() == found.picture_tokens
    for height, width, tokens in zip(sizes.height, sizes.width, sizes.tokens, strict=True):
        assert tokens == tokens_of(int(height), int(width))


def test_large_sets_are_thinned_and_say_so() -> None:
    stream = stream_of(some_index(300, 2), seq_length=2048, vision=VISION)
    source = stream.sources[0]
    whole, part = source_stats(source), source_stats(source, most_pictures=50)
    assert part.sizes.every == -(-whole.pictures // 50) > 1
    assert np.array_equal(part.sizes.height, whole.sizes.height[:: part.sizes.every])
    assert (part.pictures, part.picture_tokens) == (whole.pictures, whole.picture_tokens)


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("conversation", "preference"):
        stream = stream_of(
            some_index(202, 3, kind), seq_length=256, vision=VISION, long_samples="skip"
        )
        whole = source_stats(stream.sources[0])
        monkeypatch.setattr("megatron_vlm.data.look.stats._AT_ONCE", 7)
        parts = source_stats(stream.sources[0])
        monkeypatch.undo()
        names = ("samples", "tokens", "text_tokens", "targets", "pictures", "frames", "videos")
        assert [getattr(parts, n) for n in names] == [getattr(whole, n) for n in names]
        assert np.array_equal(parts.length_counts, whole.length_counts)
        assert np.array_equal(parts.pictures_per_sample, whole.pictures_per_sample)


def test_videos_are_told_from_pictures() -> None:
    """Two videos in a row, the same video twice, a picture between frames, a video in a sample."""
    frames = [
        # (sample, shard, offset, pts)
        (0, 0, 100, 0), (0, 0, 100, 5), (0, 0, 900, 6), (0, 0, 900, 7),
        (1, 0, 500, STILL), (1, 0, 700, 0), (1, 0, 700, 9), (1, 0, 700, 0), (1, 0, 700, 9),
        (3, 0, 700, 10), (3, 0, 500, STILL), (3, 0, 700, 20), (4, 0, 700, 30),
    ]  # fmt: skip
    pictures = [[(k, 50, 50) for k in range([f[0] for f in frames].count(s))] for s in range(5)]
    index = index_of([20] * 5, pictures)
    columns = replace(
        index.columns,
        picture_offset=np.array([f[2] for f in frames], np.int64),
        picture_pts=np.array([f[3] for f in frames], np.int64),
    )
    stream = stream_of(replace(index, columns=columns), seq_length=128, vision=VISION)
    found = source_stats(stream.sources[0])
    assert (found.pictures, found.frames, found.videos) == (13, 11, 7)


def mixed_stream(**changes: object) -> RowStream:
    return stream_of(
        some_index(120, 4), some_index(60, 5), seq_length=512, vision=VISION, long_samples="skip",
        rates=(1.0, 2.0), **changes,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 5, 60, 200])
def test_planned_rows_are_counted(count: int) -> None:
    stream = mixed_stream(max_epochs=(2.0, 2.0))
    found = row_stats(stream, count)
    rows, cursor = stream.take(stream.start(), count)
    assert found.rows == len(rows) <= count
    assert found.ended == (not stream.take(cursor, 1)[0])
    assert found.used.tolist() == [int(row.length.sum()) for row in rows]
    assert found.padded.tolist() == [int(row.padded.sum()) for row in rows]
    tokens, samples = [0, 0], [0, 0]
    for row in rows:
        for source, length in zip(row.source.tolist(), row.length.tolist(), strict=True):
            tokens[source] += length
            samples[source] += 1
    assert found.source_tokens.tolist() == tokens
    assert found.source_samples.tolist() == samples
    assert found.fill == pytest.approx(sum(tokens) / (len(rows) * 512))
    padding = sum(int((row.padded - row.length).sum()) for row in rows)
    assert found.padding == pytest.approx(padding / (len(rows) * 512))
    tails = sum(512 - int(row.padded.sum()) for row in rows)
    assert found.tails == pytest.approx(tails / (len(rows) * 512))
    bounds = found.part_rows.tolist()
    for part, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert int(found.part_tokens[part].sum()) == int(found.used[low:high].sum())


def test_rows_per_epoch() -> None:
    """Over whole epochs, as many rows pass as are told; a source that is never drawn has none."""
    index = index_of([48] * 90)
    stream = stream_of(index, seq_length=64, max_epochs=(3.0,))
    found = row_stats(stream, 10_000)
    assert (found.rows, found.ended) == (270, True)
    assert found.rows_per_epoch(0, stream.sources[0].samples.tokens) == pytest.approx(90)
    both = stream_of(index, index, seq_length=64, rates=(1.0, 0.0))
    assert row_stats(both, 8).rows_per_epoch(1, 100) == float("inf")


def test_rejected(tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("q", "a", ["a.png"]), entry("q", "a", ["lost.png"])])
    assert rejected(index) == 1
    record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    del record["rejected"]
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="tells no number of rejected samples"):
        rejected(index)


@pytest.mark.parametrize(
    ("kind", "pictures"), [("png", True), ("svg", True), ("pdf", False), ("png", False)]
)
def test_drawings(tmp_path: Path, kind: str, pictures: bool) -> None:
    stream = mixed_stream() if pictures else stream_of(index_of([10, 30, 70]), seq_length=128)
    sources = [replace(source_stats(s), name=f"_$x^{{{s.name}$\x00") for s in stream.sources]
    path = tmp_path / "deep" / f"a.{kind}"
    write_plots(path, sources, row_stats(stream, 32), "all of $it\u202e$")
    content = path.read_bytes()
    if kind == "png":
        pixels = np.asarray(Image.open(path).convert("L"))
        # Ink in every panel: the figure is no empty sheet.
        assert pixels.shape[0] > 400 and (pixels < 128).mean() > 0.003
    elif kind == "svg":
        ElementTree.fromstring(content)
        write_plots(tmp_path / "b.svg", sources, row_stats(stream, 32), "all of $it\u202e$")
        assert (tmp_path / "b.svg").read_bytes() == content
    else:
        assert content.startswith(b"%PDF")


def test_drawings_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(index_of([10, 30, 70]), seq_length=128)
    sources, rows = [source_stats(stream.sources[0])], row_stats(stream, 3)
    with pytest.raises(DataError, match=r"drawings end in \.png"):
        write_plots(tmp_path / "a.doc", sources, rows, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_plots(tmp_path / "file" / "a.png", sources, rows, "")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"pip install 'megatron-vlm\[demo\]'"):
        write_plots(tmp_path / "a.png", sources, rows, "")
