"""Child processes that read PDF files, so that no document can hurt this process.

The PDF library is written in C++, takes one thread at a time, and its input comes from anywhere.
Each thread that reads a document takes a child from here for as long as that lasts. A child that
crashes, runs beyond its time or breaks the protocol is killed, and another one is started when
one is wanted again.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from megatron_vlm.data.pdf.messages import Message, pack, unpack
from megatron_vlm.data.pdf.settings import MAX_PDF_BYTES, PdfMode, PdfSettings
from megatron_vlm.errors import DataError, TaskFailed

_MODULE = "megatron_vlm.data.pdf.child"
_START_SECONDS = 120.0
_CHUNK = 1 << 20
_DOCUMENTS_A_CHILD = 256
"""After so many documents a child is replaced, before what the library loses adds up."""


def require_library() -> None:
    """Say so if the PDF library is not installed.

    Raises:
        DataError: it is not.
    """
    if importlib.util.find_spec("pypdfium2") is None:
        raise DataError(
            "PDF files need pypdfium2, which is not installed: pip install 'megatron-vlm[pdf]'"
        )


def read_pages(
    encoded: bytes, name: str, mode: PdfMode, settings: PdfSettings
) -> tuple[int, list[Message]]:
    """All pages of a document, read in a child process.

    Args:
        encoded: the PDF file.
        name: what errors call it, and what draws are made from.
        mode: what is made of its pages.
        settings: how, and the limits.

    Returns:
        How many pages the document has, and one answer (`pages.read_document`) for each that
        was read.

    Raises:
        DataError: the document cannot be read, took too long or too much memory, or made the
            library crash twice.
        TaskFailed: no child process can be started.
    """
    require_library()
    if len(encoded) > MAX_PDF_BYTES:
        raise DataError(f"{name}: {len(encoded)} bytes; at most {MAX_PDF_BYTES} are read of a PDF")
    job = Message({"mode": mode, "key": name, "settings": asdict(settings)}, [encoded])
    try:
        try:
            return _POOL.run(job, settings)
        except _Crash:
            # A document before this one may have left the child's memory in disorder.
            return _POOL.run(job, settings, fresh=True)
    except _Crash as crash:
        raise DataError(
            f"{name}: PDF makes the PDF library crash ({crash}), or needs more than "
            f"{settings.memory_bytes} bytes of memory (PDF setting memory_bytes)"
        ) from crash
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


class _Crash(Exception):
    """A child ended or answered nonsense."""


class _Child:
    """One process, used by one thread at a time."""

    def __init__(self) -> None:
        self.documents = 0
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            # Ctrl-C is for the parent, whose end ends the child.
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        try:
            self.receive(_START_SECONDS, 0)
        except (_Crash, TimeoutError) as error:
            self._errors.seek(0)
            last = self._errors.read()[-2000:].decode(errors="replace").strip().split("\n")[-1]
            self.end()
            raise TaskFailed(f"process for PDF files does not start: {last or error}") from error

    def send(self, message: Message, seconds: float) -> None:
        """Write a message within a time limit."""
        deadline = time.monotonic() + seconds
        for piece in pack(*message):
            view = memoryview(piece)
            while view:
                self._wait(self._stdin, select.POLLOUT, deadline)
                try:
                    view = view[os.write(self._stdin, view[:_CHUNK]) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise self._crash() from error

    def receive(self, seconds: float, max_bytes: int) -> Message:
        """Read a message within a time limit."""
        deadline = time.monotonic() + seconds

        def read(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                self._wait(self._stdout, select.POLLIN, deadline)
                try:
                    chunk = os.read(self._stdout, min(size - len(data), _CHUNK))
                except BlockingIOError:
                    continue
                if not chunk:
                    raise self._crash()
                data += chunk
            return bytes(data)

        try:
            return unpack(read, max_bytes)
        except (ValueError, KeyError, TypeError) as error:
            raise _Crash(f"unreadable answer: {error}") from error

    def end(self) -> None:
        """Kill it: it holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Let go of its pipes."""
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe:
                pipe.close()
        # It may be another process's child, which this one cannot wait for.
        self._process.returncode = self._process.returncode or 0

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError

    def _crash(self) -> _Crash:
        self._process.kill()
        code = self._process.wait()
        return _Crash(signal.Signals(-code).name if code < 0 else f"exit code {code}")


class _Pool:
    """Idle children, for whichever thread comes next."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = Lock()

    def run(
        self, job: Message, settings: PdfSettings, fresh: bool = False
    ) -> tuple[int, list[Message]]:
        """One document's pages."""
        with self._child(fresh) as child:
            try:
                child.send(job, settings.seconds)
                answers = list(_answers(child, settings))
            except TimeoutError as error:
                raise DataError(
                    f"PDF took longer than {settings.seconds:g} s to open or for one page; raise "
                    "the PDF setting seconds if it is sound"
                ) from error
        if "error" in answers[-1].header:
            raise DataError(str(answers[-1].header["error"]))
        return int(answers[0].header["pages"]), answers[1:-1]

    @contextmanager
    def _child(self, fresh: bool) -> Iterator[_Child]:
        with self._lock:
            child = self._idle.pop() if self._idle and not fresh else None
        child = child or _Child()
        try:
            yield child
        except BaseException:
            child.end()
            raise
        child.documents += 1
        if child.documents >= _DOCUMENTS_A_CHILD:
            child.end()
            return
        with self._lock:
            self._idle.append(child)

    def close(self) -> None:
        """End all idle children."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def after_fork(self) -> None:
        """Leave the children to the process that this one is a copy of."""
        self._lock = Lock()
        for child in self._idle:
            child.forget()
        self._idle = []


def _answers(child: _Child, settings: PdfSettings) -> Iterator[Message]:
    """Everything up to the last message of a job."""
    while True:
        answer = child.receive(settings.seconds, settings.max_bytes)
        yield answer
        if "end" in answer.header or "error" in answer.header:
            return


_POOL = _Pool()
atexit.register(_POOL.close)
os.register_at_fork(after_in_child=_POOL.after_fork)
