"""LLaVA conversations, messages and sessions: what becomes of each field, and what is refused."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.chat import ThinkingSettings
from megatron_vlm.data.draft import Draft, Mark, Picture, Text, Video
from megatron_vlm.data.sources import media, records
from megatron_vlm.data.sources.conversations import open_conversations
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.errors import DataError
from tests.data.sources.reading import (
    ASSISTANT,
    END,
    EOS,
    LEARNED_END,
    USER,
    all_facts,
    asked,
    assert_resumes,
    media_of,
    only,
    parts_of,
    reasons,
    said,
    write_lines,
)

pytestmark = pytest.mark.unit

OPTIONS = SourceOptions()
PICTURE = b"any bytes: a source does not decode"
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def read_one(folder: Path, entry: Any, options: SourceOptions = OPTIONS) -> Draft:
    return only(open_conversations(write_lines(folder / "one.jsonl", [entry]), options))


def reason(folder: Path, entry: Any, options: SourceOptions = OPTIONS) -> str:
    (found,) = reasons(open_conversations(write_lines(folder / "one.jsonl", [entry]), options))
    return found


def llava(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **fields}


def messages(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in turns], **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for number in range(3):
        (tmp_path / "sub" / f"{number}.png").write_bytes(b"picture %d" % number)
    (tmp_path / "v.mp4").write_bytes(b"video")
    return tmp_path


def test_llava_with_marks_and_without(folder: Path) -> None:
    marked = llava("a<image>b", "c", images=["sub/1.png"], id=7)
    draft = read_one(folder, marked)
    assert parts_of(draft) == [*asked("a", Picture(0), "b"), *said("c"), EOS]
    assert media_of(draft) == [b"picture 1"]
    assert json.loads(draft.entry) == marked

    beside: dict[str, Any] = {
        "image_id": 3,
        "imageId": 4,
        "image_ids": [4],
        "video_id": "x",
        "source": "s",
    }
    unmarked = read_one(folder, llava("q", "c", image="sub/2.png", **beside))
    assert parts_of(unmarked) == [*asked(Picture(0), "\nq"), *said("c"), EOS]
    assert media_of(unmarked) == [b"picture 2"]


def test_a_list_gives_what_its_lines_give(folder: Path) -> None:
    entries = [llava(f"q{i}", "a", id=f"i{i}", image="sub/0.png") for i in range(5)]
    lines = write_lines(folder / "x.jsonl", entries)
    whole = folder / "x.json"
    whole.write_text(json.dumps(entries, indent=1))
    as_list = assert_resumes(open_conversations(whole, OPTIONS))
    as_lines = assert_resumes(open_conversations(lines, OPTIONS))
    assert [(n, o, s) for n, o, _, s in as_list] == [(n, o, s) for n, o, _, s in as_lines]
    assert [item[2] for item in as_list] == [f"i{i}" for i in range(5)]
    assert open_conversations(whole, OPTIONS).total == 5
    # Lines that are called .json are lines all the same.
    renamed = lines.rename(folder / "y.json")
    assert assert_resumes(open_conversations(renamed, OPTIONS)) == as_lines


def test_a_folder_is_read_in_the_order_of_names(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    write_lines(data / "b.jsonl", [llava("3", "a"), llava("4", "a")])
    (data / "a.json").write_text(json.dumps([llava("0", "a"), {}, llava("2", "a")]))
    write_lines(data / "c.jsonl", [llava("5", "a")])
    source = open_conversations(data, OPTIONS)
    listing = assert_resumes(source)
    assert source.origins == ("a.json", "b.jsonl", "c.jsonl")
    assert [item[1] for item in listing] == [0, 0, 0, 1, 1, 2]
    assert listing[1][3].startswith("a.json entry 1: conversations: expected a list")
    assert [s[0][0][1].text for _, _, _, s in listing if not isinstance(s, str)] == list("02345")


def test_messages_with_part_lists(folder: Path) -> None:
    entry = messages(
        ("system", "s"),
        (
            "user",
            [
                {"type": "text", "text": "a"},
                {"type": "image", "image": "sub/2.png"},
                {"type": "image"},
                {"type": "image_url", "image_url": {"url": URI}},
                {"type": "text", "text": "b"},
            ],
        ),
        ("assistant", [{"type": "text", "text": "c"}]),
        ("user", "d<image>"),
        ("assistant", "e"),
        images=["sub/0.png", {"path": "sub/1.png", "bytes": None}],
    )
    draft = read_one(folder, entry)
    system = asked("s")
    system[0] = type(USER)("system", False)
    assert parts_of(draft) == [
        *system,
        *asked("a", Picture(0), Picture(1), Picture(2), "b"),
        *said("c"),
        *asked("d", Picture(3)),
        *said("e"),
        EOS,
    ]
    assert media_of(draft) == [b"picture 2", b"picture 0", PICTURE, b"picture 1"]
    kept = draft.entry.decode()
    assert "base64," in kept and URI[30:] not in kept


def test_videos_and_their_rate(folder: Path) -> None:
    options = SourceOptions(fps=1.0)
    plain = messages(("user", "<video>q"), ("assistant", "a"), videos=["v.mp4"])
    assert parts_of(read_one(folder, plain, options))[1] == Video(0, 1.0)
    assert parts_of(read_one(folder, plain))[1] == Video(0, None)
    for extra in ({"fps": 5}, {"video_fps": 5.0}):
        assert parts_of(read_one(folder, {**plain, **extra}, options))[1] == Video(0, 5.0)
    in_part = messages(
        ("user", [{"type": "video", "video": "v.mp4", "fps": 2}, {"type": "text", "text": "q"}]),
        ("assistant", "a"),
    )
    draft = read_one(folder, in_part, options)
    assert parts_of(draft)[:3] == [USER, Video(0, 2.0), Text("q", False)]
    assert media_of(draft) == [b"video"]
    for bad in (0, -1, "2", True, [1]):
        assert "fps" in reason(folder, {**plain, "fps": bad})
    assert "several values" in reason(folder, {**in_part, "fps": 1})


def test_media_of_both_kinds_go_where_their_marks_are(folder: Path) -> None:
    entry = messages(
        ("user", "<video>x<image>y<image>"),
        ("assistant", "a"),
        images=["sub/0.png", "sub/1.png"],
        video="v.mp4",
    )
    draft = read_one(folder, entry)
    assert parts_of(draft)[:7] == asked(Video(0), "x", Picture(1), "y", Picture(2))[:6] + [END]
    assert media_of(draft) == [b"video", b"picture 0", b"picture 1"]


def test_reasoning_objects_and_what_is_learned(folder: Path) -> None:
    entry = messages(("user", "where?"), ("assistant", "<box:0>"), ("assistant", "no"))
    entry["messages"][1]["reasoning_content"] = "hm"
    entry["messages"][2]["weight"] = 0
    entry["image"] = "sub/0.png"
    entry["objects"] = [{"image": 0, "label": "x", "box": [1, 2, 3, 4]}]
    parts = parts_of(read_one(folder, entry))
    (mark,) = (part for part in parts if isinstance(part, Mark))
    assert (mark.form, mark.medium, mark.learned) == ("box", 0, True)
    assert mark.target["box"] == [1, 2, 3, 4]
    learned = "".join(p.text for p in parts if isinstance(p, Text) and p.learned)
    assert learned == "<think>\nhm\n</think>\n\n"
    assert parts[-4:] == [ASSISTANT, Text("no", False), END, type(EOS)("eos", False)]
    dropped = read_one(folder, entry, SourceOptions(thinking=ThinkingSettings("drop")))
    assert not any(isinstance(p, Text) and p.learned for p in dropped.parts)
    # Without objects a mark is text.
    del entry["objects"]
    assert Text("<box:0>", True) in parts_of(read_one(folder, entry))
    assert "objects" in reason(folder, {**entry, "objects": {}})


def test_sessions_are_closed_one_by_one(folder: Path) -> None:
    first, second = messages(("user", "1"), ("assistant", "2")), llava("3", "4")
    expected = [*asked("1"), *said("2"), EOS, *asked("3"), *said("4"), EOS]
    for sessions in ([first, second], [first["messages"], second["conversations"]]):
        assert parts_of(read_one(folder, {"sessions": sessions})) == expected


def test_learned_end_follows_learned_text(folder: Path) -> None:
    entry = messages(("user", "q"), ("assistant", "a"))
    entry["messages"][0]["learned"] = True
    assert parts_of(read_one(folder, entry)) == [
        *(USER, Text("q", True), LEARNED_END),
        *said("a"),
        EOS,
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7, "entry is int; expected an object"),
        ({}, "conversations: expected a list of at least one turn"),
        ({"conversations": []}, "conversations: expected a list"),
        ({"messages": "x"}, "messages: expected a list"),
        ({"messages": [], "conversations": []}, "conversations, messages: more than one"),
        (messages(("user", "x")), "no assistant turn"),
        (messages(("tool", "x")), "messages[0].role: 'tool'; expected one of human, user"),
        (messages(("user", None)), "messages[0].content: is NoneType"),
        (messages(("user", [3])), "messages[0].content[0]: is int"),
        (messages(("user", [{"type": "audio"}])), "messages[0].content[0].type: 'audio'"),
        (messages(("user", [{"type": "text"}])), "messages[0].content[0].text"),
        (messages(("user", [{"type": ["x"]}])), "messages[0].content[0].type"),
        ({"conversations": [{"from": "me", "value": ""}]}, "conversations[0].from: 'me'"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value: is NoneType"),
        (llava("q", "a", image="x", images=["x"]), "image, images: both are given"),
        (llava("q", "a", image=["sub/0.png", ""]), "image: expected a path or a list"),
        (llava("q", "a", image="sub/9.png"), "image 'sub/9.png': no such file below"),
        (llava("q", "a", image="sub"), "image 'sub': no such file below"),
        (llava("q", "a", image="../out.png"), "image '../out.png': lies outside"),
        (llava("q", "a", image="/etc/passwd"), "lies outside the image root"),
        (llava("q", "a", image="file:///etc/passwd"), "lies outside the image root"),
        (llava("q", "a", image="a\0b"), "cannot be read"),
        (llava("q", "a", image="pipe"), "no such file below"),
        (llava("q", "a", image="link"), "lies outside"),
        (llava("q", "a", image="https://x.org/1.png"), "is an address; nothing is downloaded"),
        (llava("q", "a", image="s3://x/1.png"), "is an address"),
        (llava("q", "a", image="data:image/png,abc"), "not a data URI of image/... in base64"),
        (llava("q", "a", image="data:video/mp4;base64,AAAA"), "not a data URI of image/"),
        (llava("q", "a", image="data:image/png;base64,A"), "not valid base64"),
        (llava("q", "a", image="data:image/png;base64,AAA!A"), "not valid base64"),
        (llava("q", "a", image={"nothing": 1}), "an object with 'nothing'; expected its path"),
        (llava("<image>", "a"), "1 <image> marks but 0 pictures"),
        (llava("<image>", "a", images=["sub/0.png"] * 2), "1 <image> marks but 2 pictures"),
        (llava("<image><image>", "a", image="sub/0.png"), "2 <image> marks but 1 pictures"),
        (llava("q", " \n"), "conversations[1].value: an empty answer"),
        (messages(("user", "q"), ("assistant", [])), "messages[1].content: an empty answer"),
        (llava("q", "a", imagez=["sub/0.png"]), "imagez: no such field; did you mean image?"),
        (llava("q", "a", Video="v.mp4"), "Video: no such field; did you mean video?"),
        (llava("<box:0>", "a", object=[]), "object: no such field; did you mean objects?"),
        ({"sessions": [[]]}, "sessions[0]: expected a list"),
        ({"sessions": [{"messages": [3]}]}, "sessions[0].messages[0]: is int"),
    ],
)
def test_bad_entries_say_why(folder: Path, entry: Any, message: str) -> None:
    (folder.parent / "out.png").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/etc/passwd")
    found = reason(folder, entry)
    assert found.startswith("one.jsonl line 1: ") and message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7 (0xff)"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"conversations":' * 10**4, "nested too deeply"),
        (b"null", "entry is NoneType"),
    ],
)
def test_a_bad_line_is_one_bad_entry(folder: Path, line: bytes, message: str) -> None:
    good = json.dumps(llava("q", "a")).encode()
    path = folder / "x.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n" + good)
    found = reasons(open_conversations(path, OPTIONS))
    assert found[0] == found[2] == ""
    assert found[1].startswith("x.jsonl line 3: ") and message in found[1]


def test_deep_fields_do_not_break_the_reader(folder: Path) -> None:
    path = folder / "x.jsonl"
    good = json.dumps(llava("q", "a"))
    lines = []
    for depth in (100, 400, 600, 900, 980, 3000):
        for key in ("x", "images", "objects", "id"):
            deep = "[" * depth + "]" * depth
            lines.append(good[:-1] + f', "{key}": {deep}}}')
    path.write_text("\n".join(lines))
    found = reasons(open_conversations(path, OPTIONS))
    assert found[0] == "" and all("nested too deeply" in reason for reason in found[-4:])


def test_any_form_may_run_out_of_stack(folder: Path) -> None:
    def endless(value: Any) -> Any:
        return endless(value)

    source = records.RecordSource("document", [records.JsonList([1], True)], ["x.json"], endless)
    assert reasons(source) == ["x.json entry 0: nested too deeply; flatten it"]


def test_long_lines_are_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = write_lines(folder / "x.jsonl", [llava("q" * 2000, "a"), llava("q", "a")])
    found = reasons(open_conversations(path, OPTIONS))
    assert "x.jsonl line 1: 20" in found[0] and "at most 1000 are read" in found[0]
    assert found[1] == ""


def test_large_media_are_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_ENCODED_BYTES", 8)
    assert "9 bytes; at most 8" in reason(folder, llava("q", "a", image="sub/0.png"))
    assert "at most 8" in reason(folder, llava("q", "a", image=URI))


def test_a_line_longer_than_any_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(llava("q", "a")).encode() + b"\n")
        file.seek(records.MAX_LINE_BYTES + 10**6)
        file.write(b"\n" + json.dumps(llava("r", "a")).encode())
    found = all_facts(open_conversations(path, OPTIONS))
    assert [isinstance(item[3], str) for item in found] == [False, True, False]
    assert "at most" in found[1][3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.json: is empty"),
        (b" \n", "x.json: is empty"),
        (b"[]", "x.json: holds an empty list"),
        (b"[1, ", "x.json: not valid JSON"),
        (b'["\xff"]', "x.json: not UTF-8"),
    ],
)
def test_bad_files_stop_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_conversations(tmp_path / "x.json", OPTIONS)


def test_image_root(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    path = write_lines(data / "x.jsonl", [llava("q", "a", image="0.png")])
    assert "no such file" in reasons(open_conversations(path, OPTIONS))[0]
    options = SourceOptions(image_root=folder / "sub")
    assert media_of(only(open_conversations(path, options))) == [b"picture 0"]
    with pytest.raises(DataError, match="image root .*nothing: no such folder"):
        open_conversations(path, SourceOptions(image_root=folder / "nothing"))
