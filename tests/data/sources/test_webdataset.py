"""WebDataset tars: what a group of members becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.draft import Picture, Text, Video
from megatron_vlm.data.sources import tar_groups
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.webdataset import expand_braces, open_webdataset
from megatron_vlm.errors import DataError
from tests.data.sources.reading import (
    EOS,
    all_facts,
    asked,
    assert_resumes,
    media_of,
    only,
    parts_of,
    reasons,
    said,
    write_tar,
)

pytestmark = pytest.mark.unit

OPTIONS = SourceOptions()


def packed(value: Any) -> bytes:
    return json.dumps(value).encode()


def caption_tar(path: Path, numbers: range) -> Path:
    members = []
    for number in numbers:
        members += [
            (f"{number:05d}.jpg", b"picture %d" % number),
            (f"{number:05d}.json", packed({"caption": "other", "url": "u"})),
            (f"{number:05d}.txt", b"caption %d\n" % number),
        ]
    return write_tar(path, members)


def caption_facts(number: int, place: int, origin: int) -> tuple[Any, ...]:
    parts = [Picture(0), Text(f"caption {number}", True), EOS]
    sample = (parts, [b"picture %d" % number], {"caption": "other", "url": "u"})
    return place, origin, f"{number:05d}", [sample]


def test_captions_of_several_tars(tmp_path: Path) -> None:
    caption_tar(tmp_path / "1.tar", range(3, 5))
    caption_tar(tmp_path / "0.tar", range(3))
    write_tar(tmp_path / "2.tar", [])
    caption_tar(tmp_path / "3.tar", range(5, 7))
    (tmp_path / "0_stats.json").write_text("{}")
    source = open_webdataset(tmp_path, OPTIONS)
    assert source.kind == "document"
    assert source.origins == ("0.tar", "1.tar", "2.tar", "3.tar")
    origins = [0, 0, 0, 1, 1, 3, 3]
    expected = [caption_facts(n, n, origin) for n, origin in enumerate(origins)]
    assert assert_resumes(source) == expected
    # A source that has not been read before skips as well.
    for start in range(8):
        assert all_facts(open_webdataset(tmp_path, OPTIONS), start) == expected[start:]


def test_patterns(tmp_path: Path) -> None:
    for i in range(12):
        caption_tar(tmp_path / f"s-{i:02d}.tar", range(i, i + 1))
    for pattern, numbers in [
        ("s-{08..11}.tar", [8, 9, 10, 11]),
        ("s-{11..09}.tar", [11, 10, 9]),
        ("s-0{3,1}.tar", [3, 1]),
        ("s-*1.tar", [1, 11]),
        ("s-0?.tar", list(range(10))),
        ("s-00.tar", [0]),
    ]:
        source = open_webdataset(tmp_path / pattern, OPTIONS)
        assert source.origins == tuple(f"s-{n:02d}.tar" for n in numbers)
        assert [entry.id for entry in source.entries()] == [f"{n:05d}" for n in numbers]
    for pattern, message in [
        ("s-{08..12}.tar", "s-12.tar: no such file"),
        ("t-*.tar", "no file has such a name"),
        ("{0..9999999}.tar", "counts more than"),
        ("{0..9999}{0..9999}.tar", "spells more than"),
        ("none.tar", "none.tar: does not exist"),
    ]:
        with pytest.raises(DataError, match=message):
            open_webdataset(tmp_path / pattern, OPTIONS)


def test_braces() -> None:
    assert expand_braces("a{1..3}b{x,y}") == ["a1bx", "a1by", "a2bx", "a2by", "a3bx", "a3by"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{008..10}") == ["008", "009", "010"]
    assert expand_braces("plain") == ["plain"]


def test_captions_from_elsewhere(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            *[("a.png", b"1"), ("a.caption", b"one")],
            *[("b.seg.webp", b"2"), ("b.JPG", b"3"), ("b.json", packed({"text": " two "}))],
            *[("c.mp4", b"4"), ("c.txt", b"three")],
            ("d.txt", b"no picture"),
        ],
    )
    listing = assert_resumes(open_webdataset(path, SourceOptions(fps=2.0)))
    assert [item[3] for item in listing] == [
        [([Picture(0), Text("one", True), EOS], [b"1"], {})],
        [([Picture(0), Picture(1), Text("two", True), EOS], [b"2", b"3"], {"text": " two "})],
        [([Video(0, 2.0), Text("three", True), EOS], [b"4"], {})],
        [([Text("no picture", True), EOS], [], {})],
    ]


def test_conversations(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    marked = [{"from": "human", "value": "<image>x<image>"}, {"from": "gpt", "value": "a"}]
    both = [("1.png", b"first"), ("2.png", b"second")]
    entries: list[tuple[Any, list[tuple[str, bytes]], list[bytes]]] = [
        ({"conversations": talk}, [("png", b"p")], [b"p"]),
        ({"conversations": talk, "image": "path/before/packing.jpg"}, [("jpg", b"p")], [b"p"]),
        ({"conversations": marked}, both, [b"first", b"second"]),
        ({"conversations": marked, "images": ["2.png", "e3.1.png"]}, both, [b"second", b"first"]),
        ({"messages": [{"role": "assistant", "content": "a"}]}, [], []),
    ]
    members = []
    for i, (entry, pictures, _) in enumerate(entries):
        members += [(f"e{i}.{name}", content) for name, content in pictures]
        members.append((f"e{i}.json", packed(entry)))
    source = open_webdataset(write_tar(tmp_path / "x.tar", members), OPTIONS)
    assert source.kind == "conversation"
    listing = assert_resumes(source)
    assert [item[3][0][1] for item in listing] == [pictures for _, _, pictures in entries]
    assert [item[3][0][2] for item in listing] == [entry for entry, _, _ in entries]
    assert listing[0][3][0][0] == [*asked(Picture(0), "\nq"), *said("a"), EOS]
    assert listing[3][3][0][0] == [*asked(Picture(0), "x", Picture(1)), *said("a"), EOS]


def test_interleaved_documents(tmp_path: Path) -> None:
    entry = {"texts": ["a", None, "b"], "images": [None, "0.png", None]}
    path = write_tar(tmp_path / "x.tar", [("k.0.png", b"p"), ("k.json", packed(entry))])
    draft = only(open_webdataset(path, OPTIONS))
    assert parts_of(draft) == [Text("a", True), Picture(0), Text("b", True), EOS]
    assert media_of(draft) == [b"p"] and json.loads(draft.entry) == entry


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("b.png", b"")], "holds no caption; expected a member .txt"),
        ([("b.txt", b"\xff")], "'b.txt': not UTF-8 at byte 0"),
        ([("b.json", b"{")], "'b.json': not valid JSON"),
        ([("b.json", b"[]")], "'b.json': is list"),
        ([("b.json", b"[" * 10**5)], "'b.json': nested too deeply"),
        ([("b.txt", b"x"), ("b.TXT", b"x")], "two members are called 'b.TXT'"),
        ([(f"b.{i}.png", b"") for i in range(9)], "more than 8 members"),
        ([("b.jpg", b"x" * 2000), ("b.txt", b"x")], "2000 bytes; at most 1000"),
        ([("b.txt", b"x" * 600)], "'b.txt': 600 bytes; at most 500 of text"),
        ([("b.txt", b" \n")], "holds no text"),
        ([("b.json", packed({"messages": [1]}))], "of the shape conversation, but the first"),
    ],
)
def test_groups_that_are_no_captions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: list[tuple[str, bytes]],
    message: str,
) -> None:
    monkeypatch.setattr(tar_groups, "MAX_GROUP_MEMBERS", 8)
    monkeypatch.setattr(tar_groups, "MAX_ENCODED_BYTES", 1000)
    monkeypatch.setattr(tar_groups, "MAX_LINE_BYTES", 500 if b"[[" not in members[0][1] else 10**6)
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"fine"), *members, ("c.txt", b"fine")])
    found = reasons(open_webdataset(path, OPTIONS))
    assert [found[0], found[2]] == ["", ""]
    assert found[1].startswith("x.tar 'b': ") and message in found[1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"images": ["x.png", "y.png"]}, "image 'x.png': no such member; the sample has '0.png'"),
        ({"images": ["json"]}, "image 'json': no such member"),
        ({"image": 3}, "image: expected a path"),
        ({"image": "/etc/passwd", "images": ["0.png"]}, "image, images: both"),
        ({}, "1 <image> marks but 2 pictures"),
    ],
)
def test_conversations_whose_pictures_are_not_there(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    talk = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    members = [("a.json", packed({"messages": [{"role": "assistant", "content": "fine"}]}))]
    members += [("b.0.png", b""), ("b.1.png", b""), ("b.json", packed({**talk, **entry}))]
    found = reasons(open_webdataset(write_tar(tmp_path / "x.tar", members), OPTIONS))
    assert found[0] == "" and message in found[1]


def test_damage_ends_the_entries_and_is_named(tmp_path: Path) -> None:
    caption_tar(tmp_path / "0.tar", range(4))
    caption_tar(tmp_path / "1.tar", range(4, 6))
    content = (tmp_path / "0.tar").read_bytes()
    # Six members of two blocks each, then the picture of sample 2 is cut off.
    (tmp_path / "0.tar").write_bytes(content[: 6 * 1024 + 512 + 3])
    message = r"0.tar: damaged at byte 6144: .*'00002.jpg'.* cut off"
    for start in range(3):
        source = open_webdataset(tmp_path, OPTIONS)
        served = []
        with pytest.raises(DataError, match=message):
            for entry in source.entries(start):
                served.append(entry.number)
        assert served == list(range(start, 2))


def test_nothing_to_read(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "x.tar", [("README", b"x")])
    with pytest.raises(DataError, match="x.tar: holds no samples"):
        open_webdataset(empty, OPTIONS)
    bad = write_tar(tmp_path / "y.tar", [("a.json", b"{")])
    with pytest.raises(DataError, match="y.tar: first sample 'a' is bad: 'a.json': not valid JSON"):
        open_webdataset(bad, OPTIONS)
    with pytest.raises(DataError, match="holds no file with .tar"):
        (tmp_path / "folder").mkdir()
        open_webdataset(tmp_path / "folder", OPTIONS)


def test_a_medium_that_is_gone_is_named(tmp_path: Path) -> None:
    path = caption_tar(tmp_path / "x.tar", range(1))
    (draft,) = next(open_webdataset(path, OPTIONS).entries()).drafts()
    path.write_bytes(path.read_bytes()[:515])
    with pytest.raises(DataError, match="'x.tar/00000.jpg': became shorter"):
        draft.media[0].read()
