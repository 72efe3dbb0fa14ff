"""Where a conversion writes: only into what is empty or its own, and whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlm import __version__
from megatron_vlm.checkpoint import folder
from megatron_vlm.errors import ConversionError, UserError
from megatron_vlm.release.placing import Draft, draft, held

ITERATION = 0
"""What an imported checkpoint is called: nothing was trained."""

MARKER = "mvlm_export.json"
"""File by which a released folder is known to be ours; it lists the others."""
_FORMAT = "megatron-vlm export 1"


@contextmanager
def checkpoint_folder(target: Path, overwrite: bool) -> Iterator[None]:
    """Keep a folder for this import alone, free of what an earlier one that was killed has left.

    Raises:
        ConversionError: it holds anything but, with `overwrite`, an earlier import; tells what. Or
            another command is writing there, or it cannot be made.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target}: is a file; name a folder to write the checkpoint into")
    with held(target):
        name = folder.checkpoint_name(ITERATION)
        # Before anything is tidied: a run that is training has hidden folders of its own.
        _refuse_others(target, {name, f".incomplete-{name}", f".replaced-{name}"})
        folder.tidy(target)
        if (target / name).exists():
            if not _is_import(target / name):
                raise _not_ours(target, name)
            if not overwrite:
                raise ConversionError(
                    f"{target}: holds an imported checkpoint already; name a new folder, or "
                    "replace it with --overwrite"
                )
        try:
            yield
        finally:
            # The one before comes back if this one did not get its name.
            folder.tidy(target)


def _refuse_others(target: Path, own: set[str]) -> None:
    for name in sorted(path.name for path in target.iterdir()):
        # A kill may leave the second, with a number behind it.
        latest = name == folder.LATEST or name.startswith(f".{folder.LATEST}.")
        if name not in own and not latest:
            raise _not_ours(target, name)


def _not_ours(target: Path, name: str) -> ConversionError:
    return ConversionError(
        f"{target}: holds {name}, which mvlm import did not write; name a new folder"
    )


def _is_import(path: Path) -> bool:
    try:
        return "imported" in folder.read_state(path)
    except UserError:
        return False


class ReleaseFolder:
    """A folder being written beside its final place; see `new_release`."""

    def __init__(self, target: Path, draft: Draft, overwrite: bool) -> None:
        """Make the hidden folder."""
        self._target, self._draft, self._overwrite = target, draft, overwrite
        self.path = draft.path
        self.path.mkdir()

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with open(self.path / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def commit(self, about: dict[str, Any]) -> None:
        """Add the marker, which carries `about`, and give the folder its name.

        Raises:
            ConversionError: somebody has put something there meanwhile.
            OSError: the disk refuses.
        """
        names = sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))
        marker = {"format": _FORMAT, "version": __version__, **about, "files": names}
        self.write(MARKER, (json.dumps(marker, indent=2) + "\n").encode())
        self._draft.commit(_check_release(self._target, self._overwrite))


@contextmanager
def new_release(target: Path, overwrite: bool) -> Iterator[ReleaseFolder]:
    """A folder that leaves nothing unless it is committed.

    Raises:
        ConversionError: `target` holds what `mvlm export` did not write, or holds a release and
            `overwrite` is false, or cannot be replaced, or another command is writing there.
        OSError: the disk refuses.
    """
    with draft(target) as begun:
        _check_release(target, overwrite)
        yield ReleaseFolder(target, begun, overwrite)


def _check_release(target: Path, overwrite: bool) -> bool:
    """Whether there is a release to be replaced."""
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target}: is a file; name a folder to write the export into")
    if not target.is_dir() or not any(target.iterdir()):
        return False
    try:
        marker = json.loads((target / MARKER).read_text())
        ours = marker["format"] == _FORMAT
        listed = {*marker["files"], MARKER}
    except (OSError, ValueError, KeyError, TypeError):
        ours, listed = False, set()
    there = {str(path.relative_to(target)) for path in target.rglob("*")}
    foreign = sorted(there - listed)
    if not ours or foreign:
        what = foreign[0] if ours else "files"
        raise ConversionError(
            f"{target}: holds {what} that mvlm export did not write; name a new folder"
        )
    if not overwrite:
        raise ConversionError(
            f"{target}: holds an export already; name a new folder, or replace it with --overwrite"
        )
    return True
