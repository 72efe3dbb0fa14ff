"""Who may write a run's folder: the newest attempt, and no one who was given up for lost.

Every start of the ranks takes the next number by creating a file that must not exist yet, which
one process alone can do. A rank that finds a higher number than its own has been replaced, say
while its node was cut off from the others, and leaves before it writes anything more.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from megatron_vlm.errors import TaskFailed

VARIABLE = "MVLM_ATTEMPT"
"""Environment variable of a rank: the number of its attempt."""
FOLDER = "attempts"
FINISHED = "finished.json"
"""File in a run folder that says that the run has reached its end."""


class Superseded(TaskFailed):
    """Another attempt has taken this one's place."""


def take_next(run_dir: Path, **about: Any) -> int:
    """Become the run's newest attempt.

    Args:
        run_dir: the run's folder.
        about: kept in the attempt's file.

    Returns:
        Its number, from 1.
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    number = newest(run_dir) + 1
    while True:
        try:
            file = os.open(_path(run_dir, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            number += 1
    with open(file, "w") as stream:
        facts = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **about}
        json.dump(facts, stream)
    return number


def newest(run_dir: Path) -> int:
    """The number of the newest attempt; 0 before the first."""
    try:
        names = os.listdir(run_dir / FOLDER)
    except FileNotFoundError:
        return 0
    return max((int(name[:6]) for name in names if re.fullmatch(r"\d{6}\.json", name)), default=0)


def about(run_dir: Path, number: int) -> dict[str, Any]:
    """What an attempt's file tells; nothing where it was not written to the end."""
    try:
        found = json.loads(_path(run_dir, number).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_ours(run_dir: Path) -> None:
    """Leave if another attempt has taken this process's place.

    Raises:
        Superseded: it has.
    """
    mine = os.environ.get(VARIABLE)
    # The next number is always taken before any higher one.
    if mine is not None and _path(run_dir, int(mine) + 1).exists():
        raise Superseded(
            f"attempt {mine} of {run_dir} was given up and another has begun; nothing more is "
            "written by this one"
        )


def mark_finished(run_dir: Path, iteration: int) -> None:
    """Say that a run has reached its end, at this iteration; once all that it leaves is written."""
    part = run_dir / f"{FINISHED}.part"
    part.write_text(json.dumps({"iteration": iteration, "time": time.time()}))
    os.replace(part, run_dir / FINISHED)


def forget_finished(run_dir: Path) -> None:
    """Take that back: the run goes on."""
    (run_dir / FINISHED).unlink(missing_ok=True)


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / FOLDER / f"{number:06d}.json"
