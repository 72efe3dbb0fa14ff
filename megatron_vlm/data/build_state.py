"""What a build leaves behind when it ends early, and whether the next one may go on with it.

A build goes on only after one that had the same source, settings and versions: the signature of
both says so. Pictures that entries name by path are not looked at.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_vlm.data.format import BUILDING_FOLDER, remove_build, sync, write_atomic
from megatron_vlm.data.shards import ShardFiles, ShardRecord
from megatron_vlm.data.sources.webdataset import find_tars
from megatron_vlm.errors import DataError

_RESUME_FILE = "resume.json"
_PUBLISH_FILE = "publish.json"
_DECIDING_PACKAGES = (
    *("megatron-vlm", "numpy", "pillow", "simplejpeg", "tokenizers"),
    *("av", "pypdfium2", "pyarrow", "jinja2"),
)
"""What decides which bytes a build writes: decoders, and what makes tokens of text."""


class BuildState:
    """The folder in which a build's files lie until all of them are complete."""

    def __init__(self, out: Path) -> None:
        """That of the data set in `out`; nothing is read or made."""
        self.folder = out / BUILDING_FOLDER

    def begin(self, signature: str) -> list[ShardRecord]:
        """Go on in the folder if it is of a build of this signature, else make it anew.

        Returns:
            The shards that are complete.

        Raises:
            OSError: the disk refuses.
        """
        complete = self._complete() if self._signature() == signature else []
        self._clear(complete)
        if not complete:
            self.folder.mkdir(exist_ok=True)
            record = json.dumps({"signature": signature}).encode()
            write_atomic(self.folder / _RESUME_FILE, record)
            sync(self.folder.parent)
        return complete

    def give_up(self) -> int:
        """Leave for the next build what it may go on with, and nothing else.

        Returns:
            Number of complete shards that stay.

        Raises:
            OSError: the disk refuses.
        """
        complete = self._complete()
        self._clear(complete)
        return len(complete)

    def publish(self, record: Mapping[str, Any]) -> None:
        """Note that every file is complete, and what `dataset.json` is to hold.

        Raises:
            OSError: the disk refuses.
        """
        write_atomic(self.folder / _PUBLISH_FILE, json.dumps(record).encode())

    def published(self, signature: str) -> dict[str, Any] | None:
        """What `publish` noted, in a build of this signature."""
        if self._signature() != signature:
            return None
        return _read_object(self.folder / _PUBLISH_FILE)

    def remove(self) -> None:
        """Remove what builds write into the folder, and the folder.

        Raises:
            OSError: the disk refuses.
        """
        self._clear([])

    def _signature(self) -> Any:
        return (_read_object(self.folder / _RESUME_FILE) or {}).get("signature")

    def _complete(self) -> list[ShardRecord]:
        complete: list[ShardRecord] = []
        while (record := ShardFiles(self.folder, len(complete)).read_record()) is not None:
            complete.append(record)
        return complete

    def _clear(self, complete: list[ShardRecord]) -> None:
        """Remove all that is not of these shards."""
        if not self.folder.exists():
            return
        keep = {self.folder / _RESUME_FILE} if complete else set()
        for number in range(len(complete)):
            keep |= ShardFiles(self.folder, number).paths()
        remove_build(self.folder, keep)


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Keep other builds out of the folder `out`, on file systems that can.

    Raises:
        DataError: another process builds there.
    """
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out}: another process is building there; wait until it ends, stop it, or choose "
                "another folder"
            ) from None
        except OSError:  # no such locks here
            pass
        yield
    finally:
        os.close(descriptor)


def sign(source: Path, out: Path, settings: Mapping[str, Any]) -> str:
    """Signature of a build: it differs where another build might write other bytes.

    Args:
        source: a file, a folder or a pattern.
        out: what the build writes, which is no part of its source.
        settings: of the build, plain values.

    Raises:
        OSError: the source cannot be read.
    """
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode() + b"\n")

    add({name: _version(name) for name in _DECIDING_PACKAGES})
    add(dict(settings))
    add(str(source.resolve()))
    for path in _files(source, out.resolve()):
        status = path.stat()
        add(os.fsencode(path).hex(), status.st_size, status.st_mtime_ns)
    return digest.hexdigest()


def _files(source: Path, out: Path) -> Iterable[Path]:
    """The files of a source, in a fixed order."""
    if source.is_dir():
        return _files_below(source, out)
    # Some forms are several files with one stem.
    stem = source.stem if source.is_file() else source.name
    beside = [path for path in source.parent.glob(f"{glob.escape(stem)}.*") if path.is_file()]
    # Else a pattern, which only tars may be given by.
    return sorted(beside) or find_tars(source)[0]


def _files_below(folder: Path, out: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if Path(place, name).resolve() != out)
        yield from (path for name in sorted(names) if (path := Path(place, name)).is_file())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
