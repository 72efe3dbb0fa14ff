"""The index over all releases of a folder: README.md for people, collection.json for programs.

Both are made anew from the `training_state.json` of every release that lies there, so releases of
earlier commands stand in them too, and an interruption leaves nothing to be mended.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

from megatron_vlm.checkpoint.folder import write_atomically
from megatron_vlm.errors import ConversionError
from megatron_vlm.release.card import FILE as CARD
from megatron_vlm.release.card import STATE_FILE, header, number, told_once
from megatron_vlm.release.licences import front_matter
from megatron_vlm.release.words import bytes_in_words, count_in_words

FILE = "collection.json"
FORMAT = "megatron-vlm release collection 1"
STATE_FORMAT = "megatron-vlm release 1"


RELEASE = re.compile(r"(.+-)?iter_\d{7,}-.+-tokens")
"""The name of a release, or of a pushed one."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Consumed(_Part):
    tokens: int


class _Rate(_Part):
    value: FiniteFloat | None


class _Losses(_Part):
    training: dict[str, FiniteFloat | None]
    validation: dict[str, _Rate]


class _Source(_Part):
    manifest_sha256: str


class _Facts(_Part):
    """What is used again of a `training_state.json`; it holds more."""

    release: str
    name: str
    iteration: int
    stage: str | None
    consumed: _Consumed
    learning_rate: _Rate
    losses: _Losses
    files: dict[str, int]
    licence: str | None
    verification: dict[str, Any] | None
    options: dict[str, Any]
    source: _Source


def parse_facts(text: str) -> dict[str, Any] | None:
    """A `training_state.json`; null if it is none of ours, or lacks what is used of it."""
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("format") != STATE_FORMAT:
            return None
        _Facts.model_validate(facts)
    except (ValueError, RecursionError):
        return None
    return facts


def read_release(path: Path) -> dict[str, Any] | None:
    """The `training_state.json` of a release; null if `path` holds none of ours."""
    try:
        facts = parse_facts((path / STATE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return facts if facts is not None and facts["release"] == path.name else None


def releases(folder: Path) -> list[dict[str, Any]]:
    """What lies in a folder, by name and then by iteration."""
    found = [
        facts
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and (facts := read_release(path))
    ]
    return sorted(found, key=lambda facts: (facts["name"], facts["iteration"], facts["release"]))


def check_free(folder: Path) -> None:
    """Refuse a folder that is not for releases alone: what lies there must be ours.

    A folder with a list of ours is taken, whatever else was put there since.

    Raises:
        ConversionError: its README.md or collection.json was written by something else, or it has
            no list and holds something else than releases.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise ConversionError(f"{folder}: is a file; name a folder to write releases into")
    try:
        there = os.listdir(folder)
    except OSError:
        # Not there yet, or told by who writes into it.
        return
    foreign = foreign_index(there, lambda name: (folder / name).read_text())
    if foreign is not None:
        raise ConversionError(
            f"{folder / foreign}: was not written by mvlm release; name another folder"
        )
    others = sorted(n for n in there if not (n.startswith(".") or RELEASE.fullmatch(n)))
    if FILE not in there and others:
        raise ConversionError(
            f"{folder}: holds what is no release ({others[0]}, {len(others)} in all); name a new "
            "folder, an empty one, or one of releases"
        )


def foreign_index(there: Collection[str], read: Callable[[str], str]) -> str | None:
    """An index's file that `mvlm release` did not write, if there is one.

    Args:
        there: names of files.
        read: gives the text of one of them.
    """
    try:
        record = json.loads(read(FILE)) if FILE in there else None
        ours = isinstance(record, dict) and record.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        ours = False
    return None if ours else next((name for name in (FILE, CARD) if name in there), None)


def write_collection(folder: Path) -> None:
    """Write both files anew; each is replaced as a whole."""
    for name, text in collection_files(releases(folder), lambda name: f"{name}/{CARD}").items():
        write_atomically(folder / name, text)


def collection_files(found: Sequence[dict[str, Any]], link: Callable[[str], str]) -> dict[str, str]:
    """Both files' text by name.

    Args:
        found: each release's `training_state.json`.
        link: where a release of a name is to be seen from here.
    """
    entries = [_entry(facts) for facts in found]
    record = {"format": FORMAT, "releases": entries}
    # The list first: a README.md without it would not be known as ours.
    return {
        FILE: json.dumps(record, indent=2, allow_nan=False) + "\n",
        CARD: _readme(found, entries, link),
    }


def _entry(facts: dict[str, Any]) -> dict[str, Any]:
    losses = facts["losses"]
    return {
        "release": facts["release"],
        "name": facts["name"],
        "tokens": facts["consumed"]["tokens"],
        "iteration": facts["iteration"],
        "stage": facts["stage"],
        "learning_rate": facts["learning_rate"]["value"],
        "training_losses": losses["training"],
        "validation_losses": {name: each["value"] for name, each in losses["validation"].items()},
        "bytes": sum(facts["files"].values()),
        "licence": facts["licence"],
        "verified": facts["verification"] is not None,
        "manifest_sha256": facts["source"]["manifest_sha256"],
    }


def _readme(
    found: Sequence[dict[str, Any]], entries: list[dict[str, Any]], link: Callable[[str], str]
) -> str:
    lines = [
        "| Release | Tokens | Iteration | Learning rate | Training loss | Validation losses "
        "| Size |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        training = {k: v for k, v in entry["training_losses"].items() if k != "load_balancing_loss"}
        cells = (
            f"[{entry['release']}]({link(entry['release'])})",
            count_in_words(entry["tokens"]),
            f"{entry['iteration']:,}",
            number(entry["learning_rate"], ".6g"),
            _losses(training),
            _losses(told_once(entry["validation_losses"])),
            bytes_in_words(entry["bytes"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    licences = {facts["licence"] for facts in found}
    head = header(
        {
            **front_matter(licences.pop() if len(licences) == 1 else "other"),
            "library_name": "transformers",
            "tags": ["megatron-vlm", "intermediate-checkpoint"],
        }
    )
    table = "\n".join(lines)
    return (
        f"{head}\n\n# Intermediate checkpoints of {', '.join(names)}\n\n{table}\n\n"
        f"The same for programs: `{FILE}`. What each one is, how it was trained and how it is "
        "loaded is on its own card.\n"
    )


def _losses(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {number(value, '.4f')}" for name, value in values.items()) or "-"
