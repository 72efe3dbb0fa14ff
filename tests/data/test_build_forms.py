"""Data sets of every kind of sample: what their shards and their index hold."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data import encode, encode_media
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.draft import (
    Draft,
    Entry,
    Medium,
    Picture,
    SampleKind,
    Special,
    Text,
    Tokens,
    Video,
)
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.format import STILL
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.sources.opening import FORMS, Form
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.data.video import decode_frames
from megatron_vlm.errors import DataError
from tests.data.samples import encoded, picture
from tests.data.videos import video

pytestmark = pytest.mark.unit

EOS = Special("eos", True)


def members(index: DatasetIndex) -> list[tuple[str, bytes]]:
    """Names and contents of all members, in order, as any tar reader sees them."""
    found = []
    for name in index.shard_names:
        with tarfile.open(index.folder / name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return found


def texts(index: DatasetIndex) -> list[str]:
    """Every sample as text, special tokens spelled."""
    tokenizer = Tokenizer.load(index.tokenizer_path)
    with SampleReader(index) as reader:
        ids = [reader.read_tokens(sample)[0].tolist() for sample in range(index.num_samples)]
    return [tokenizer.decode(sample, skip_special_tokens=False) for sample in ids]


def rejected(index: DatasetIndex) -> list[dict[str, Any]]:
    lines = (index.folder / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def build(folder: Path, source: Path, name: str = "set", **options: Any) -> DatasetIndex:
    build_dataset(source, folder / name, **{"workers": 2, **options})
    return open_dataset(folder / name)


def write_lines(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


class GivenSource:
    """Entries as a test gives them."""

    kind: SampleKind = "document"
    origins: Sequence[str] = ("first", "second")
    total: int | None = None

    def __init__(self, entries: Sequence[Sequence[Draft]]) -> None:
        self._entries = entries

    def entries(self, start: int = 0) -> Iterator[Entry]:
        for number in range(start, len(self._entries)):
            given = self._entries[number]
            yield Entry(number, number % 2, f"id {number}", lambda given=given: given)


def build_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *entries: Sequence[Draft], **options: Any
) -> DatasetIndex:
    """Build drafts; they are of a form of their own."""
    given = Form(lambda path, options: GivenSource(entries), "")
    monkeypatch.setitem(FORMS, "given", given)
    (folder / "given").write_text("")
    return build(folder, folder / "given", **{"form": "given", "overwrite": True, **options})


def medium(content: bytes, name: str = "a.png") -> Medium:
    return Medium(name, len(content), lambda: content)


def test_the_two_of_a_preference_share_their_pictures(tmp_path: Path) -> None:
    for name in "ab":
        picture(30, 40, ord(name)).save(tmp_path / f"{name}.png")
    pair = {"prompt": "which?", "chosen": "yes", "rejected": "no", "images": ["a.png", "b.png"]}
    entries = [
        pair,
        {**pair, "images": ["none.png"], "id": "lost"},
        {"prompt": "and?", "chosen": "y", "rejected": "n"},
    ]
    index = build(tmp_path, write_lines(tmp_path / "x.jsonl", entries))
    assert (index.kind, index.num_samples, index.num_pictures) == ("preference", 4, 4)
    assert [name for name, _ in members(index)] == [
        *("000000000.json", "000000000.tokens.npy", "000000000.0.png", "000000000.1.png"),
        *("000000000-1.json", "000000000-1.tokens.npy"),
        *("000000002.json", "000000002.tokens.npy"),
        *("000000002-1.json", "000000002-1.tokens.npy"),
    ]
    columns = index.columns
    np.testing.assert_array_equal(columns.sample_entry, [0, 0, 2, 2])
    np.testing.assert_array_equal(columns.sample_draft, [0, 1, 0, 1])
    np.testing.assert_array_equal(columns.picture_offset[:2], columns.picture_offset[2:])
    ends = [text.split("<|assistant|>")[1] for text in texts(index)]
    assert ends == [f"{answer}<|end|><|eos|>" for answer in ("yes", "no", "y", "n")]
    [line] = rejected(index)
    # One of the two is no pair.
    assert (line["entry"], line["draft"], line["origin"]) == (1, None, "x.jsonl")
    with SampleReader(index) as reader:
        for sample in (0, 1):
            for ordinal, name in enumerate("ab"):
                content = (tmp_path / f"{name}.png").read_bytes()
                assert reader.read_encoded(sample, ordinal) == content


def test_a_pair_whose_second_is_bad_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Draft((Text("a", True), EOS)), Draft((Text("\ud800", True), EOS))
    monkeypatch.setattr(GivenSource, "kind", "preference")
    index = build_given(tmp_path, monkeypatch, (good, good), (good, bad), (good,), (good, good))
    np.testing.assert_array_equal(index.columns.sample_entry, [0, 0, 3, 3])
    reasons = [line["reason"] for line in rejected(index)]
    assert reasons[0].startswith("rejected: text has an unpaired surrogate")
    assert reasons[1].startswith("1 samples; expected two")


def test_several_samples_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red, blue = (encoded(picture(30, 40, seed)) for seed in (1, 2))
    shared = medium(red)
    drafts = (
        Draft((Picture(1), Text("one", True), Picture(0), EOS), (shared, medium(blue))),
        Draft((Picture(0), Text("two", True), EOS), (medium(blue[:99], "cut.png"), shared)),
        # The same bytes under another name; one of them twice, and one twice in the text.
        Draft(
            (Text("three", True), Picture(0), Picture(1), Picture(2), Picture(2), EOS),
            (medium(blue), medium(encoded(picture(9, 9))), medium(encoded(picture(9, 9)))),
        ),
        Draft((Text("four", False),), entry=b'{"id": "kept"}'),
        Draft(()),
    )
    index = build_given(tmp_path, monkeypatch, drafts, ())
    assert index.origins == ("first", "second")
    found = dict(members(index))
    assert list(found) == [
        *("000000000.json", "000000000.tokens.npy", "000000000.1.png", "000000000.0.png"),
        *("000000000-2.json", "000000000-2.tokens.npy"),
        *("000000000-2.1.png", "000000000-2.2.png"),
    ]
    assert (found["000000000.1.png"], found["000000000.0.png"]) == (blue, red)
    np.testing.assert_array_equal(index.columns.sample_draft, [0, 2])
    np.testing.assert_array_equal(index.columns.picture_position, [0, 4, 5, 6, 7, 8])
    offsets = index.columns.picture_offset.tolist()
    assert offsets[2] == offsets[0] < offsets[1] < offsets[3] < offsets[4] == offsets[5]
    np.testing.assert_array_equal(index.columns.picture_pts, [STILL] * 6)
    np.testing.assert_array_equal(index.columns.picture_max_tokens, [0] * 6)
    with SampleReader(index) as reader:
        shown = [reader.read_encoded(0, 0), reader.read_encoded(0, 1), reader.read_encoded(1, 0)]
    assert shown == [blue, red, blue]
    assert texts(index)[0] == "<|image|>one<|image|><|eos|>"
    lines = [(line["entry"], line["draft"], line["id"]) for line in rejected(index)]
    assert lines == [(0, 1, "id 0"), (0, 3, "id 0"), (0, 4, "id 0"), (1, None, "id 1")]
    reasons = [line["reason"] for line in rejected(index)]
    assert "'cut.png': picture" in reasons[0]
    assert reasons[1].startswith("no token of it is a target")
    assert reasons[3] == "holds no sample"
    described = index.describe(1)
    for word in ("sample 1 ", "entry 0", "sample 2 of it", "from first", "000000000-2.json"):
        assert word in described


def test_groups_of_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rule: what precedes the first dot of the name is the sample, neighbours belong together,
    and what follows is a key that no sample has twice."""
    content = encoded(picture(30, 40))
    draft = Draft((Picture(0), Text("t", True), EOS), (medium(content),))
    index = build_given(tmp_path, monkeypatch, *([(draft, draft)] * 12))
    groups: list[tuple[str, list[str]]] = []
    for name, _ in members(index):
        key, _, extension = name.partition(".")
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        groups[-1][1].append(extension)
    assert len(groups) == len(dict(groups)) == index.num_samples == 24
    for number, (_, extensions) in enumerate(groups):
        assert extensions == ["json", "tokens.npy", *["0.png"] * (number % 2 == 0)]


