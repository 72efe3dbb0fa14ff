"""Building and opening data sets: what is written, what is rejected, what opening refuses."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_vlm.data import build as build_module
from megatron_vlm.data import encode_media
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.encode import EncodedEntry
from megatron_vlm.data.format import COLUMNS
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.shards import ShardWriter
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError
from tests.data.samples import build, encoded, entry, files_of, mixed_entries, picture, snapshot

pytestmark = pytest.mark.unit


def rejections(folder: Path) -> dict[int, str]:
    lines = (files_of(folder) / "rejected.jsonl").read_text().splitlines()
    return {item["entry"]: item["reason"] for item in map(json.loads, lines)}


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard, as any tar reader sees them."""
    found = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def test_shards_hold_the_samples_and_the_index_points_at_them(tmp_path: Path) -> None:
    entries = mixed_entries(tmp_path)
    index = build(tmp_path, entries, shard_mb=1)
    found = members(index.folder)
    shards = {i: (index.folder / name).read_bytes() for i, name in enumerate(index.shard_names)}
    assert len(shards) > 1
    assert index.num_samples == len(entries)
    columns = index.columns
    for sample, item in enumerate(entries):
        key = f"{sample:09d}"
        assert json.loads(found[f"{key}.json"]) == item
        raw = found[f"{key}.tokens.npy"]
        tokens = np.load(io.BytesIO(raw))
        offset = int(columns.sample_offset[sample])
        shard = shards[int(columns.sample_shard[sample])]
        assert shard[offset : offset + int(columns.sample_size[sample])] == raw
        assert tokens.shape == (2, columns.sample_text_tokens[sample])
        assert tokens[1].sum() == columns.sample_loss_tokens[sample]
        start, stop = columns.sample_picture_start[sample : sample + 2]
        assert stop - start == len(item.get("images", []))
        for ordinal, name in enumerate(item.get("images", [])):
            place = int(start) + ordinal
            source = (tmp_path / name).read_bytes()
            assert found[f"{key}.{ordinal}.png"] == source
            offset, size = int(columns.picture_offset[place]), int(columns.picture_size[place])
            assert shards[int(columns.picture_shard[place])][offset : offset + size] == source
            assert tokens[0, columns.picture_position[place]] == 258
    mapped = load_file(index.folder / "index.safetensors")
    for name, dtype in COLUMNS.items():
        assert mapped[name].dtype == dtype
        np.testing.assert_array_equal(mapped[name], getattr(columns, name))


def test_members_of_a_sample_are_neighbours_in_one_shard(tmp_path: Path) -> None:
    index = build(tmp_path, mixed_entries(tmp_path), shard_mb=1)
    keys = [name.split(".")[0] for name in members(index.folder)]
    assert sorted(keys) == keys


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    entries = mixed_entries(tmp_path)
    written = []
    for workers in (1, 3):
        build(tmp_path, entries, workers=workers, overwrite=True)
        written.append(snapshot(tmp_path / "set"))
    assert written[0] == written[1]


