"""From a path to a source: which form it has, and its reader."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vlm.data.draft import Source
from megatron_vlm.data.sources.conversations import open_conversations
from megatron_vlm.data.sources.energon import META_FOLDER, open_energon
from megatron_vlm.data.sources.interleaved import open_interleaved
from megatron_vlm.data.sources.megatron_tokens import open_megatron_tokens
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.plain_text import open_text, open_text_lines
from megatron_vlm.data.sources.preference import open_preferences
from megatron_vlm.data.sources.records import RECORD_EXTENSIONS, open_records
from megatron_vlm.data.sources.trajectories import open_trajectories
from megatron_vlm.data.sources.webdataset import open_webdataset
from megatron_vlm.errors import DataError

_LOOKED_AT = 100
"""Entries looked at for one that tells the form."""


class Form(NamedTuple):
    """A form that sources have."""

    open: Callable[[Path, SourceOptions], Source]
    help: str


class Choice(NamedTuple):
    """The form that a source was found to have."""

    form: str
    reason: str
    """In one line."""


def open_source(
    path: Path,
    form: str = "auto",
    options: SourceOptions | None = None,
    tell: Callable[[str], None] | None = None,
) -> Source:
    """Open a source.

    Args:
        path: a file, a folder, or a pattern of tars.
        form: a key of `FORMS`; `auto` looks at what is there.
        options: settings; null: the defaults.
        tell: called with a line that says what `auto` took it for, and why.

    Raises:
        DataError: no such form, nothing there, or not of the form; names the file.
    """
    options = options or SourceOptions()
    if form == "auto":
        form, reason = choose_form(path, options)
        if tell is not None:
            tell(f"{path}: taken as {form}, since {reason}")
    if form not in FORMS:
        raise DataError(f"form {form!r}: expected auto or one of {', '.join(FORMS)}")
    return FORMS[form].open(path, options)


def choose_form(path: Path, options: SourceOptions) -> Choice:
    """The form of a source, by its names and its first entry.

    Raises:
        DataError: nothing there, or it may be several forms or none.
    """
    try:
        if path.is_dir():
            return _choose_folder(path, options)
        if path.is_file():
            return _choose_file(path, options)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if path.exists():
        raise DataError(f"{path}: is neither a file nor a folder")
    if re.search(r"[{*?]", str(path)):
        return Choice("webdataset", "it is a pattern of tars")
    if Path(f"{os.fspath(path)}.idx").is_file():
        return Choice("megatron", f"there is {path.name}.idx")
    raise DataError(f"{path}: does not exist")


def _choose_folder(path: Path, options: SourceOptions) -> Choice:
    if (path / META_FOLDER).is_dir():
        return Choice("energon", f"it holds {META_FOLDER}")
    found = {_EXTENSIONS[e]: e for e in _extensions(path) if e in _EXTENSIONS}
    # Tools that write tars and token files leave records of their own beside them.
    several = [form for form in _BESIDE_OTHERS if form in found] or sorted(found)
    if len(several) != 1 and several[:1] != ["webdataset"]:
        what = f"files of several forms ({', '.join(several)})" if several else "no known files"
        raise DataError(f"{path}: holds {what}; say which with --form {' or '.join(FORMS)}")
    form = several[0]
    if form == "records":
        return _choose_records(path, options)
    return Choice(form, f"it holds {found[form]} files")


def _choose_file(path: Path, options: SourceOptions) -> Choice:
    extension = path.suffix.lower()
    form = _EXTENSIONS.get(extension)
    if form is None:
        raise DataError(
            f"{path}: a file {extension or 'without an extension'} is of no known form; say which "
            f"with --form {' or '.join(FORMS)}"
        )
    if form == "records":
        return _choose_records(path, options)
    return Choice(form, f"it is a {extension} file")


def _choose_records(path: Path, options: SourceOptions) -> Choice:
    files, names = open_records(path, "entries")
    looked = 0
    records = (
        (name, record)
        for name, file in zip(names, files, strict=True)
        for record in file.records(0)
    )
    for name, record in islice(records, _LOOKED_AT):
        looked += 1
        try:
            entry = record.load()
        except DataError:
            entry = None
        if (choice := _choose_entry(entry, options)) is not None:
            return Choice(choice.form, f"an entry of {name} has {choice.reason}")
    raise DataError(
        f"{path}: none of its first {looked} entries is of a known form; say which with --form "
        f"{' or '.join(FORMS)}"
    )


def _choose_entry(entry: Any, options: SourceOptions) -> Choice | None:
    if not isinstance(entry, dict):
        return None
    for form, fields in _TELLING:
        if all(entry.get(field) is not None for field in fields):
            return Choice(form, " and ".join(fields))
    if isinstance(entry.get(options.text_field), str):
        return Choice("text", options.text_field)
    return None


def _extensions(folder: Path) -> Iterator[str]:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.splitext(n)[1].lower() for n in names if not n.startswith("."))


def _open_any_text(path: Path, options: SourceOptions) -> Source:
    records = (
        not any(extension == ".txt" for extension in _extensions(path))
        if path.is_dir()
        else path.suffix.lower() in RECORD_EXTENSIONS
    )
    return open_text_lines(path, options) if records else open_text(path, options)


def _open_pdf(path: Path, options: SourceOptions) -> Source:
    # Its library is an extra.
    from megatron_vlm.data.pdf.source import PdfSource

    return PdfSource(path, options.pdf_mode, options.pdf, options.template, options.thinking.mode)


FORMS: dict[str, Form] = {
    "conversations": Form(open_conversations, "LLaVA `conversations`, `messages` or `sessions`"),
    "trajectories": Form(open_trajectories, "`instruction` and `steps` of pictures and actions"),
    "interleaved": Form(open_interleaved, "OBELICS or MINT: `images` and `texts`, aligned"),
    "webdataset": Form(open_webdataset, "tars whose members form samples by their names"),
    "energon": Form(open_energon, "a folder that Megatron-Energon prepared"),
    "text": Form(_open_any_text, "`.txt` files, or JSON lines with a text field"),
    "pdf": Form(_open_pdf, "PDF files, as documents or as pages with covered text"),
    "megatron": Form(open_megatron_tokens, "tokenized text, `.bin` and `.idx`"),
    "preference": Form(open_preferences, "`images`, `prompt`, `chosen`, `rejected`"),
}
"""Forms by the name that the command line takes."""

_EXTENSIONS = {
    **dict.fromkeys(RECORD_EXTENSIONS, "records"),
    **{".tar": "webdataset", ".idx": "megatron", ".bin": "megatron", ".txt": "text", ".pdf": "pdf"},
}

_BESIDE_OTHERS: tuple[str, ...] = ("webdataset", "megatron")

_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("conversations", ("conversations",)),
    ("conversations", ("messages",)),
    ("conversations", ("sessions",)),
    ("trajectories", ("instruction", "steps")),
    ("interleaved", ("images", "texts")),
)
"""Fields that tell a form, the most telling first."""