def test_frames_of_a_video(tmp_path: Path) -> None:
    content = video(frames=30, fps=10, size=(48, 64))
    (tmp_path / "v.mp4").write_bytes(content)
    (tmp_path / "a.png").write_bytes(encoded(picture(30, 40)))
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    asked = [{"role": "user", "content": "<image>see <video>?"}]
    turns = [*asked, {"role": "assistant", "content": "yes"}]
    entries = [
        {"messages": turns, "videos": ["v.mp4"], "images": ["a.png"]},
        {"messages": turns, "videos": ["cut.mp4"], "images": ["a.png"], "id": "cut"},
        {"messages": turns, "videos": ["v.mp4"], "images": ["a.png"], "fps": 2},
    ]
    source = write_lines(tmp_path / "x.jsonl", entries)
    index = build(tmp_path, source, video_max_tokens=1600)
    assert index.video == {
        "fps": 1.0,
        "max_tokens": 1600,
        "levels": [640, 512, 384, 256, 160, 128],
    }
    one = "<|image|>see [0.0 second]<|image|>[1.0 second]<|image|>[2.0 second]<|image|>?"
    assert texts(index)[0] == f"<|user|>{one}<|end|><|assistant|>yes<|end|><|eos|>"
    assert texts(index)[1].count("second]<|image|>") == 6
    assert [line["entry"] for line in rejected(index)] == [1]
    assert "video 'cut.mp4': " in rejected(index)[0]["reason"]
    assert [name for name, _ in members(index)] == [
        *("000000000.json", "000000000.tokens.npy", "000000000.0.png", "000000000.1.mp4"),
        *("000000002.json", "000000002.tokens.npy", "000000002.0.png", "000000002.1.mp4"),
    ]
    columns = index.columns
    np.testing.assert_array_equal(columns.sample_picture_start, [0, 4, 11])
    # Three frames at 512 are 1536 of 1600 tokens, six at 256 are 1536.
    np.testing.assert_array_equal(columns.picture_max_tokens, [0, *[512] * 3, 0, *[256] * 6])
    assert len(set(columns.picture_offset[1:4])) == len(set(columns.picture_offset[5:])) == 1
    np.testing.assert_array_equal(columns.picture_height, [30, *[48] * 3, 30, *[48] * 6])
    assert columns.picture_pts[0] == columns.picture_pts[4] == STILL
    with SampleReader(index) as reader:
        kept = reader.read_encoded(1, 3)
        positions = np.flatnonzero(reader.read_tokens(1)[0] == index.special_ids.image)
    np.testing.assert_array_equal(columns.picture_position[4:], positions)
    assert kept == content
    frames = list(decode_frames(kept, columns.picture_pts[5:].tolist()))
    # Every fifth of the frames that were drawn, each of a gray of its own.
    grays = [int(frame[-1, -1].mean()) for frame in frames]
    assert np.allclose(grays, [40 + 5 * number * 7 % 160 for number in range(6)], atol=6)


