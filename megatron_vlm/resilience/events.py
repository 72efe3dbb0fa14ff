"""What happened to a run, in the order in which it did: `events.jsonl` in its folder.

One object a line, only ever appended to: `time` (seconds since 1970), `event`, and what it is
about. A person reads it after the fact; `mvlm status` sums it up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


def tell(run_dir: Path, event: str, **about: Any) -> None:
    """Append one event. Never an error: a full disk must not end a run for want of its diary."""
    entry = {"time": round(time.time(), 3), "event": event, **about}
    try:
        file = os.open(run_dir / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # One write: lines of two processes do not mix.
            os.write(file, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(file)
    except OSError:
        pass


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """All events, oldest first; a line that a crash cut short is left out."""
    try:
        text = (run_dir / NAME).read_text(errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry and "time" in entry:
            yield entry
