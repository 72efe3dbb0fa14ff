"""Tars: where members lie, and that damage is named and not passed over."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from megatron_vlm.data.sources.tar_groups import split_name, tar_groups
from megatron_vlm.data.sources.tar_members import Member, tar_members
from megatron_vlm.errors import DataError
from tests.data.sources.reading import write_tar

pytestmark = pytest.mark.unit

NAMES = [
    "a.txt",
    "folder/" * 12 + "deep.jpg",
    "x" * 180 + ".bin",
    "ünïcödé.png",
    "é" * 140 + ".png",
]
MEMBERS = [(name, name.encode()[:7] * (i * 100)) for i, name in enumerate(NAMES)]
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def reference(path: Path) -> list[Member]:
    """What Python's own library finds."""
    with tarfile.open(path) as tar:
        return [Member(i.name, i.offset_data, i.size) for i in tar if i.isreg()]


def found_before_error(path: Path) -> tuple[list[Member], str]:
    members = []
    try:
        for member in tar_members(path):
            members.append(member)
    except DataError as error:
        return members, str(error)
    return members, ""


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, format: str) -> None:
    path = write_tar(tmp_path / "t.tar", MEMBERS, FORMATS[format])
    assert list(tar_members(path)) == reference(path)
    content = path.read_bytes()
    assert [content[m.offset : m.offset + m.size] for m in tar_members(path)] == [
        content for _, content in MEMBERS
    ]


def test_ustar_prefix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [MEMBERS[1]], tarfile.USTAR_FORMAT)
    assert [m.name for m in tar_members(path)] == [NAMES[1]]


def test_links_and_folders_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"special{kind!r}.txt")
            # Some programs write the size of what a link leads to.
            info.type, info.linkname, info.size = kind, "elsewhere", 700
            tar.addfile(info)
        info = tarfile.TarInfo("file.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [m.name for m in tar_members(path)] == ["file.txt"]


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_times_of_gnu_are_no_prefix(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[345:357] = b"12345670123\0"
    path = tmp_path / "t.tar"
    path.write_bytes(with_checksum(header) + bytes(1024))
    # Python's library takes them for a prefix.
    assert list(tar_members(path)) == [Member("a.txt", 512, 0)]


@pytest.mark.parametrize(
    "content",
    [
        b"99 path=abc\n",
        b"12 path=abc",
        b"path=abc\n",
        b"12 pathabcd\n",
        b"0 \n",
        b"13 size=-1000\n",
    ],
)
def test_pax_headers_that_make_no_sense(tmp_path: Path, content: bytes) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = b"x", len(content)
    path = tmp_path / "t.tar"
    path.write_bytes(
        info.tobuf() + content.ljust(512, b"\0") + tarfile.TarInfo("a.txt").tobuf() + bytes(1024)
    )
    found, error = found_before_error(path)
    assert found == [] and "a pax header" in error


def test_signed_checksum(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("\u00fc.txt").tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(b - 256 * (b > 127) for b in header)
    path = tmp_path / "t.tar"
    path.write_bytes(header + bytes(1024))
    assert [m.name for m in tar_members(path)] == ["\u00fc.txt"]


def test_large_size_in_base_256(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "t.tar"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(512 + info.size + 1024)
    assert list(tar_members(path)) == [Member("huge.bin", 512, 9 * 2**30)]


def test_cut_anywhere_is_named_and_the_rest_served(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", MEMBERS, tarfile.GNU_FORMAT)
    content, members = whole.read_bytes(), reference(whole)
    end = max(m.offset + m.size for m in members)
    path = tmp_path / "cut.tar"
    for size in [*range(1, end, 97), end]:
        path.write_bytes(content[:size])
        found, error = found_before_error(path)
        assert found == [m for m in members if m.offset + m.size <= size]
        assert "cut.tar: damaged at byte" in error


def test_flipped_header_is_named_with_its_byte(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"3")])
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 1] ^= 4
    path.write_bytes(content)
    found, error = found_before_error(path)
    assert [m.name for m in found] == ["a.txt", "b.txt"]
    assert "damaged at byte 2048: a header with a wrong checksum" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 700, None),
        (gzip.compress(b"x" * 2000), "compressed with gzip; unpack"),
        (b"{" * 2000, "damaged at byte 0"),
    ],
)
def test_no_tar(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    found, error = found_before_error(path)
    assert found == []
    assert message in error if message else error == ""


def test_concatenated_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.txt", b"1")])
    path.write_bytes(path.read_bytes() * 2)
    found, error = found_before_error(path)
    assert len(found) == 1
    assert "damaged at byte 10240: more follows the end mark" in error


def test_sparse_and_large_extended_headers_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("s.txt")
    info.type = b"S"
    sparse = tmp_path / "sparse.tar"
    sparse.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "sparse" in found_before_error(sparse)[1]

    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = b"x", 2**40
    large = tmp_path / "large.tar"
    with large.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**41)
    assert "an extended header of" in found_before_error(large)[1]


def test_groups_are_neighbours_with_one_key(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.seg.png", "a/1.JSON", "b/1.jpg", "README", ".hid.txt", "b/1.txt"]
    path = write_tar(tmp_path / "t.tar", [(name, b"") for name in names])
    groups = [(g.key, list(g.members)) for g in tar_groups(path)]
    assert groups == [("a/1", ["jpg", "seg.png", "json"]), ("b/1", ["jpg", "txt"])]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b/c.d.e", ("a.b/c", "d.e")),
        ("c.D", ("c", "d")),
        ("a.b/c", None),
        (".c.d", None),
        ("c.", None),
        ("__meta__.x__", None),
    ],
)
def test_names_split_at_the_first_dot(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


def test_a_group_before_damage_may_lack_members_and_is_not_given(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "t.tar", [("1.jpg", b"x"), ("1.txt", b"x"), ("2.jpg", b"x"), ("2.txt", b"x")]
    )
    content = bytearray(path.read_bytes())
    content[3 * 1024] ^= 1
    path.write_bytes(content)
    keys = []
    with pytest.raises(DataError, match="damaged at byte 3072"):
        for group in tar_groups(path):
            keys.append(group.key)
    assert keys == ["1"]


@pytest.mark.parametrize(("last", "expected"), [("2.txt", ["1"]), ("3.txt", ["1", "2"])])
def test_a_group_is_whole_once_the_next_has_begun(
    tmp_path: Path, last: str, expected: list[str]
) -> None:
    path = write_tar(tmp_path / "t.tar", [("1.jpg", b"x"), ("2.jpg", b"x"), (last, b"x" * 600)])
    path.write_bytes(path.read_bytes()[: 5 * 512 + 1])
    keys = []
    with pytest.raises(DataError, match=f"'{last}' of 600 bytes is cut off"):
        for group in tar_groups(path):
            keys.append(group.key)
    assert keys == expected


def test_mutated_tars_never_crash(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    rng = random.Random(5)
    path = tmp_path / "t.tar"
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            # Headers above all: the padding and contents are bytes like any others.
            content[rng.randrange(len(content) // 512) * 512 + rng.randrange(512)] = rng.choice(
                [0, 0x20, 0x30, 0x37, 0x80, 0xFF, rng.randrange(256)]
            )
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        members, _ = found_before_error(path)
        assert all(m.offset + m.size <= path.stat().st_size for m in members)