def test_the_digest_covers_the_frames_of_a_video(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(video(frames=30, fps=10, size=(48, 64)))
    turns = [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "yes"}]
    source = write_lines(tmp_path / "x.jsonl", [{"messages": turns, "videos": ["v.mp4"]}])

    def digest(**options: Any) -> str:
        return build(tmp_path, source, overwrite=True, **options).content_sha256

    found = [digest(), digest(shard_mb=1), digest(video_fps=1.5), digest(video_max_tokens=384)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_digest_is_made_as_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(30, 40))
    moving = video(frames=12, fps=10, size=(48, 64))
    entries = [
        (Draft((Picture(0), Text("ab", True), EOS), (medium(content),)),),
        (Draft((Text("c", False), EOS)),),
        (Draft((Video(0), EOS), (medium(moving, "v"),)),),
    ]
    index = build_given(tmp_path, monkeypatch, *entries)

    def sha(part: bytes) -> bytes:
        return hashlib.sha256(part).digest()

    tokens = [[[258, 97, 98, 257], [0, 1, 1, 1]], [[99, 257], [0, 1]]]
    raw = [np.array(item, "<i4").tobytes() for item in tokens]
    with SampleReader(index) as reader:
        shown = np.ascontiguousarray(reader.read_tokens(2), "<i4").tobytes()
    times = index.columns.picture_pts[1:].tolist()
    assert len(times) == 2 and times[0] < times[1]
    frames = b"".join(sha(sha(moving) + f" {pts} 640".encode()) for pts in times)
    samples = [sha(sha(raw[0]) + sha(content)), sha(sha(raw[1])), sha(sha(shown) + frames)]
    assert index.content_sha256 == hashlib.sha256(b"".join(samples)).hexdigest()