def test_text_only_set_and_default_tokenizer(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a"), entry("r", "b")])
    assert (index.num_samples, index.num_pictures) == (2, 0)
    assert Tokenizer.load(index.tokenizer_path).vocab_size == index.vocab_size == 263


def test_bad_samples_are_listed_and_the_rest_is_built(tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(encoded(picture(30, 30))[:500])
    (tmp_path / "text.png").write_text("no picture")
    picture(1, 300).save(tmp_path / "thin.png")
    os.mkfifo(tmp_path / "pipe.png")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    picture(30, 30).save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    turn = {"from": "gpt", "value": "a"}
    bad: dict[str, Any] = {
        "outside the image root": entry("q", "a", ["../secret.png"]),
        f"'{outside}': lies outside": entry("q", "a", [str(outside)]),
        "'link.png': lies outside": entry("q", "a", ["link.png"]),
        "'none.png': no such file": entry("q", "a", ["none.png"]),
        "'pipe.png': no such file": entry("q", "a", ["pipe.png"]),
        "cannot be read": entry("q", "a", ["nul\0.png"]),
        "'cut.png': picture cannot be decoded": entry("q", "a", ["cut.png"]),
        "'text.png': picture cannot be decoded": entry("q", "a", ["text.png"]),
        "'thin.png': picture of 1x300": entry("q", "a", ["thin.png"]),
        "1 <image> marks but 2 pictures": entry("<image>", "a", ["good.png", "good.png"]),
        "both are given": entry("q", "a", ["good.png"], image="good.png"),
        "expected a path or a list": entry("q", "a", image=5),
        "expected an object": "a string",
        "conversations: expected a list": {"id": 1},
        r"conversations[0].from: 'robot'": {"conversations": [{"from": "robot", "value": "a"}]},
        "conversations[1].value: is int": {"conversations": [turn, {"from": "gpt", "value": 3}]},
        "conversations[0]: is str": {"conversations": ["hello"]},
        "no assistant turn": {"conversations": [{"from": "human", "value": "a"}]},
        "unpaired surrogate": entry("\ud800", "a"),
    }
    entries = [entry("q", "a", ["good.png"]), *bad.values(), entry("<image>", "b", ["good.png"])]
    index = build(tmp_path, entries)
    reasons = rejections(tmp_path)
    assert sorted(reasons) == list(range(1, len(bad) + 1))
    for number, expected in enumerate(bad, start=1):
        assert expected in reasons[number]
    # Keys stay the places in the source list.
    np.testing.assert_array_equal(index.columns.sample_entry, [0, len(bad) + 1])


def test_all_bad_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 samples are bad; the first: image 'x.png'"):
        build(tmp_path, [entry("q", "a", ["x.png"])] * 2)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "none of its first 1 entries"), ("[{", "not valid JSON"), ("[]", "an empty list")],
)
def test_unfit_lists(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        build_dataset(tmp_path / "source.json", tmp_path / "set")
    with pytest.raises(DataError, match=r"none\.json: does not exist"):
        build_dataset(tmp_path / "none.json", tmp_path / "set")


def test_the_digest_is_that_of_what_a_model_is_shown(tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    picture(30, 30, seed=1).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())

    def digest(*entries: dict[str, Any], **options: Any) -> str:
        return build(tmp_path, entries, overwrite=True, **options).content_sha256

    base = (entry("q", "yes", ["a.png"]), *(entry("q", "n" * 90_000) for _ in range(2)))
    expected = digest(*base)
    assert digest(*base) == digest(*base, workers=1) == expected
    assert digest(*base, shard_mb=1) == expected
    assert digest(entry("q", "yes", ["c.png"], id="named"), *base[1:]) == expected
    others = [
        digest(entry("q", "yeS", ["a.png"]), *base[1:]),
        digest(entry("q", "yes", ["b.png"]), *base[1:]),
        digest(*base[1:], base[0]),
        digest(*base[:-1]),
        digest(entry("qyes", "", ["a.png"]), *base[1:]),
    ]
    assert len({expected, *others}) == 6


def test_rejections_are_alike_in_every_run(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    build(tmp_path, [entry("q", "a", ["text.png"]), entry("q", "a")])
    assert rejections(tmp_path)[0].startswith(
        "image 'text.png': picture cannot be decoded: its beginning is that of no known format"
    )
    assert "0x" not in rejections(tmp_path)[0]


def test_pictures_of_one_sample_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(encode_media, "MAX_ENCODED_BYTES", 2 * size)
    build(tmp_path, [entry("q", "a", ["a.png"] * 2), entry("q", "a", ["a.png"] * 3)])
    assert list(rejections(tmp_path)) == [1]
    assert f"{size} bytes, {3 * size} with those before it" in rejections(tmp_path)[1]


def test_want_of_memory_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(encoded: bytes) -> None:
        raise MemoryError

    picture(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(encode_media, "check_picture", fail)
    with pytest.raises(DataError, match="entry 1: memory ran out .* lower --workers"):
        build(tmp_path, [entry("q", "a"), entry("q", "a", ["a.png"]), entry("q", "a")])
    assert list((tmp_path / "set").iterdir()) == []


def test_image_root_and_foreign_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture(30, 30).save(tmp_path / "pictures" / "a.png")
    backend = Tokenizer.from_json(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"[U]": 0, "yes": 1}, "unk_token": "[U]"},
            }
        )
    )
    options: dict[str, Any] = {"image_root": tmp_path / "pictures", "tokenizer": backend}
    index = build(tmp_path, [entry("yes", "yes", ["a.png"])], **options)
    record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert record["tokenizer"]["special_tokens"]["<|image|>"] == index.special_ids.image == 4
    reopened = Tokenizer.load(index.tokenizer_path)
    assert reopened.special_ids == index.special_ids
    assert index.vocab_size == reopened.vocab_size == 9


