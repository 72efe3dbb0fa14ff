"""What a rank's page tells of it, from the moment it is made."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.resilience import heartbeat

pytestmark = pytest.mark.unit


def test_a_new_page_is_no_old_news(tmp_path: Path) -> None:
    """A rank that has not told anything yet must not look as if it had been still for ever."""
    before = time.monotonic()
    heartbeat.make_page(tmp_path / "page")
    pulse = heartbeat.read_page(tmp_path / "page")
    assert (pulse.step, pulse.entered, pulse.phase, pulse.waits) == (0, 0, "start", False)
    assert before <= pulse.since <= time.monotonic() and before <= pulse.looked


def test_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat.enter("forward", 3)  # nobody listens
    path = tmp_path / "page"
    heartbeat.make_page(path)
    page = heartbeat._Page(path)
    monkeypatch.setattr(heartbeat, "_page", page)
    heartbeat.enter("data", 7)
    heartbeat.enter("a phase with a name that is far too long")
    page.look(True, "all_reduce in é" + "x" * 300)
    pulse = heartbeat.read_page(path)
    assert (pulse.step, pulse.entered) == (7, 2)
    assert pulse.phase == "a phase with a name that is far "
    assert pulse.waits and pulse.place.startswith("all_reduce in éxxx")


class _Work:
    def wait(self) -> tuple[bool, str]:
        return heartbeat.where(sys._getframe(1))


def test_where() -> None:
    waits, place = _Work().wait()
    assert waits and place.startswith("test_where (test_heartbeat.py:")
    waits, _ = heartbeat.where(sys._getframe())
    assert not waits
    assert heartbeat.where(None) == (False, "")
