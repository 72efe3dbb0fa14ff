"""Where a conversion writes: only into what is empty or its own, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlm import __version__
from megatron_vlm.checkpoint import folder
from megatron_vlm.errors import ConversionError, UserError

ITERATION = 0
"""What an imported checkpoint is called: nothing was trained."""

MARKER = "mvlm_export.json"
"""File by which a released folder is known to be ours; it lists the others."""
_FORMAT = "megatron-vlm export 1"


def claim_checkpoint(target: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but, with `overwrite`, an earlier import.

    Raises:
        ConversionError: it does; tells what.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target}: is a file; name a folder to write the checkpoint into")
    if not target.is_dir():
        return
    name = folder.checkpoint_name(ITERATION)
    own = {name, folder.LATEST}
    # What an import that was killed has left is nobody's.
    left = {f".incomplete-{name}", f".replaced-{name}"}
    there = {path.name for path in target.iterdir()} - left
    if not there:
        return
    foreign = sorted(there - own)
    if foreign or not _is_import(target / name):
        raise ConversionError(
            f"{target}: holds {(foreign or [name])[0]}, which mvlm import did not write; name a "
            "new folder"
        )
    if not overwrite:
        raise ConversionError(
            f"{target}: holds an imported checkpoint already; name a new folder, or replace it "
            "with --overwrite"
        )


def _is_import(path: Path) -> bool:
    try:
        return "imported" in folder.read_state(path)
    except UserError:
        return False


class ReleaseFolder:
    """A folder being written beside its final place; a context manager.

    It gets its name when it is committed, and leaves nothing when it is not.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        """Make the hidden folder.

        Raises:
            ConversionError: `target` holds what `mvlm export` did not write, or holds a release
                and `overwrite` is false.
        """
        self.target = Path(os.path.abspath(target))
        self._replaces = _check_release(target, self.target, overwrite)
        self.path = self.target.with_name(f".{self.target.name}.incomplete")
        self._old = self.target.with_name(f".{self.target.name}.replaced")
        self._made = [path for path in self.target.parents if not path.exists()]
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._committed = False

    def __enter__(self) -> ReleaseFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._committed:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                return

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with open(self.path / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def commit(self, about: dict[str, Any]) -> None:
        """Add the marker, which carries `about`, and give the folder its name."""
        names = sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*"))
        marker = {"format": _FORMAT, "version": __version__, **about, "files": names}
        self.write(MARKER, (json.dumps(marker, indent=2) + "\n").encode())
        if self._replaces:
            shutil.rmtree(self._old, ignore_errors=True)
            os.rename(self.target, self._old)
        os.rename(self.path, self.target)
        self._committed = True
        folder.sync(self.target.parent)
        shutil.rmtree(self._old, ignore_errors=True)


def _check_release(said: Path, target: Path, overwrite: bool) -> bool:
    """Whether there is a release to be replaced."""
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{said}: is a file; name a folder to write the release into")
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
            f"{said}: holds {what} that mvlm export did not write; name a new folder"
        )
    if not overwrite:
        raise ConversionError(
            f"{said}: holds a release already; name a new folder, or replace it with --overwrite"
        )
    return True


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what a disk refuses into one line about the target."""
    try:
        yield
    except OSError as error:
        place = next(path for path in (target, *target.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free // 2**20
        raise ConversionError(
            f"{target}: could not be written ({error.strerror or error}; {free} MiB are free "
            "there); make room or name another folder; nothing was left behind"
        ) from error