def damage(folder: Path, name: str, change: str) -> None:
    path = folder / "set" / name if name == "dataset.json" else files_of(folder) / name
    if change == "remove":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "version":
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "format_version": 3}))
    elif change == "folder":
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "folder": "../0123456789abcdef"}))
    else:
        path.write_text(change)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("dataset.json", "remove", "missing"),
        ("dataset.json", "version", "format_version 3, but this program reads 2"),
        ("dataset.json", "{", "not valid JSON"),
        ("dataset.json", '{"format_version": 2}', "'folder' is missing"),
        ("dataset.json", "folder", "'../0123456789abcdef' .*not a plain name"),
        ("shard-00000.tar", "remove", "missing"),
        ("shard-00000.tar", "cut", r"bytes, but dataset\.json records"),
        ("index.safetensors", "remove", "missing"),
        ("index.safetensors", "cut", r"bytes, but dataset\.json records"),
        ("tokenizer.json", "remove", "missing"),
        ("tokenizer.json", "{}", "differs from the tokenizer"),
    ],
)
def test_opening_names_the_damaged_file(
    tmp_path: Path, name: str, change: str, reason: str
) -> None:
    build(tmp_path, [entry("q", "a")])
    damage(tmp_path, name, change)
    with pytest.raises(DataError, match=f"{name}: .*{reason}|{name}: .*field {reason}"):
        open_dataset(tmp_path / "set")


def test_opening_checks_the_content_of_the_index(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    build(tmp_path, [entry("q", "a"), entry("q", "b")])
    path = files_of(tmp_path) / "index.safetensors"
    good = load_file(path)
    size = path.stat().st_size

    def rewrite(**changes: Any) -> None:
        save_file({**good, **changes}, path, metadata={"format_version": "1"})
        record = json.loads((tmp_path / "set" / "dataset.json").read_text())
        record["index"]["bytes"] = path.stat().st_size
        (tmp_path / "set" / "dataset.json").write_text(json.dumps(record))

    rewrite(sample_offset=good["sample_offset"] + 10**9)
    with pytest.raises(DataError, match="points outside its shards"):
        open_dataset(tmp_path / "set")
    rewrite(sample_entry=good["sample_entry"][:1])
    with pytest.raises(DataError, match="sample_entry has 1 entries"):
        open_dataset(tmp_path / "set")
    rewrite(sample_size=good["sample_size"].astype(np.int32))
    with pytest.raises(DataError, match="column sample_size is I32"):
        open_dataset(tmp_path / "set")
    rewrite(extra=good["sample_entry"])
    with pytest.raises(DataError, match=r"columns missing or unknown: \['extra'\]"):
        open_dataset(tmp_path / "set")
    path.write_bytes(b"\xff" * size)
    rewrite_record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    rewrite_record["index"]["bytes"] = size
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(rewrite_record))
    with pytest.raises(DataError, match="not a readable index"):
        open_dataset(tmp_path / "set")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")


def test_pictures_wait_for_room_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most, lock = 0, 0, threading.Lock()
    check, add = encode_media.check_picture, ShardWriter.add

    def counted(encoded: bytes) -> tuple[int, int, str]:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        time.sleep(0.005)
        return check(encoded)

    def written(writer: ShardWriter, encoded: EncodedEntry) -> None:
        nonlocal held
        add(writer, encoded)
        with lock:
            held -= 1

    picture(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(encode_media, "check_picture", counted)
    monkeypatch.setattr(ShardWriter, "add", written)
    entries = [entry("q", "a", ["a.png"])] * 12
    build(tmp_path, entries, workers=4)
    assert most > 1
    most = 0
    monkeypatch.setattr(build_module, "_MAX_PENDING_BYTES", 1)
    assert build(tmp_path, entries, workers=4, overwrite=True).num_pictures == 12
    assert most == 1
