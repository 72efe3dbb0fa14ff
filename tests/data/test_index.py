"""Opening a data set: what is checked of its columns, however many there are, and what is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from megatron_vlm.data import index_file
from megatron_vlm.data.format import COLUMNS, STILL, column_length
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.index_file import (
    Limits,
    check_columns,
    find_columns,
    map_columns,
    write_columns,
)
from megatron_vlm.errors import DataError
from tests.data.samples import build, entry, files_of

pytestmark = pytest.mark.unit

Columns = dict[str, NDArray[Any]]

SHARDS = (10_000, 20_000)


def columns_of(pictures: list[int], seed: int = 0) -> Columns:
    """Samples with so many pictures each; all of it possible."""
    rng = np.random.default_rng(seed)
    samples, total = len(pictures), sum(pictures)
    text = rng.integers(1, 20, samples) + np.array(pictures)
    positions = [
        np.sort(rng.choice(int(length), count, replace=False))
        for length, count in zip(text, pictures, strict=True)
    ]
    found = {
        "sample_entry": np.arange(samples) * 2,
        "sample_draft": np.zeros(samples),
        "sample_origin": rng.integers(0, 3, samples),
        "sample_shard": rng.integers(0, 2, samples),
        "sample_offset": rng.integers(0, 9_000, samples),
        "sample_size": 128 + 8 * text,
        "sample_text_tokens": text,
        "sample_loss_tokens": rng.integers(0, text + 1),
        "sample_picture_start": np.cumsum([0, *pictures]),
        "picture_shard": rng.integers(0, 2, total),
        "picture_offset": rng.integers(0, 9_000, total),
        "picture_size": rng.integers(0, 1_000, total),
        "picture_height": rng.integers(1, 5_000, total),
        "picture_width": rng.integers(1, 5_000, total),
        "picture_position": np.concatenate([np.zeros(0), *positions]),
        "picture_max_tokens": rng.integers(0, 3, total) * 128,
        "picture_pts": np.full(total, STILL),
    }
    return {name: found[name].astype(dtype) for name, dtype in COLUMNS.items()}


def check(folder: Path, columns: Columns, **limits: Any) -> None:
    """Write the columns in pieces, and check them."""
    samples, pictures = len(columns["sample_entry"]), len(columns["picture_height"])
    path = folder / "index.safetensors"
    write_columns(path, samples, pictures, lambda name: np.array_split(columns[name], 3))
    given = {"shard_sizes": SHARDS, "origins": 3, "kind": "conversation", **limits}
    check_columns(path, find_columns(path), Limits(samples, pictures, **given))


@pytest.fixture(params=[1 << 16, 6, 2])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are looked at in pieces of very different sizes."""
    monkeypatch.setattr(index_file, "_PIECE", request.param)


