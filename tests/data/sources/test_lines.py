"""Lines, strict JSON, and the files that a path stands for."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.sources import lines
from megatron_vlm.data.sources.byte_ranges import ByteRange, files_below, names_of
from megatron_vlm.data.sources.lines import find_lines, find_paragraphs
from megatron_vlm.data.sources.strict_json import parse_json, write_json
from megatron_vlm.errors import DataError

pytestmark = pytest.mark.unit


def texts(path: Path, found: Any) -> list[tuple[int, bytes]]:
    content = path.read_bytes()
    return [(line.number, content[line.offset : line.offset + line.size]) for line in found]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_lines_are_those_of_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(lines, "_PIECE_BYTES", piece)
    rng = random.Random(piece)
    path = tmp_path / "x"
    for _ in range(60):
        content = bytes(rng.choices(b"ab \t\r\n\n", k=rng.randint(0, 40)))
        path.write_bytes(content)
        expected = [
            (number, line.removesuffix(b"\r"))
            for number, line in enumerate(content.split(b"\n"), 1)
            if line.strip(b" \t\r")
        ]
        assert texts(path, find_lines(path)) == expected


def test_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfab\ncd")
    assert texts(path, find_lines(path)) == [(1, b"ab"), (2, b"cd")]


def test_paragraphs_are_parted_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\n\na\nb\r\n \t\r\n\nc\n\nd\ne\n")
    assert texts(path, find_paragraphs(path)) == [(3, b"a\nb"), (7, b"c"), (9, b"d\ne")]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: cannot be read"):
        list(find_lines(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "encoded",
    [
        b"NaN",
        b'{"a": [Infinity]}',
        b"-Infinity",
        b"1e999",
        b"[-1.5e400]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 50_000 + b"]" * 50_000,
        b'"\xff"',
        b'{"a": 1',
        b"{} {}",
        b"",
        b"9" * 5000,
        b"\x00",
        b'"\n"',
    ],
)
def test_json_that_is_refused(encoded: bytes) -> None:
    with pytest.raises(DataError):
        parse_json(encoded)


def test_json_that_is_taken() -> None:
    value = {"a": [1, -2.5, True, None, "ü\ud800"], "b": {}}
    assert parse_json(json.dumps(value).encode()) == value
    assert json.loads(write_json(value)) == value


def test_json_that_cannot_be_written() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), [float("inf")], deep):
        with pytest.raises(DataError):
            write_json(value)
    while deep:  # taken apart here: Python would recurse into it when it is freed
        deep = deep.pop()


def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.TXT", ".x.txt", ".git/y.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    files = files_below(tmp_path, [".txt"], "text")
    assert names_of(tmp_path, files) == ["a.TXT", "b/10.txt", "b/2.txt"]
    assert names_of(files[0], files_below(files[0], [".json"], "text")) == ["a.TXT"]


def test_nothing_there_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "no", "no: does not exist; expected text"),
        (tmp_path / "pipe", "pipe: is neither a file nor a folder"),
        (tmp_path, "holds no file with .txt; expected text"),
    ]:
        with pytest.raises(DataError, match=message):
            files_below(path, [".txt"], "text")


def test_range_that_the_file_no_longer_has(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert ByteRange(path, 3, 4, "it").read() == b"3456"
    assert ByteRange(path, 3, 0, "it").read() == b""
    with pytest.raises(DataError, match="it: became shorter"):
        ByteRange(path, 3, 8, "it").read()
    path.unlink()
    with pytest.raises(DataError, match="it: cannot be read"):
        ByteRange(path, 3, 4, "it").read()
