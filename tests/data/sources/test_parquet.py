"""Rows of Parquet files are entries like any others."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.draft import Picture, Text
from megatron_vlm.data.sources.opening import open_source
from megatron_vlm.errors import DataError
from tests.data.sources.reading import EOS, all_facts, asked, assert_resumes, said, write_lines

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

pytestmark = pytest.mark.unit


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_are_what_lines_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    rows = [
        {"images": [None, "a.png"], "texts": [f"text {i}", None], "n": i / 2} for i in range(150)
    ]
    rows[7]["texts"] = [None, None]
    one = tmp_path / "rows"
    other = tmp_path / "lines"
    one.mkdir()
    other.mkdir()
    write(one / "0.parquet", rows[:100], row_group_size=40)
    write(one / "1.parquet", rows[100:])
    write_lines(other / "0.jsonl", rows[:100])
    write_lines(other / "1.jsonl", rows[100:])
    for folder in (one, other):
        (folder / "a.png").write_bytes(b"picture")
    source = open_source(one)
    assert source.total == 150
    listing = assert_resumes(source)
    lines = all_facts(open_source(other))
    assert listing[7][3] == "0.parquet row 7: holds no text, so there is nothing to learn"
    assert listing[:7] + listing[8:] == lines[:7] + lines[8:]


def test_pictures_in_rows(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2)
    row = {
        "images": [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": "2.png"}],
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "image", "text": None},
                    {"type": "text", "text": "q"},
                ],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        "when": when,
        "score": float("nan"),
    }
    source = open_source(write(tmp_path / "x.parquet", [row]))
    assert source.kind == "preference"
    ((_, _, _, samples),) = assert_resumes(source)
    for answer, (parts, media, kept) in zip("ab", samples, strict=True):
        assert parts == [*asked(Picture(0), Picture(1), "q"), *said(answer), EOS]
        assert media == [b"one", b"two"]
        assert kept["images"] == [
            {"bytes": "<3 bytes>", "path": None},
            {"bytes": "<3 bytes>", "path": "2.png"},
        ]
        assert kept["when"] == str(when) and kept["score"] is None


def test_text_rows(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.parquet", [{"text": "a", "id": "i", "blob": b"12"}]))
    assert all_facts(source) == [
        (0, 0, "i", [([Text("a", True), EOS], [], {"id": "i", "blob": "<2 bytes>"})])
    ]


def test_a_text_that_is_none_is_one_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path)
    found = [item[3] for item in assert_resumes(open_source(path, "text"))]
    assert [isinstance(item, str) for item in found] == [False, True, False]
    assert found[1].startswith("x.parquet row 1: a value that cannot be read ('utf-8' codec")


def test_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(DataError, match="x.parquet: cannot be read as Parquet"):
        open_source(path)


def test_mutated_files_never_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"text": f"text {i}"} for i in range(20)])
    whole = path.read_bytes()
    rng = random.Random(1)
    failed = 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            all_facts(open_source(path, "text"))
        except DataError as error:
            assert "x.parquet" in str(error)
            failed += 1
    assert failed > 20
