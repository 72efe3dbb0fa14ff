"""Energon folders: declarations are read, code is not run.

The folders made here have the files that `energon prepare` of 7.4.1 writes, less its indexes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.data.draft import Picture, Text, Video
from megatron_vlm.data.sources.energon import open_energon
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.errors import DataError
from tests.data.sources.reading import EOS, asked, assert_resumes, reasons, said, write_tar

pytestmark = pytest.mark.unit

TRAIN, VAL = SourceOptions(), SourceOptions(split="val")


def packed(value: Any) -> bytes:
    return json.dumps(value).encode()


def prepare(
    folder: Path,
    samples: list[dict[str, bytes]],
    sample_type: str,
    field_map: dict[str, str] | None,
    exclude: tuple[str, ...] = (),
    **extra: Any,
) -> Path:
    """Three samples a tar; the first two tars are `train`, the others `val`."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    (folder / "shards").mkdir()
    counts = {}
    for number, start in enumerate(range(0, len(samples), 3)):
        name = f"shards/shard_{number:03d}.tar"
        members = [
            (f"{start + i:04d}.{extension}", content)
            for i, sample in enumerate(samples[start : start + 3])
            for extension, content in sample.items()
        ]
        write_tar(folder / name, members)
        counts[name] = len(samples[start : start + 3])
    (meta / ".info.json").write_text(
        json.dumps({"energon_version": "7.4.1", "shard_counts": counts})
    )
    splits = {
        "split_parts": {"train": ["shards/shard_{000..001}.tar"], "val": list(counts)[2:]},
        "exclude": list(exclude),
    }
    (meta / "split.yaml").write_text(yaml.safe_dump(splits))
    declared: dict[str, Any] = (
        {"__module__": "megatron.energon", "__class__": sample_type}
        if sample_type.endswith("Webdataset")
        else {"sample_type": {"__module__": "megatron.energon", "__class__": sample_type}}
    )
    if field_map is not None:
        declared["field_map"] = field_map
    (meta / "dataset.yaml").write_text(yaml.safe_dump({**declared, **extra}))
    return folder


def captions(count: int) -> list[dict[str, bytes]]:
    return [{"jpg": b"picture %d" % i, "txt": b"caption %d" % i} for i in range(count)]


CAPTIONS = {"image": "jpg", "caption": "txt"}