MANY = [0, 3, 1, 0, 0, 25, 2, 0, 1, 1, 0, 9, 0]
LAYOUTS = [[], [0], [0, 0, 0], [4], MANY, MANY * 3, [0] * 20 + [5], [5] + [0] * 20]


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("pictures", LAYOUTS)
def test_what_is_written_is_what_others_read(tmp_path: Path, pictures: list[int]) -> None:
    columns = columns_of(pictures)
    check(tmp_path, columns)
    path = tmp_path / "index.safetensors"
    mapped, loaded = map_columns(path, find_columns(path)), load_file(path)
    assert set(mapped) == set(loaded) == set(COLUMNS)
    for name, dtype in COLUMNS.items():
        for found in (mapped[name], loaded[name]):
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, columns[name])
        if len(mapped[name]):
            assert not mapped[name].flags.writeable
            assert mapped[name].ctypes.data % mapped[name].itemsize == 0


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(
    ("column", "values", "what"),
    [
        ("sample_shard", (-1, 2, 2**31 - 1), "points outside"),
        ("sample_offset", (-1, 20_000, 2**63 - 1), "points outside"),
        ("sample_size", (-1, 20_001, 2**63 - 1), "points outside"),
        ("sample_size", (0,), "fewer bytes than tokens"),
        ("sample_text_tokens", (0, -1), "impossible numbers of tokens|impossible place"),
        ("sample_text_tokens", (2**31 - 1,), "fewer bytes than tokens"),
        ("sample_loss_tokens", (-1, 60, 2**31 - 1), "impossible numbers of tokens"),
        ("sample_entry", (-1,), "no place in its source"),
        ("sample_draft", (-1,), "no place in its source"),
        ("sample_origin", (-1, 3), "comes from no known file"),
        ("sample_picture_start", (-1, 2**62, -(2**62)), "has impossible pictures"),
        ("picture_shard", (-1, 2), "points outside"),
        ("picture_offset", (-1, 20_000), "points outside"),
        ("picture_size", (-1, 20_001), "points outside"),
        ("picture_height", (0, -5), "a side below 1"),
        ("picture_width", (0, -5), "a side below 1"),
        ("picture_max_tokens", (-1,), "a negative number of tokens"),
        ("picture_position", (-1, 60, 2**31 - 1), "impossible place"),
    ],
)
def test_every_entry_is_checked(
    tmp_path: Path, column: str, values: tuple[int, ...], what: str
) -> None:
    good = columns_of(MANY)
    length = len(good[column])
    owner = "sample" if column.startswith("sample") else "picture"
    for number in (*range(0, length, max(1, length // 9)), length - 1):
        for value in values:
            damaged = {**good, column: good[column].copy()}
            damaged[column][number] = value
            with pytest.raises(DataError, match=rf"{owner} \d+ .*({what})|picture .*({what})"):
                check(tmp_path, damaged)


@pytest.mark.usefixtures("_pieces")
def test_placeholders_ascend_within_their_sample(tmp_path: Path) -> None:
    good = columns_of(MANY)
    start = good["sample_picture_start"]
    owner = np.repeat(np.arange(len(MANY)), MANY)
    for number in range(1, len(owner)):
        swapped = {**good, "picture_position": good["picture_position"].copy()}
        positions = swapped["picture_position"]
        positions[[number - 1, number]] = positions[[number, number - 1]]
        if owner[number - 1] == owner[number]:
            with pytest.raises(DataError, match=rf"picture {number} has an impossible place"):
                check(tmp_path, swapped)
        same = {**good, "picture_position": good["picture_position"].copy()}
        same["picture_position"][number] = same["picture_position"][number - 1]
        if number not in start:
            with pytest.raises(DataError, match=rf"picture {number} has an impossible place"):
                check(tmp_path, same)


@pytest.mark.usefixtures("_pieces")
def test_pictures_belong_to_samples_in_order(tmp_path: Path) -> None:
    good = columns_of(MANY)
    for change in (
        lambda start: start + 1,
        lambda start: np.concatenate([start[:-1], [start[-1] - 1]]),
        lambda start: np.concatenate([start[:6], start[5:6] - 1, start[7:]]),
    ):
        moved = change(good["sample_picture_start"]).astype(np.int64)
        with pytest.raises(DataError, match=r"sample \d+ has impossible pictures"):
            check(tmp_path, {**good, "sample_picture_start": moved})


@pytest.mark.usefixtures("_pieces")
def test_preferences_come_in_pairs(tmp_path: Path) -> None:
    good = columns_of(MANY[:12])
    good["sample_entry"] = np.arange(12) // 2
    good["sample_draft"] = (np.arange(12) % 2).astype(np.int32)
    check(tmp_path, good, kind="preference")
    with pytest.raises(DataError, match="3 samples, but a preference set has pairs"):
        check(tmp_path, columns_of([0, 0, 0]), kind="preference")
    for column, value in (("sample_entry", 9), ("sample_draft", 0)):
        damaged = {**good, column: good[column].copy()}
        damaged[column][7] = value
        check(tmp_path, damaged)
        with pytest.raises(DataError, match="sample 6 is not one of a pair"):
            check(tmp_path, damaged, kind="preference")


def test_lengths_of_columns(tmp_path: Path) -> None:
    good = columns_of(MANY)
    path = tmp_path / "index.safetensors"
    for name in COLUMNS:
        save_file({**good, name: good[name][:-1]}, path)
        limits = Limits(len(MANY), sum(MANY), SHARDS, 3, "conversation")
        expected = column_length(name, len(MANY), sum(MANY))
        with pytest.raises(DataError, match=rf"{name} has {expected - 1} entries.* {expected};"):
            check_columns(path, find_columns(path), limits)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    check(tmp_path, columns_of(MANY))
    path = tmp_path / "index.safetensors"
    places = find_columns(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="ends early"):
        check_columns(path, places, Limits(len(MANY), sum(MANY), SHARDS, 3, "conversation"))


def reopen(folder: Path, **changes: Any) -> DatasetIndex:
    record = json.loads((folder / "set" / "dataset.json").read_text())
    (folder / "changed").mkdir(exist_ok=True)
    (folder / "changed" / record["folder"]).unlink(missing_ok=True)
    (folder / "changed" / record["folder"]).symlink_to(files_of(folder))
    (folder / "changed" / "dataset.json").write_text(json.dumps({**record, **changes}))
    return open_dataset(folder / "changed")


def test_what_the_record_says_is_checked(tmp_path: Path) -> None:
    build(tmp_path, [entry("q", "a")])
    rule = {"convention": "absolute", "min_pixels": 1, "max_pixels": 9, "unit": 28}
    assert reopen(tmp_path, coordinates=rule).coordinates == rule
    for kind in ("poem", None, ["conversation"]):
        with pytest.raises(DataError, match="kind .* unknown"):
            reopen(tmp_path, kind=kind)
    for coordinates in (
        *(None, [], {}, {"convention": "polar"}),
        *({**rule, "unit": 0}, {**rule, "max_pixels": "9"}, {"convention": "absolute"}),
    ):
        with pytest.raises(DataError, match="coordinates .* unknown"):
            reopen(tmp_path, coordinates=coordinates)
    with pytest.raises(DataError, match=r"origins\.json: \d+ bytes"):
        reopen(tmp_path, origins={"name": "origins.json", "bytes": 1, "count": 1})
    with pytest.raises(DataError, match="sample 0 comes from no known file"):
        size = (files_of(tmp_path) / "origins.json").stat().st_size
        reopen(tmp_path, origins={"name": "origins.json", "bytes": size, "count": 0})


@pytest.mark.parametrize("content", ["{}", "[1]", "[", "[" * 100_000])
def test_damaged_origins(tmp_path: Path, content: str) -> None:
    index = build(tmp_path, [entry("q", "a")])
    (index.folder / "origins.json").write_text(content)
    with pytest.raises(DataError, match=r"origins\.json: "):
        _ = index.origins
    assert "from file 0 of the source" in index.describe(0)
