"""A timeline to look at: a picture of one row a rank, and a trace for Perfetto or chrome://tracing.

Both take events, whether replayed or measured.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.errors import PlanError
from megatron_vlm.planning.timeline import KINDS, Event, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

COLOURS = {
    "encode": "#d19a2a",
    "exchange": "#8d6a9f",
    "forward": "#2a6f97",
    "backward": "#588157",
    "exchange_back": "#b79ac5",
    "encode_backward": "#c8553d",
    "reduce": "#7f7f7f",
    "optimizer": "#333333",
}
"""Of each kind of work; waiting is left white."""

_INK = "#333333"
_MOST_NUMBERED_RANKS = 32
_NARROWEST_NUMBER = 0.012
"""Part of the step that an event must fill for its micro-batch to be written on it. Our choice."""


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """The events in the Trace Event Format, one row a rank, times in microseconds.

    Write it with `json.dump`. Events that take no time are left out.
    """
    origin = min((event.start for event in events), default=0.0)
    entries: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "one training step"}}
    ]
    for rank in sorted({event.rank for event in events}):
        row = {"ph": "M", "pid": 0, "tid": rank}
        entries.append(row | {"name": "thread_name", "args": {"name": f"rank {rank}"}})
        entries.append(row | {"name": "thread_sort_index", "args": {"sort_index": rank}})
    for event in events:
        if event.end > event.start:
            entries.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": event.rank,
                    "cat": event.kind,
                    "name": f"{event.kind}{_number(event, ' ')}",
                    "ts": (event.start - origin) * 1e6,
                    "dur": (event.end - event.start) * 1e6,
                    "args": {
                        name: getattr(event, name)
                        for name in ("micro_batch", "chunk", "window")
                        if getattr(event, name) >= 0
                    },
                }
            )
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def timeline_png(events: Sequence[Event], path: Path, title: str = "One step") -> None:
    """Draw the events, one row a rank, into a PNG.

    Args:
        events: of one step.
        path: the file; its folder is made where it is missing.
        title: stands above.

    Raises:
        PlanError: no events, no matplotlib, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise PlanError(f"{path}: a timeline is drawn as a .png; rename it")
    timeline = Timeline.from_events(events)
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(
            "drawings need matplotlib: pip install 'megatron-vlm[demo]', or take the trace"
        ) from error
    settings: Any = {
        "text.parse_math": False, "font.size": 9, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "text.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with rc_context(settings):
        height = min(14.0, 1.6 + 0.34 * timeline.ranks)
        # Not pyplot: it would change what the caller's own figures look like.
        figure = Figure(figsize=(13, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        handles = _rows(figure.add_subplot(), timeline, title)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS), frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be written ({error.strerror or error}); choose another file"
        ) from error


def _rows(axes: Axes, timeline: Timeline, title: str) -> list[Patch]:
    """Draws; returns what the legend shows."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    start, end = timeline.start - timeline.start.min(), timeline.end - timeline.start.min()
    numbered = timeline.ranks <= _MOST_NUMBERED_RANKS
    half = 0.42 if numbered else 0.5
    handles = []
    for number, kind in enumerate(KINDS):
        chosen = (timeline.kind == number) & (end > start)
        if not chosen.any():
            continue
        left, right, row = start[chosen], end[chosen], timeline.rank[chosen]
        low, high = row - half, row + half
        corners = np.stack(
            [np.stack(c, -1) for c in ((left, low), (right, low), (right, high), (left, high))], 1
        )
        # A line around each keeps passes apart, and would hide what is thin among many ranks.
        axes.add_collection(
            PolyCollection(
                list(corners), facecolors=COLOURS[kind], edgecolors="white",
                linewidths=0.4 if numbered else 0.0, antialiased=numbered,
            )
        )  # fmt: skip
        handles.append(Patch(color=COLOURS[kind], label=kind.replace("_", " ")))
    step = timeline.step_seconds
    if numbered:
        for event in timeline.events():
            wide = event.end - event.start >= _NARROWEST_NUMBER * step > 0
            if wide and (text := _number(event)):
                middle = (event.start + event.end) / 2 - timeline.start.min()
                axes.text(
                    middle, event.rank, text, ha="center", va="center", color="white", fontsize=7
                )
    axes.set(xlim=(0, step or 1.0), ylim=(timeline.ranks - 0.5, -0.5))
    axes.set(xlabel="seconds", ylabel="rank")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(timeline.ranks, 16)))
    bubble = timeline.bubble_seconds.mean() / (step or 1.0)
    wait = timeline.wait_seconds.mean() / (step or 1.0)
    axes.set_title(
        f"{title}: {step:.4g} s, of which ranks wait {wait:.1%} ({bubble:.1%} amid the pipeline)",
        loc="left",
        fontsize=11,
    )
    return handles


def _number(event: Event, before: str = "") -> str:
    """The micro-batch, the window where there is none, or nothing."""
    number = event.micro_batch if event.micro_batch >= 0 else event.window
    return f"{before}{number}" if number >= 0 else ""
