"""What sources give, as plain values that tests can compare."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_vlm.data.draft import Draft, Entry, Part, Source, Special, Text, Tokens
from megatron_vlm.errors import DataError

USER, ASSISTANT = Special("user", False), Special("assistant", False)
END, LEARNED_END, EOS = Special("end", False), Special("end", True), Special("eos", True)


def said(text: str) -> list[Part]:
    """The parts of an assistant's turn."""
    return [ASSISTANT, Text(text, True), LEARNED_END]


def asked(*parts: Part | str) -> list[Part]:
    """The parts of a user's turn."""
    return [USER, *(Text(p, False) if isinstance(p, str) else p for p in parts), END]


def parts_of(draft: Draft) -> list[Any]:
    return [
        ("tokens", part.ids.tolist(), part.learned) if isinstance(part, Tokens) else part
        for part in draft.parts
    ]


def media_of(draft: Draft) -> list[bytes]:
    """The bytes of a sample's media; each is as long as it said."""
    read = [medium.read() for medium in draft.media]
    assert [len(content) for content in read] == [medium.size for medium in draft.media]
    return read


def facts(entry: Entry) -> tuple[Any, ...]:
    """An entry and its samples, or why it is bad."""
    try:
        samples: Any = [(parts_of(d), media_of(d), json.loads(d.entry)) for d in entry.drafts()]
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        samples = str(error)
    return entry.number, entry.origin, entry.id, samples


def all_facts(source: Source, start: int = 0) -> list[tuple[Any, ...]]:
    return [facts(entry) for entry in source.entries(start)]


def only(source: Source) -> Draft:
    """The only sample of a source with one entry."""
    (entry,) = source.entries()
    (draft,) = entry.drafts()
    return draft


def reasons(source: Source) -> list[str]:
    """Why each entry is bad; empty for the good ones."""
    return [item[3] if isinstance(item[3], str) else "" for item in all_facts(source)]


def assert_resumes(source: Source) -> list[tuple[Any, ...]]:
    """Reading from any entry on gives the rest of the full listing; returns that listing."""
    listing = all_facts(source)
    assert [item[0] for item in listing] == list(range(len(listing)))
    assert all(0 <= item[1] < len(source.origins) for item in listing)
    if source.total is not None:
        assert source.total == len(listing)
    for start in range(len(listing) + 2):
        assert all_facts(source, start) == listing[start:], f"from {start}"
    return listing


def write_lines(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar as Python's own library writes it."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path
