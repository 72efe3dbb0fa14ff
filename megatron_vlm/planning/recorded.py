"""The timelines that a run has left in its folder.

`timelines/iter_0000100.safetensors` has one entry an event: its rank, kind (a number in `KINDS`),
micro-batch, chunk, window, start and end.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_vlm.errors import PlanError
from megatron_vlm.planning.timeline import KINDS, Event

FOLDER = "timelines"


def timeline_path(run_dir: Path, iteration: int) -> Path:
    """Where the timeline of a step is kept."""
    return run_dir / FOLDER / f"iter_{iteration:07d}.safetensors"


def recorded(run_dir: Path) -> dict[int, Path]:
    """The timelines of a run, by iteration, ascending."""
    files = (run_dir / FOLDER).glob("iter_*.safetensors")
    return {int(path.stem.removeprefix("iter_")): path for path in sorted(files)}


def read_timeline(path: Path) -> tuple[list[Event], str]:
    """The events that a file holds, and the run's layout in words.

    Raises:
        PlanError: the file is damaged.
    """
    try:
        with safe_open(path, "np") as stored:
            columns = {name: stored.get_tensor(name) for name in Event._fields}
            layout = (stored.metadata() or {}).get("layout", "")
        rows = zip(*(columns[name].tolist() for name in Event._fields), strict=True)
        events = [Event(row[0], KINDS[row[1]], *row[2:]) for row in rows]
    except (SafetensorError, OSError, ValueError, IndexError) as error:
        raise PlanError(f"{path}: not a timeline of a run ({error})") from error
    return events, layout
