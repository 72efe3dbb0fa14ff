"""How a folder gets its name: written beside its place by one command alone, whole or not at all.

.X.incomplete/X     being written, or left by a kill; `.X.incomplete` is what is locked
.X.replaced         the one before, while two names change; put back if that is cut short
X                   whole
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.checkpoint import folder
from megatron_vlm.errors import ConversionError


@contextmanager
def disk_errors(target: Path, advice: str | None = None) -> Iterator[None]:
    """Turn what a disk refuses into one line about the target.

    Args:
        target: what is written.
        advice: what to do; null: what suits the error.
    """
    try:
        yield
    except OSError as error:
        reason, way = error.strerror or str(error), "name another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest(target)).free // 2**20
            reason, way = f"{reason}; {free} MiB are free there", f"make room or {way}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            way = "name a folder below one that this user may write to"
        raise ConversionError(
            f"{target}: could not be written ({reason}); "
            f"{advice or f'{way}; nothing was left behind'}"
        ) from error


def nearest(path: Path) -> Path:
    """What there is of a path: itself, or the nearest folder above it."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


class InUseError(ConversionError):
    """Another command is writing there."""


@contextmanager
def held(path: Path, said: Path | None = None) -> Iterator[None]:
    """Make a folder if there is none, and keep other commands out of it.

    The kernel keeps the lock (flock), for processes of this machine and until this one ends; on
    file systems without such locks it is none. What was made is removed if it stayed empty.

    Args:
        path: the folder.
        said: what errors call it; null: the same.

    Raises:
        InUseError: another command has it.
        ConversionError: it cannot be made.
    """
    place = Path(os.path.realpath(path))
    with disk_errors(said or path):
        made = [part for part in (place, *place.parents) if not part.exists()]
        place.mkdir(parents=True, exist_ok=True)
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(handle, place):
            raise InUseError(
                f"{said or path}: another mvlm command is writing there; wait for it, or name "
                "another folder"
            )
        try:
            yield
        finally:
            # Still locked: nobody else has begun to write there.
            for part in made:
                try:
                    part.rmdir()
                except FileNotFoundError:
                    continue
                except OSError:
                    break
    finally:
        os.close(handle)


def _lock(handle: int, place: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems know no locks.
        return True
    try:
        # Who had it a moment ago may have removed it.
        return os.path.samestat(os.fstat(handle), os.stat(place))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Draft:
    """A folder that is being written."""

    path: Path
    """Where; made by whoever writes it."""
    place: Path
    """Where it will lie."""

    def commit(self, replace: bool) -> None:
        """Give it its name.

        Args:
            replace: whether a folder of that name gives way; else only an empty one does.

        Raises:
            OSError: the disk refuses; what was there is there still.
        """
        for path in (*(path for path in self.path.rglob("*") if path.is_dir()), self.path):
            folder.sync(path)
        if replace:
            os.rename(self.place, _replaced(self.place))
        os.rename(self.path, self.place)
        folder.sync(self.place.parent)


@contextmanager
def draft(target: Path) -> Iterator[Draft]:
    """A folder to be written for `target`, through links; gone at the end unless it is committed.

    Raises:
        ConversionError: another command is writing it, it is a mount point, or nothing can be
            written beside it.
    """
    place = Path(os.path.realpath(target))
    if os.path.ismount(place):
        raise ConversionError(
            f"{target}: is a mount point, which a finished folder cannot take the place of; name a "
            "folder below it"
        )
    hidden = _hidden(place)
    with held(hidden, target):
        try:
            _tidy(place)
            yield Draft(hidden / place.name, place)
        finally:
            _tidy(place)
            with suppress(OSError):
                hidden.rmdir()


def tidy_drafts(parent: Path, ours: Callable[[str], object]) -> None:
    """Clear away what killed commands left of folders, but of those that another is writing.

    Args:
        parent: where they lie.
        ours: which names to look at.
    """
    found = {match[1] for path in parent.iterdir() if (match := _LEFT.fullmatch(path.name))}
    for name in sorted(filter(ours, found)):
        with suppress(InUseError), draft(parent / name):
            pass


def _tidy(place: Path) -> None:
    hidden = _hidden(place)
    for path in list(hidden.iterdir()) if hidden.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    old = _replaced(place)
    if not old.is_dir():
        return
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.rename(old, place)
    except OSError as error:
        raise ConversionError(
            f"{place}: could not be put back ({error.strerror}); it is whole in {old}: rename that"
        ) from error


_LEFT = re.compile(r"\.(.+)\.(?:incomplete|replaced)", re.DOTALL)
"""The names that the two functions below give."""


def _hidden(place: Path) -> Path:
    return place.with_name(f".{place.name}.incomplete")


def _replaced(place: Path) -> Path:
    return place.with_name(f".{place.name}.replaced")