GROUNDED = {
    "messages": [
        {"role": "user", "content": "<image>where?"},
        {"role": "assistant", "content": "<box:0>"},
    ],
    "images": ["a.png"],
    "objects": [{"image": 0, "label": "cat", "box": [10, 20, 50, 100]}],
}


def test_coordinates(tmp_path: Path) -> None:
    picture(100, 200).save(tmp_path / "a.png")
    outside = {**GROUNDED, "objects": [{"image": 0, "label": "cat", "box": [10, 20, 500, 100]}]}
    source = write_lines(tmp_path / "x.jsonl", [GROUNDED, outside])
    index = build(tmp_path, source)
    assert index.coordinates == {"convention": "relative"}
    # Thousandths of the sides, of 200 wide and 100 high: 999 is the far edge.
    assert "<|assistant|><bbox>50 200 250 999</bbox><|end|>" in texts(index)[0]
    assert [line["entry"] for line in rejected(index)] == [1]

    class Rule:
        patch_size, spatial_merge_size, min_pixels, max_pixels = 14, 2, 3136, 10_000

    index = build(tmp_path, source, "other", seen=Rule())
    assert index.coordinates == {
        "convention": "absolute",
        "min_pixels": 3136,
        "max_pixels": 10_000,
        "unit": 28,
    }
    # Seen as 56 high and 140 wide.
    assert "<|assistant|><bbox>7 11 35 56</bbox><|end|>" in texts(index)[0]


def test_origins_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, count in (("b", 2), ("a", 1), ("c", 1)):
        write_lines(tmp_path / "in" / f"{name}.jsonl", [{"messages": turns}] * count)
    index = build(tmp_path, tmp_path / "in")
    assert index.origins == ("a.jsonl", "b.jsonl", "c.jsonl")
    np.testing.assert_array_equal(index.columns.sample_origin, [0, 1, 1, 2])
    assert "entry 2, from b.jsonl; 000000002.json" in index.describe(2)
    (index.folder / "origins.json").write_text(" " * (index.folder / "origins.json").stat().st_size)
    reopened = open_dataset(tmp_path / "set")
    (index.folder / "origins.json").unlink()
    assert "sample 2" in reopened.describe(2)


