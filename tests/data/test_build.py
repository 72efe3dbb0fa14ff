"""Building and opening data sets: what is written, what is rejected, what is never overwritten."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_vlm.data import build as build_module
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.format import COLUMNS
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError
from tests.data.samples import build, encoded, entry, mixed_entries, picture

pytestmark = pytest.mark.unit


def rejections(folder: Path) -> dict[int, str]:
    lines = (folder / "set" / "rejected.jsonl").read_text().splitlines()
    return {item["index"]: item["reason"] for item in map(json.loads, lines)}


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
    found = members(tmp_path / "set")
    shards = {i: (tmp_path / "set" / name).read_bytes() for i, name in enumerate(index.shard_names)}
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
    mapped = load_file(tmp_path / "set" / "index.safetensors")
    for name, dtype in COLUMNS.items():
        assert mapped[name].dtype == dtype
        np.testing.assert_array_equal(mapped[name], getattr(columns, name))


def test_members_of_a_sample_are_neighbours_in_one_shard(tmp_path: Path) -> None:
    build(tmp_path, mixed_entries(tmp_path), shard_mb=1)
    keys = [name.split(".")[0] for name in members(tmp_path / "set")]
    assert sorted(keys) == keys


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    entries = mixed_entries(tmp_path)
    written = []
    for workers in (1, 3):
        build(tmp_path, entries, workers=workers, overwrite=True)
        paths = sorted((tmp_path / "set").iterdir())
        written.append({path.name: path.read_bytes() for path in paths})
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
    np.testing.assert_array_equal(index.columns.sample_key, [0, len(bad) + 1])


def test_all_bad_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 samples are bad; the first: image 'x.png'"):
        build(tmp_path, [entry("q", "a", ["x.png"])] * 2)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not valid JSON"), ("{}", "holds dict"), ("[]", "an empty list")],
)
def test_unfit_lists(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        build_dataset(tmp_path / "source.json", tmp_path / "set")
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        build_dataset(tmp_path / "none.json", tmp_path / "set")


def test_folders_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty and holds no data set"):
            build(tmp_path, [entry("q", "a")], overwrite=overwrite)
    (tmp_path / "set" / "thesis.txt").unlink()
    build(tmp_path, [entry("q", "a")])
    with pytest.raises(DataError, match="--overwrite"):
        build(tmp_path, [entry("q", "b"), entry("q", "c")])
    assert open_dataset(tmp_path / "set").num_samples == 1
    (tmp_path / "set" / "notes.txt").write_text("kept")
    assert build(tmp_path, [entry("q", "b"), entry("q", "c")], overwrite=True).num_samples == 2
    assert (tmp_path / "set" / "notes.txt").read_text() == "kept"


def test_overwriting_removes_shards_that_are_no_longer_needed(tmp_path: Path) -> None:
    index = build(tmp_path, mixed_entries(tmp_path), shard_mb=1)
    assert len(index.shard_names) > 1
    build(tmp_path, [entry("q", "a")], overwrite=True)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    expected = ["dataset.json", "index.safetensors", "rejected.jsonl", "shard-00000.tar"]
    assert names == [*expected, "tokenizer.json"]


def test_a_failed_build_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, [entry("q", "a")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    calls = []

    def fail_late(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args, **options)  # type: ignore[arg-type]

    original = build_module._encode_entry
    monkeypatch.setattr(build_module, "_encode_entry", fail_late)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, [entry("q", "b")] * 9, overwrite=True, workers=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_a_build_cut_short_never_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, [entry("q", "a")])

    removed = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        path.rename(path.with_name("removed")) if path.exists() else None

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_atomic", full)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(DataError, match="cannot be written .No space left"):
            build(tmp_path, [entry("q", "b")], overwrite=True)
    assert removed[0] == "dataset.json"  # before anything that it vouches for
    (tmp_path / "set" / "removed").unlink()
    with pytest.raises(DataError, match=r"dataset\.json: missing"):
        open_dataset(tmp_path / "set")
    with pytest.raises(DataError, match="interrupted build left"):
        build(tmp_path, [entry("q", "b")])
    assert build(tmp_path, [entry("q", "b")], overwrite=True).num_samples == 1


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
    path = folder / name
    if change == "remove":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "version":
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "format_version": 2}))
    else:
        path.write_text(change)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("dataset.json", "remove", "missing"),
        ("dataset.json", "version", "format_version 2, but this program reads 1"),
        ("dataset.json", "{", "not valid JSON"),
        ("dataset.json", '{"format_version": 1}', "'shards' is missing"),
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
    damage(tmp_path / "set", name, change)
    with pytest.raises(DataError, match=f"{name}: .*{reason}|{name}: .*field {reason}"):
        open_dataset(tmp_path / "set")


def test_opening_checks_the_content_of_the_index(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    build(tmp_path, [entry("q", "a"), entry("q", "b")])
    path = tmp_path / "set" / "index.safetensors"
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
    rewrite(sample_key=good["sample_key"][:1])
    with pytest.raises(DataError, match="sample_key has 1 entries"):
        open_dataset(tmp_path / "set")
    rewrite(sample_size=good["sample_size"].astype(np.int32))
    with pytest.raises(DataError, match="column sample_size is I32"):
        open_dataset(tmp_path / "set")
    rewrite(extra=good["sample_key"])
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
