"""What a process has freed goes back to the system."""

from __future__ import annotations

import platform

import psutil
import pytest

from megatron_vlm.platform.memory import release_unused


@pytest.mark.unit
def test_freed_memory_is_given_back() -> None:
    if platform.libc_ver()[0] != "glibc":
        release_unused()  # does nothing, and does not fail
        return
    process = psutil.Process()
    # Small enough to come from the heap, and each second one stays: holes that are never trimmed
    # from the end.
    blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
    del blocks[::2]
    before = process.memory_info().rss
    release_unused()
    assert before - process.memory_info().rss > 80_000_000
    assert len(blocks) == 1000
