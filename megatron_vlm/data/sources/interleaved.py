"""Interleaved documents as OBELICS and MINT have them: aligned lists of texts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.draft import Draft
from megatron_vlm.data.sources.conversations import media_root
from megatron_vlm.data.sources.documents import Shown, document_draft
from megatron_vlm.data.sources.media import FindMedium, MediaFolder, entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import RecordSource, open_records
from megatron_vlm.errors import DataError


def open_interleaved(path: Path, options: SourceOptions) -> RecordSource:
    """Interleaved documents from JSON lines, a JSON list or Parquet.

    Args:
        path: a file, or a folder of such files.
        options: `image_root`.

    Raises:
        DataError: nothing there, unreadable, or no media root.
    """
    files, names = open_records(path, '{"images": [path or null, ...], "texts": [...]}')
    folder = MediaFolder.open(media_root(path, options))
    to_drafts = partial(interleaved_drafts, find=folder.find)
    return RecordSource("document", files, names, to_drafts)


def interleaved_drafts(entry: Any, find: FindMedium, kept: Any = None) -> Sequence[Draft]:
    """The document of one entry.

    Args:
        entry: `images` and `texts` of one length; at each place stands one of them, and null in the
            other. A place with null in both, where a picture was lost, is passed over.
        find: gives its pictures.
        kept: what is kept beside the sample instead of the entry.

    Raises:
        DataError: the reason why it cannot be a sample; names the field.
    """
    if not isinstance(entry, dict):
        raise DataError(f"entry is {type(entry).__name__}; expected an object")
    images, texts = _list(entry, "images"), _list(entry, "texts")
    if len(images) != len(texts):
        raise DataError(
            f"images, texts: {len(images)} and {len(texts)} items; expected as many of both, with "
            "null where the other stands"
        )
    pieces: list[str | Shown] = []
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and text is not None:
            raise DataError(f"images[{place}], texts[{place}]: both are given; expected one")
        if image is not None:
            pieces.append(Shown("image", find(image, "image")))
        elif isinstance(text, str):
            pieces.append(text)
        elif text is not None:
            raise DataError(f"texts[{place}]: is {type(text).__name__}; expected a string")
    return [document_draft(pieces, entry_json(entry if kept is None else kept))]


def _list(entry: dict[str, Any], name: str) -> list[Any]:
    value = entry.get(name)
    if not isinstance(value, list):
        found = type(value).__name__ if name in entry else "missing"
        raise DataError(f"{name}: is {found}; expected a list")
    return value
