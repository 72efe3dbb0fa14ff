"""Which form a path is taken for; and that mutated files of any form are refused in order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vlm.data.draft import Source, Text
from megatron_vlm.data.sources.opening import FORMS, open_source
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.sources.reading import all_facts, assert_resumes, write_lines, write_tar
from tests.data.sources.test_energon import CAPTIONS, captions, prepare

pytestmark = pytest.mark.unit

OPTIONS = SourceOptions(tokenizer=byte_tokenizer())
TALK = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def tokens(prefix: Path) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    builder.add_item(torch.tensor([1, 2, 3]))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def text(path: Path) -> Path:
    path.write_text("text")
    return path


def listed(path: Path) -> Path:
    path.write_text(json.dumps([TALK, {**TALK, "id": [[{"deep": "x"}]]}]))
    return path


MAKERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "list": ("conversations", lambda d: listed(d / "x.json")),
    "lines": ("conversations", lambda d: write_lines(d / "x.jsonl", [3, {}, TALK])),
    "sessions": ("conversations", lambda d: write_lines(d / "x.jsonl", [{"sessions": [TALK]}])),
    "messages": (
        "conversations",
        lambda d: write_lines(
            d / "x.json", [{"messages": [{"role": "assistant", "content": "a"}], "images": []}]
        ),
    ),
    "preference": ("preference", lambda d: write_lines(d / "x.jsonl", [PAIR])),
    "implicit": (
        "preference",
        lambda d: write_lines(d / "x.ndjson", [{"chosen": [1], "rejected": [2]}]),
    ),
    "interleaved": (
        "interleaved",
        lambda d: write_lines(d / "x.jsonl", [{"images": [None], "texts": ["a"]}]),
    ),
    "trajectories": (
        "trajectories",
        lambda d: write_lines(d / "x.jsonl", [{"instruction": "a", "steps": [], "text": "b"}]),
    ),
    "text lines": ("text", lambda d: write_lines(d / "x.jsonl", [{"text": "a", "meta": 1}])),
    "text": ("text", lambda d: text(d / "x.txt")),
    "tar": ("webdataset", lambda d: write_tar(d / "x.tar", [("a.jpg", b""), ("a.txt", b"x")])),
    "index": ("megatron", lambda d: tokens(d / "x").with_suffix(".idx")),
    "bin": ("megatron", lambda d: tokens(d / "x").with_suffix(".bin")),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("whole", [True, False])
def test_auto(tmp_path: Path, name: str, whole: bool) -> None:
    """A file, and the folder it is in, are taken for the same, and read the same."""
    form, make = MAKERS[name]
    path = make(tmp_path)
    told: list[str] = []
    source = open_source(tmp_path if whole else path, "auto", OPTIONS, told.append)
    (line,) = told
    assert f": taken as {form}, since " in line and "\n" not in line
    named = open_source(path, form, OPTIONS)
    assert assert_resumes(source) == assert_resumes(named)
    assert source.kind == named.kind and source.origins == named.origins


def test_auto_of_other_paths(tmp_path: Path) -> None:
    told: list[str] = []
    tokens(tmp_path / "a.b")
    prepare(tmp_path / "e", captions(4), "CaptioningSample", CAPTIONS)
    for path in (
        tmp_path / "a.b",
        tmp_path / "e",
        tmp_path / "e" / "shards",
        tmp_path / "e" / "shards" / "shard_{000..001}.tar",
    ):
        open_source(path, "auto", OPTIONS, told.append)
    forms = [line.split(": taken as ")[1].split(",")[0] for line in told]
    assert forms == ["megatron", "energon", "webdataset", "webdataset"]


def test_pdf(tmp_path: Path) -> None:
    figure = Figure()
    figure.text(0.1, 0.5, "Some words that a page has, enough of them to make up a sentence.")
    figure.savefig(tmp_path / "x.pdf", metadata={"CreationDate": None})
    told: list[str] = []
    source = open_source(tmp_path, tell=told.append)
    assert ": taken as pdf, since it holds .pdf files" in told[0]
    (draft,) = next(source.entries()).drafts()
    assert source.kind == "document"
    assert "words that a page has" in "".join(p.text for p in draft.parts if isinstance(p, Text))
    masked = open_source(tmp_path / "x.pdf", options=SourceOptions(pdf_mode="masked"))
    assert masked.kind == "conversation"


def test_field_of_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"body": "a"}])
    assert open_source(path, options=SourceOptions(text_field="body")).kind == "document"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "no", "no: does not exist"),
        (lambda d: d, "holds no known files; say which with --form conversations or traj"),
        (lambda d: text(d / "x.docx"), "a file .docx is of no known form; say which"),
        (lambda d: text(d / "x"), "a file without an extension is of no known form"),
        (lambda d: write_lines(d / "x.jsonl", [{"a": 1}, 3]), "none of its first 2 entries is of"),
        (
            lambda d: [write_lines(d / f"{n}.jsonl", [{}] * 150) for n in "xy"][0].parent,
            "none of its first 100 entries is of",
        ),
        (lambda d: text(write_lines(d / "x.jsonl", [TALK]).with_name("y.txt")).parent, "several f"),
    ],
)
def test_what_cannot_be_told(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(make(tmp_path))
    assert message in str(caught.value)


def test_no_such_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="form 'x': expected auto or one of conversations, traj"):
        open_source(text(tmp_path / "x.txt"), "x")
    assert all(form.help for form in FORMS.values())


def survives(path: Path, form: str) -> bool:
    """Reads what can be read; anything but DataError is a crash. True if all of it was good."""
    try:
        source: Source = open_source(path, form, OPTIONS)
        listing: list[Any] = all_facts(source)
    except DataError as error:
        assert "\n" not in str(error)
        return False
    assert [item[0] for item in listing] == list(range(len(listing)))
    return not any(isinstance(item[3], str) for item in listing)


@pytest.mark.parametrize("name", [n for n in MAKERS if n not in ("bin", "text")])
def test_mutated_files_never_crash(tmp_path: Path, name: str) -> None:
    """Each outcome is entries, bad entries with a reason, or one line that stops the build."""
    form, make = MAKERS[name]
    path = make(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(name)
    outcomes = set()
    for round_ in range(40):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            change = rng.randrange(4)
            if change == 0:
                content[place] ^= 1 << rng.randrange(8)
            elif change == 1:
                content[place : place + rng.randint(1, 9)] = b""
            elif change == 2:
                content[place:place] = rng.choice(
                    [b"\xff", b"\0", b"\n", b"[" * 3000, b"NaN", b'"', b"{", b"1e999", b"null"]
                )
            else:
                del content[place:]
            content = content or bytearray(b" ")
        path.write_bytes(content)
        outcomes.add(survives(path, "auto" if round_ % 4 == 0 else form))
    assert False in outcomes
