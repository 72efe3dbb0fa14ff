"""The process that the PDF library runs in: `python -m megatron_vlm.data.pdf.child`.

It answers one job after another, each with several messages, and ends with its input. It may
crash, hang or run out of memory: the parent (`pool`) sees to that.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import BinaryIO

from megatron_vlm.data.pdf.messages import Message, pack, unpack
from megatron_vlm.data.pdf.pages import read_document
from megatron_vlm.data.pdf.settings import MAX_PDF_BYTES, PdfSettings
from megatron_vlm.errors import DataError


def main() -> None:
    """Answer the jobs on the standard input."""
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the library prints must not come between the answers.
    os.dup2(2, 1)
    _prepare()
    _send(target, Message({"ready": True}, []))
    while job := _receive(source):
        try:
            _answer(job, target)
        except MemoryError:
            limit = job.header["settings"]["memory_bytes"]
            reason = (
                f"PDF needs more than {limit} bytes of memory; raise the PDF setting memory_bytes "
                "if it is sound"
            )
            _send(target, Message({"error": reason}, []))
            # What the library could not finish is still in memory: the next job needs another.
            return


def _prepare() -> None:
    """Load what every job needs, and give up what none needs."""
    import pypdfium2  # noqa: F401

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # No file can be written, whatever a document makes of the library.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(job: Message, target: BinaryIO) -> None:
    header = job.header
    settings = PdfSettings(**header["settings"])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = settings.memory_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        _watch(settings)
        for answer in read_document(job.blobs[0], header["mode"], header["key"], settings):
            _send(target, answer)
            _watch(settings)
    except DataError as error:
        _send(target, Message({"error": str(error)}, []))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # What no one thought of; the parent must not take it for a crash of the library.
        reason = f"PDF cannot be handled ({type(error).__name__}: {error}); please report it"
        _send(target, Message({"error": reason.replace("\n", " ")}, []))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watch(settings: PdfSettings) -> None:
    # The parent's limit is shorter; this one ends a child whose parent is gone.
    signal.setitimer(signal.ITIMER_REAL, 2 * settings.seconds + 10)


def _receive(source: BinaryIO) -> Message | None:
    def read(size: int) -> bytes:
        data = source.read(size)
        if len(data) < size:
            raise EOFError
        return data

    try:
        return unpack(read, MAX_PDF_BYTES)
    except EOFError:
        return None


def _send(target: BinaryIO, message: Message) -> None:
    for piece in pack(*message):
        target.write(piece)
    target.flush()


if __name__ == "__main__":
    main()
