"""Where a rank is in its step, told in a page of memory that its node's agent reads.

The rank writes a few bytes as it goes from one phase to the next: no thread and no system call, so
what is told is true even of a rank that is stuck or frozen. A thread adds once a second what the
rank's main thread waits for, as its Python frames tell it.
"""

from __future__ import annotations

import linecache
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

VARIABLE = "MVLM_HEARTBEAT"
"""Environment variable that names the page; without it nothing is told."""

_SIZE = 4096
# Steps begun, phases entered, when the last one was; and its name.
_STATE = struct.Struct("<qqd32s")
# When the main thread was last looked at, whether it waited for other ranks, and where it was.
_LOOK, _LOOK_AT = struct.Struct("<d?200s"), 256
_LOOK_SECONDS = 1.0
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


class Pulse(NamedTuple):
    """What a rank's page tells."""

    step: int
    """Steps begun; 0 before the first."""
    entered: int
    """Phases entered since the start."""
    since: float
    """When the last one was entered, on the machine's monotonic clock."""
    phase: str
    looked: float
    """When its main thread was last looked at, on that clock."""
    waits: bool
    """Whether it then waited for other ranks."""
    place: str
    """The collective it was in, if any, and the line of our code."""


class _Page:
    """A rank's page, open for writing."""

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), _SIZE)
        self._step = self._count = 0

    def enter(self, phase: str, step: int | None) -> None:
        self._count += 1
        if step is not None:
            self._step = step
        name = phase.encode()[:32]
        _STATE.pack_into(self._memory, 0, self._step, self._count, time.monotonic(), name)

    def look(self, waits: bool, place: str) -> None:
        _LOOK.pack_into(self._memory, _LOOK_AT, time.monotonic(), waits, place.encode()[:200])


_page: _Page | None = None


def begin() -> None:
    """Tell from now on, if a page was given; called once in a rank's main thread."""
    global _page
    path = os.environ.get(VARIABLE)
    if path is None or _page is not None:
        return
    _page = _Page(Path(path))
    enter("start")
    watched = threading.main_thread().ident
    assert watched is not None
    threading.Thread(target=_look_on, args=(_page, watched), daemon=True).start()


def enter(phase: str, step: int | None = None) -> None:
    """Say that a phase begins.

    Args:
        phase: its name, of at most 32 bytes.
        step: the step that begins with it.
    """
    if _page is not None:
        _page.enter(phase, step)


def make_page(path: Path) -> None:
    """A page for a rank that is about to start, as if it had told so."""
    page = bytearray(_SIZE)
    now = time.monotonic()
    _STATE.pack_into(page, 0, 0, 0, now, b"start")
    _LOOK.pack_into(page, _LOOK_AT, now, False, b"")
    path.write_bytes(page)


def read_page(path: Path) -> Pulse:
    """What a rank told last. A write that happens meanwhile may show in parts; never an error."""
    page = path.read_bytes()
    step, count, since, phase = _STATE.unpack_from(page)
    looked, waits, place = _LOOK.unpack_from(page, _LOOK_AT)
    return Pulse(step, count, since, _text(phase), looked, waits, _text(place))


def where(frame: FrameType | None) -> tuple[bool, str]:
    """Whether code waits for other ranks, and the place: collective, function, file and line."""
    collective, ours, innermost = "", None, frame
    waits = innermost is not None and ".wait(" in linecache.getline(
        innermost.f_code.co_filename, innermost.f_lineno
    )
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(_COLLECTIVES):
            collective = frame.f_code.co_name
        elif ours is None and f"{os.sep}megatron_vlm{os.sep}" in file:
            ours = frame
        frame = frame.f_back
    told = [collective] if collective else []
    shown = ours or innermost
    if shown is not None:
        name, line = os.path.basename(shown.f_code.co_filename), shown.f_lineno
        told.append(f"{shown.f_code.co_name} ({name}:{line})")
    return waits or bool(collective), " in ".join(told)


def _look_on(page: _Page, watched: int) -> None:
    while True:
        page.look(*where(sys._current_frames().get(watched)))
        time.sleep(_LOOK_SECONDS)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