@pytest.mark.parametrize("sample_type", ["CaptioningSample", "CaptioningWebdataset"])
def test_captions_of_each_part(tmp_path: Path, sample_type: str) -> None:
    folder = prepare(tmp_path / "e", captions(8), sample_type, CAPTIONS, subflavors={"a": 1})
    expected = [
        (
            [Picture(0), Text(f"caption {i}", True), EOS],
            [b"picture %d" % i],
            {"caption": f"caption {i}"},
        )
        for i in range(8)
    ]
    train, val = open_energon(folder, TRAIN), open_energon(folder, VAL)
    assert train.kind == "document"
    assert train.origins == ("shards/shard_000.tar", "shards/shard_001.tar")
    assert assert_resumes(train) == [
        (i, i // 3, f"{i:04d}", [sample]) for i, sample in enumerate(expected[:6])
    ]
    assert [item[3] for item in assert_resumes(val)] == [[sample] for sample in expected[6:]]


def test_what_is_excluded_has_no_number(tmp_path: Path) -> None:
    exclude = ("shards/shard_000.tar/000{0,2}", "shards/shard_001.tar")
    folder = prepare(tmp_path / "e", captions(6), "CaptioningSample", CAPTIONS, exclude)
    listing = assert_resumes(open_energon(folder, TRAIN))
    assert [(number, key) for number, _, key, _ in listing] == [(0, "0001")]


def test_questions(tmp_path: Path) -> None:
    samples = [
        {"png": b"p", "json": packed({"q": "what?", "a": ["x", "y"], "w": [0.3, 0.7]})},
        {"png": b"p", "json": packed({"q": "<image>?", "a": ["x", "y"], "w": [0.5, 0.5]})},
    ]
    paths = {"image": "jpg,png", "context": "json[q]", "answers": "json[a]"}
    weighted = {**paths, "answer_weights": "json[w]"}
    first = prepare(tmp_path / "1", samples, "VQASample", weighted)
    (first / "shards/shard_001.tar").write_bytes((first / "shards/shard_000.tar").read_bytes())
    source = open_energon(first, TRAIN)
    listing = assert_resumes(source)
    assert source.kind == "conversation"
    assert listing[0][3] == [
        (
            [*asked(Picture(0), "\nwhat?"), *said("y"), EOS],
            [b"p"],
            {"context": "what?", "answers": ["x", "y"], "answer_weights": [0.3, 0.7]},
        )
    ]
    assert listing[1][3][0][0] == [*asked(Picture(0), "?"), *said("x"), EOS]


def one(folder: Path, sample: dict[str, bytes], kind: str, paths: dict[str, str]) -> Any:
    """What the only sample of a folder becomes: its parts, or why it is bad."""
    prepare(folder, [sample] * 4, kind, paths)
    found = assert_resumes(open_energon(folder, SourceOptions(fps=2.0)))[0][3]
    return found if isinstance(found, str) else found[0][0]


def test_other_types(tmp_path: Path) -> None:
    choice = {"png": b"p", "json": packed({"q": "which?", "c": ["x", "y"], "i": 1})}
    paths = {"image": "png", "context": "json[q]", "choices": "json[c]"}
    right = {**paths, "correct_choice_idx": "json[i]"}
    question = "\nwhich?\nA. x\nB. y"
    for name, given, expected in [
        ("c0", right, [*asked(Picture(0), question), *said("B"), EOS]),
        ("c1", paths, [*asked(Picture(0), question), *said("A"), EOS]),
    ]:
        assert one(tmp_path / name, choice, "MultiChoiceVQAWebdataset", given) == expected
    numbered = {**choice, "cls": b"1\n"}
    given = {**paths, "correct_choice_idx": "cls"}
    assert one(tmp_path / "c2", numbered, "MultiChoiceVQASample", given)[-3] == Text("B", True)

    video = {"mp4": b"v", "q.txt": b"when?", "a.txt": b"now"}
    paths = {"video": "mp4", "context": "q.txt", "answers": "a.txt"}
    assert one(tmp_path / "v", video, "VidQASample", paths) == [
        *asked(Video(0, 2.0), "\nwhen?"),
        *said("now"),
        EOS,
    ]
    text = one(tmp_path / "t", {"txt": b"all of it"}, "TextSample", {"text": "txt"})
    assert text == [Text("all of it", True), EOS]
    page = {"image": "png", "text": "json[lines][1]"}
    lines = {"png": b"p", "json": packed({"lines": ["no", "yes"]})}
    assert one(tmp_path / "o", lines, "OCRSample", page) == [Picture(0), Text("yes", True), EOS]


@pytest.mark.parametrize(
    ("sample", "paths", "message"),
    [
        ({"txt": b"c"}, CAPTIONS, "image: no member .jpg; the sample has 'txt'"),
        ({"jpg": b"p"}, CAPTIONS, "no member .txt; the sample has 'jpg'"),
        ({"jpg": b"p", "txt": b"\xff"}, CAPTIONS, "not UTF-8"),
        ({"jpg": b"p", "txt": b"c"}, {"image": "txt", "caption": "txt"}, "no extension of a image"),
        (
            {"jpg": b"p", "json": b'{"a": [3]}'},
            {"image": "jpg", "caption": "json[a][0]"},
            "caption: is int; expected a text",
        ),
        (
            {"jpg": b"p", "json": b'{"a": ["b"]}'},
            {"image": "jpg", "caption": "json[a][7]"},
            "json[a][7]: there is none",
        ),
        (
            {"jpg": b"p", "json": b'{"a": "b"}'},
            {"image": "jpg", "caption": "json[a][b]"},
            "json[a][b]: there is none",
        ),
        ({"jpg": b"p", "json": b"{"}, {"image": "jpg", "caption": "json[a]"}, "not valid JSON"),
    ],
)
def test_samples_that_do_not_fit(
    tmp_path: Path, sample: dict[str, bytes], paths: dict[str, str], message: str
) -> None:
    found = one(tmp_path / "e", sample, "CaptioningSample", paths)
    assert found.startswith("shards/shard_000.tar '0000': ") and message in found


def write_meta(folder: Path, name: str, **changes: Any) -> None:
    path = folder / ".nv-meta" / name
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def crude(name: str, module: str = "megatron.energon") -> dict[str, Any]:
    return {"sample_type": {"__module__": module, "__class__": name}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dataset.yaml", crude("CrudeWebdataset"), "'CrudeWebdataset' leaves it to code"),
        (
            "dataset.yaml",
            crude("ImageSample"),
            "'ImageSample' of 'megatron.energon'; expected",
        ),
        (
            "dataset.yaml",
            crude("CaptioningSample", "my.code"),
            "'CaptioningSample' of 'my.code'; exp",
        ),
        ("dataset.yaml", {"sample_type": None}, "names no __class__"),
        ("dataset.yaml", {"field_map": None}, "expected a field_map"),
        ("dataset.yaml", {"field_map": {"image": "jpg"}}, "field_map has no caption"),
        ("dataset.yaml", {"field_map": {"image": ["jpg"]}}, "field_map.image: expected a text"),
        ("dataset.yaml", {"field_map": {"image": "jpg[", "caption": "x"}}, "field_map.image: 'jpg"),
        (
            "dataset.yaml",
            {"field_map": None, "sample_loader": "sample_loader.py:load", "part_filter": "x"},
            "sample_loader is code, which is not run; declare a field_map",
        ),
        (
            "split.yaml",
            {"split_parts": {"test": []}},
            "no part 'train'; --split takes one of 'test'",
        ),
        ("split.yaml", {"split_parts": []}, "expected split_parts"),
        ("split.yaml", {"split_parts": {"train": []}}, "part 'train' has no tars"),
        ("split.yaml", {"split_parts": {"train": "x"}}, "split_parts.train: expected a list"),
        ("split.yaml", {"split_parts": {"train": ["x.tar"]}}, "x.tar: no such file, though"),
        ("split.yaml", {"split_parts": {"train": ["../x.tar"]}}, "lies outside the folder"),
        ("split.yaml", {"split_parts": {"train": ["/x.tar"]}}, "lies outside the folder"),
        ("split.yaml", {"exclude": 3}, "exclude: expected a list"),
    ],
)
def test_declarations_that_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = prepare(tmp_path / "e", captions(4), "CaptioningSample", CAPTIONS)
    write_meta(folder, name, **changes)
    with pytest.raises(DataError) as caught:
        open_energon(folder, TRAIN)
    assert message in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_map_suffices_beside_a_loader(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "e", captions(4), "CaptioningSample", CAPTIONS)
    write_meta(folder, "dataset.yaml", sample_loader="sample_loader.py:sample_loader")
    (folder / ".nv-meta" / "sample_loader.py").write_text("raise SystemExit('ran')")
    assert reasons(open_energon(folder, TRAIN)) == [""] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "no valid YAML"),
        ("- a", "expected a mapping"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("[" * 2_000, "no valid YAML"),
        ("a: \x00", "no valid YAML"),
        ("a: &a [x, x]\n__class__: A\n__module__: [*a, *a]", "'A' of list; expected one of"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = prepare(tmp_path / "e", captions(4), "CaptioningSample", CAPTIONS)
    (folder / ".nv-meta" / "dataset.yaml").write_text(content)
    with pytest.raises(DataError, match=f"dataset.yaml: {message}"):
        open_energon(folder, TRAIN)


def test_folders_that_are_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .nv-meta; prepare it"):
        open_energon(tmp_path, TRAIN)
    folder = prepare(tmp_path / "e", captions(4), "CaptioningSample", CAPTIONS)
    # What JSON writes is YAML too.
    split = folder / ".nv-meta" / "split.yaml"
    split.with_suffix(".json").write_text(json.dumps(yaml.safe_load(split.read_text())))
    split.unlink()
    assert reasons(open_energon(folder, TRAIN)) == [""] * 4
    (folder / ".nv-meta" / "dataset.yaml").unlink()
    with pytest.raises(DataError, match="dataset.yaml: no such file"):
        open_energon(folder, TRAIN)
