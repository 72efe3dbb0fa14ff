"""WebDataset tars: pictures with captions, conversations, or interleaved documents.

Members whose names agree up to the first dot are one sample. A caption is `.txt` or `.caption`, or
`caption` or `text` in the `.json`; a `.json` with turns makes a conversation of the sample.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_vlm.data.draft import Draft, Medium, SampleKind
from megatron_vlm.data.sources.byte_ranges import files_below, names_of, shortened
from megatron_vlm.data.sources.conversations import conversation_drafts, listed_media
from megatron_vlm.data.sources.documents import Shown, document_draft
from megatron_vlm.data.sources.interleaved import interleaved_drafts
from megatron_vlm.data.sources.media import (
    PICTURE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    MediumKind,
    entry_json,
)
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.tar_groups import (
    Group,
    TarGroupSource,
    extensions_of,
    tar_groups,
)
from megatron_vlm.errors import DataError

Shape: TypeAlias = Literal["caption", "conversation", "interleaved"]
"""What the groups of a source hold; the same for all of them."""

_CAPTIONS = ("txt", "caption")
_CAPTION_FIELDS = ("caption", "text")
_MAX_TARS = 10**6


def open_webdataset(path: Path, options: SourceOptions) -> TarGroupSource:
    """The samples of WebDataset tars; the first of them tells what all of them are.

    Args:
        path: a tar, a folder of tars, or a pattern with `{000..999}`, `{a,b}`, `*` or `?`.
        options: `fps`, `thinking`, `template`.

    Raises:
        DataError: nothing there, no tar, or no sample in it.
    """
    files, names = find_tars(path)
    shape = _shape_of_first(files)
    kind: SampleKind = "conversation" if shape == "conversation" else "document"
    return TarGroupSource(kind, files, names, partial(group_drafts, shape=shape, options=options))


def find_tars(path: Path) -> tuple[list[Path], list[str]]:
    """The tars that a path or a pattern stands for, and what they are called.

    A pattern's braces keep their order; what `*` and `?` match is sorted.

    Raises:
        DataError: nothing there.
    """
    if path.exists() or not re.search(r"[{*?]", str(path)):
        found = files_below(path, [".tar"], "WebDataset tars")
        return found, names_of(path, found)
    files: list[Path] = []
    for name in expand_braces(str(path)):
        matched = sorted(glob.glob(name)) if re.search(r"[*?]", name) else [name]
        if not matched:
            raise DataError(f"{name}: no file has such a name")
        files += map(Path, matched)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: no such file, though {path} names it")
    return files, [file.name for file in files]


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern spells: `{00..12}` counts, `{a,b}` lists.

    Raises:
        DataError: more than a million names.
    """
    names = [""]
    for i, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        choices = _choices(piece) if i % 2 else [piece]
        if len(names) * len(choices) > _MAX_TARS:
            raise DataError(f"{pattern}: spells more than {_MAX_TARS} names")
        names = [name + choice for name in names for choice in choices]
    return names


def group_drafts(group: Group, shape: Shape, options: SourceOptions) -> Sequence[Draft]:
    """The sample of one group.

    Raises:
        DataError: the reason why it cannot be one.
    """
    entry = group_json(group)
    found = _shape(group, entry)
    if found != shape:
        raise DataError(
            f"holds a sample of the shape {found}, but the first of the source is a {shape}; keep "
            "them in tars of their own"
        )
    if found == "conversation":
        return conversation_drafts(_with_media(entry, group), partial(_find, group), options, entry)
    if found == "interleaved":
        return interleaved_drafts(entry, partial(_find, group), entry)
    shown = [
        Shown(kind, group.medium(extension))
        for extension in group.members
        if (kind := medium_kind(extension)) is not None
    ]
    return [document_draft([*shown, _caption(group, entry)], entry_json(entry), options.fps)]


def group_json(group: Group) -> dict[str, Any]:
    """What the group's `.json` holds; empty without one.

    Raises:
        DataError: it is no JSON object.
    """
    if "json" not in group.members:
        return {}
    value = group.json("json")
    if not isinstance(value, dict):
        raise DataError(
            f"{shortened(group.members['json'].name)}: is {type(value).__name__}; expected an "
            "object"
        )
    return value


def medium_kind(extension: str) -> MediumKind | None:
    """What a member with this extension shows; null if it is neither picture nor video."""
    last = extension.rpartition(".")[2]
    if last in PICTURE_EXTENSIONS:
        return "image"
    return "video" if last in VIDEO_EXTENSIONS else None


def _shape_of_first(files: Sequence[Path]) -> Shape:
    for file in files:
        for group in tar_groups(file):
            try:
                return _shape(group, group_json(group))
            except DataError as error:
                raise DataError(
                    f"{file}: first sample {shortened(group.key)} is bad: {error}"
                ) from error
    raise DataError(f"{files[0]}: holds no samples; expected members such as 000.jpg and 000.txt")


def _shape(group: Group, entry: dict[str, Any]) -> Shape:
    if any(entry.get(name) is not None for name in ("conversations", "messages", "sessions")):
        return "conversation"
    return "interleaved" if isinstance(entry.get("texts"), list) else "caption"


def _caption(group: Group, entry: dict[str, Any]) -> str:
    for extension in _CAPTIONS:
        if extension in group.members:
            return group.text(extension).strip()
    for name in _CAPTION_FIELDS:
        if isinstance(entry.get(name), str):
            return str(entry[name]).strip()
    raise DataError(
        f"holds no caption; expected a member .{' or .'.join(_CAPTIONS)}, or a .json with "
        f"{' or '.join(_CAPTION_FIELDS)}"
    )


def _with_media(entry: dict[str, Any], group: Group) -> dict[str, Any]:
    """The entry with media that are members: those it names, or else all there are."""
    rest = {
        key: value
        for key, value in entry.items()
        if key not in ("image", "images", "video", "videos")
    }
    kinds: tuple[MediumKind, ...] = ("image", "video")
    for kind in kinds:
        present = [e for e in group.members if medium_kind(e) == kind]
        named = listed_media(entry, kind)
        # Entries often keep the name that their only picture had before it was packed.
        if not named or len(named) == len(present) == 1:
            named = present
        rest[f"{kind}s"] = named
    return rest


def _find(group: Group, named: Any, kind: MediumKind) -> Medium:
    extension = _member(group, named)
    if extension is None or medium_kind(extension) != kind:
        raise DataError(
            f"{kind} {shortened(named)}: no such member; the sample has {extensions_of(group)}"
        )
    return group.medium(extension)


def _member(group: Group, named: Any) -> str | None:
    """The extension of the member that an entry names by its name, its file name or that alone."""
    if not isinstance(named, str):
        return None
    if named in group.members:
        return named
    for extension, member in group.members.items():
        if named == member.name or named == member.name.rpartition("/")[2]:
            return extension
    return None


def _choices(inside: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted is None:
        return inside.split(",")
    first, last = counted[1], counted[2]
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= _MAX_TARS:
        raise DataError(f"{{{inside}}}: counts more than {_MAX_TARS} names")
    return [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