def test_what_no_sample_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(30, 40))
    monkeypatch.setattr(encode, "MAX_LENGTH", 50)
    monkeypatch.setattr(encode, "MAX_ENCODED_BYTES", 300)
    monkeypatch.setattr(encode_media, "MAX_ENCODED_BYTES", 2 * len(content))
    monkeypatch.setattr(encode_media, "MAX_ENTRY_BYTES", 3 * len(content))
    ids = np.arange(40, dtype=np.int32)
    two = Draft(
        (Picture(0), Picture(1), EOS), (medium(content, "a"), medium(encoded(picture(30, 40, 1))))
    )
    good = Draft((Text("a", False), EOS))
    cases = [
        (Draft((Text("x" * 11, True), Tokens(ids, True))),),
        (Draft((Text("a", True), EOS), entry=b'"' + b"x" * 300 + b'"'),),
        (Draft((Picture(0), EOS), (medium(content + b"1"), medium(content, "b"))),),
        (two, good, Draft(two.parts, (medium(content), medium(content))), good),
        (Draft((Text("a", True), Tokens(np.array([258], np.int32), True))),),
        (Draft((Text("a", True), Tokens(np.array([-1], np.int32), True))),),
        (good,),
    ]
    index = build_given(tmp_path, monkeypatch, *cases)
    expected = [
        (0, "11 characters and 40 ready tokens; at most 50"),
        (1, "its JSON has 302 bytes; at most 300"),
        (2, f"'b': {len(content)} bytes, {2 * len(content) + 1} with those before it"),
        (3, f"{2 * len(content)} bytes of media, "),
        (4, "token id 258"),
        (5, "token id -1"),
    ]
    lines = rejected(index)
    assert [line["entry"] for line in lines] == [number for number, _ in expected]
    for line, (_, words) in zip(lines, expected, strict=True):
        assert words in line["reason"]
    assert lines[3]["draft"] == 2
    np.testing.assert_array_equal(index.columns.sample_entry, [3, 3, 3, 6])


def test_room_is_asked_for_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(picture(30, 40))
    asked: list[int] = []

    def read() -> bytes:
        assert asked
        return content

    shared, other = Medium("a", len(content), read), Medium("b", len(content), read)
    drafts = [Draft((Picture(0), EOS), (shared,)), Draft((Picture(1), EOS), (shared, other))]
    settings = encode.EncodeSettings(encode_tokenizer())
    entry = Entry(0, 0, None, lambda: drafts)
    result = encode.encode_entry(entry, asked.append, kind="document", settings=settings)
    assert asked == [2 * len(content)]
    assert len(result.samples) == 2
    assert len(result.media) == 1


def encode_tokenizer() -> Tokenizer:
    from megatron_vlm.data.tokenizer import byte_tokenizer

    return byte_tokenizer()


def test_entries_are_not_drawn_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many entries a source has, few of them are held at once."""
    from megatron_vlm.data.shards import ShardWriter

    drawn = written = most = 0
    draft = Draft((Text("ab", True), EOS))
    given, add = GivenSource.entries, ShardWriter.add

    def entries(source: GivenSource, start: int = 0) -> Iterator[Entry]:
        nonlocal drawn, most
        for entry in given(source, start):
            drawn += 1
            most = max(most, drawn - written)
            yield entry

    def added(writer: ShardWriter, encoded_entry: Any) -> None:
        nonlocal written
        written += 1
        add(writer, encoded_entry)

    monkeypatch.setattr(GivenSource, "entries", entries)
    monkeypatch.setattr(ShardWriter, "add", added)
    index = build_given(tmp_path, monkeypatch, *([(draft,)] * 300), workers=2)
    assert index.num_samples == drawn == written == 300
    assert most <= 9


def test_a_source_that_ends_early_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(source: GivenSource, start: int = 0) -> Iterator[Entry]:
        yield Entry(0, 0, None, lambda: (Draft((Text("ab", True), EOS)),))
        raise DataError("first: damaged at byte 7")

    monkeypatch.setattr(GivenSource, "entries", entries)
    with pytest.raises(DataError, match="first: damaged at byte 7"):
        build_given(tmp_path, monkeypatch)
    assert list((tmp_path / "set").iterdir()) == []


def test_tokens_are_stored_as_numpy_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(5, dtype=np.int32)
    index = build_given(tmp_path, monkeypatch, (Draft((Tokens(ids, True), EOS)),))
    stored = np.load(io.BytesIO(dict(members(index))["000000000.tokens.npy"]))
    assert stored.dtype == np.int32
    # Nothing comes before the first.
    np.testing.assert_array_equal(stored, [[0, 1, 2, 3, 4, 257], [0, 1, 1, 1, 1, 1]])
