"""A release as a folder: SHA256SUMS over all of it, whose it is, and whether it is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import folder as checkpoint_folder
from megatron_vlm.checkpoint.folder import digest, sync
from megatron_vlm.errors import ConversionError
from megatron_vlm.release.card import CHECKPOINT_FOLDER, STATE_FILE, SUMS_FILE
from megatron_vlm.release.collection import RELEASE, parse_facts, read_release
from megatron_vlm.release.placing import tidy_drafts
from megatron_vlm.release.progress import Meter

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


def files_of(folder: Path) -> dict[str, int]:
    """Sizes of all files of a folder by their path in it, ascending."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tidy(folder: Path) -> None:
    """Clear away what a killed command left; only by the one command that writes there."""
    tidy_drafts(folder, RELEASE.fullmatch)


def include_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Add a checkpoint's files, as links where the file system allows that, else as copies."""
    target = folder / CHECKPOINT_FOLDER
    names = [*checkpoint_folder.read_manifest(checkpoint), checkpoint_folder.MANIFEST]
    for name in names:
        file = target / name
        if not file.resolve().is_relative_to(target.resolve()):
            raise ConversionError(
                f"{checkpoint / checkpoint_folder.MANIFEST}: lists {name!r}, which is not within "
                "the checkpoint; use another"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, file)
        except OSError:
            shutil.copyfile(checkpoint / name, file)


def write_sums(folder: Path, show_progress: bool) -> None:
    """Write SHA256SUMS over every other file, all of them put on the disk.

    Raises:
        ConversionError: an included checkpoint is not what its manifest says.
    """
    sizes = files_of(folder)
    lines = []
    expected: dict[str, str] = {}
    if (folder / CHECKPOINT_FOLDER).is_dir():
        manifest = checkpoint_folder.read_manifest(folder / CHECKPOINT_FOLDER)
        expected = {f"{CHECKPOINT_FOLDER}/{name}": e["sha256"] for name, e in manifest.items()}
    with Meter("digest", sum(sizes.values()), show_progress) as meter:
        for name, size in sizes.items():
            sync(folder / name)
            found = digest(folder / name)
            if expected.get(name, found) != found:
                raise ConversionError(
                    f"{name}: is not what the checkpoint's manifest says; the checkpoint is "
                    "damaged, use another"
                )
            lines.append(f"{found}  {name}\n")
            meter.advance(size)
    write(folder, SUMS_FILE, "".join(lines))


def write(folder: Path, name: str, content: str | bytes) -> None:
    """Write a small file and put it on the disk."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    sync(folder / name)


def fault(folder: Path, contents: bool, show_progress: bool = False) -> str | None:
    """What is wrong with a release of ours, or nothing.

    Args:
        folder: with a `training_state.json` of ours.
        contents: compare every digest; else sizes, and the digest of `training_state.json`, which
            tells them.
        show_progress: draw a bar.
    """
    try:
        return _fault(folder, contents, show_progress)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _fault(folder: Path, contents: bool, show_progress: bool) -> str | None:
    facts = read_release(folder)
    listed = sums(folder)
    if facts is None or not listed or listed.get(STATE_FILE) != digest(folder / STATE_FILE):
        return f"{STATE_FILE} and {SUMS_FILE} do not belong together"
    expected: dict[str, Any] = facts["files"]
    there = files_of(folder)
    for name in sorted({*expected, *listed} - {STATE_FILE}):
        if name not in there:
            return f"{name} is missing"
        if name not in listed or there[name] != expected.get(name):
            return f"{name} has {there[name]} bytes; expected {expected.get(name)}"
    if contents:
        with Meter("verify release", sum(there.values()), show_progress) as meter:
            for name, value in listed.items():
                if digest(folder / name) != value:
                    return f"the content of {name} does not match {SUMS_FILE}"
                meter.advance(there[name])
    return None


def foreign_file(folder: Path) -> str | None:
    """A file that `mvlm release` did not write there, if there is one."""
    known = {*sums(folder), SUMS_FILE}
    facts = read_release(folder)
    if facts is not None:
        known |= {*facts["files"], STATE_FILE}
    unknown = sorted(files_of(folder).keys() - known)
    return unknown[0] if unknown else None


def foreign_in_revision(
    revision: str, there: Collection[str], read: Callable[[str], str]
) -> str | None:
    """A file that no `mvlm release` has pushed under a revision's name, if there is one.

    Args:
        revision: name of a release without the model's.
        there: names of all files of that revision.
        read: gives the text of one of them.
    """
    facts = parse_facts(read(STATE_FILE)) if STATE_FILE in there else None
    known = set()
    if facts is not None and facts["release"] == f"{facts['name']}-{revision}":
        known = {*facts["files"], STATE_FILE, SUMS_FILE}
    unknown = sorted(set(there) - known)
    return unknown[0] if unknown else None


def manifest_digest(checkpoint: Path) -> str:
    """What a checkpoint is known by: the digest of the file that holds all digests."""
    return digest(checkpoint / checkpoint_folder.MANIFEST)


def sums(folder: Path) -> dict[str, str]:
    """Digests by file; none where SHA256SUMS is missing or something else."""
    try:
        lines = (folder / SUMS_FILE).read_text().splitlines()
    except (OSError, ValueError):
        return {}
    found = [_SUM.fullmatch(line) for line in lines]
    return {match[2]: match[1] for match in found if match} if all(found) else {}


def as_json(facts: dict[str, Any]) -> str:
    """`training_state.json`."""
    return json.dumps(facts, indent=2, allow_nan=False) + "\n"
