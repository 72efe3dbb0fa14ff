"""Timelines to look at: every event on its rank's row, at its time, in its colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.errors import PlanError
from megatron_vlm.planning.drawing import COLOURS, chrome_trace, timeline_png
from megatron_vlm.planning.timeline import KINDS, Event

EVENTS = [
    Event(0, "encode", -1, -1, 0, 100.0, 102.0),
    Event(0, "exchange", -1, -1, 0, 102.0, 102.0),
    Event(0, "forward", 0, 0, -1, 102.0, 106.0),
    Event(2, "backward", 3, 1, -1, 104.0, 109.0),
    Event(2, "optimizer", -1, -1, -1, 109.0, 110.0),
]
"""Rank 1 does nothing; the clock does not begin at 0."""


@pytest.mark.unit
def test_trace_events() -> None:
    trace = json.loads(json.dumps(chrome_trace(EVENTS)))
    shown = [entry for entry in trace["traceEvents"] if entry["ph"] == "X"]
    found = [(e["tid"], e["name"], e["cat"], e["ts"], e["dur"], e["args"]) for e in shown]
    assert found == [
        (0, "encode 0", "encode", 0.0, 2e6, {"window": 0}),
        (0, "forward 0", "forward", 2e6, 4e6, {"micro_batch": 0, "chunk": 0}),
        (2, "backward 3", "backward", 4e6, 5e6, {"micro_batch": 3, "chunk": 1}),
        (2, "optimizer", "optimizer", 9e6, 1e6, {}),
    ]
    names = {
        entry["tid"]: entry["args"]["name"]
        for entry in trace["traceEvents"]
        if entry["name"] == "thread_name"
    }
    assert names == {0: "rank 0", 2: "rank 2"}
    assert {entry["pid"] for entry in trace["traceEvents"]} == {0}
    assert [e for e in chrome_trace([])["traceEvents"] if e["ph"] == "X"] == []


@pytest.mark.unit
def test_picture(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "deep" / "step.png"
    timeline_png(EVENTS, path, "A $step$")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)

    def rows(kind: str) -> tuple[float, float, float]:
        """(height, left and right end) of a colour's area, as parts of the picture."""
        colour = [int(COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5)]
        y, x = np.nonzero((np.abs(pixels - colour) <= 2).all(axis=2))
        # The legend shows it again, below.
        inside = y < 0.7 * len(pixels)
        return y[inside].mean(), x[inside].min(), x[inside].max()

    encode, forward, backward = rows("encode"), rows("forward"), rows("backward")
    assert encode[0] == pytest.approx(forward[0], abs=2) and forward[0] < backward[0]
    second = (forward[2] - forward[1]) / 4
    assert encode[2] - encode[1] == pytest.approx(2 * second, rel=0.02)
    assert backward[2] - backward[1] == pytest.approx(5 * second, rel=0.02)
    assert backward[1] - encode[1] == pytest.approx(4 * second, rel=0.02)
    # The same events are the same file, whatever their order.
    again = tmp_path / "again.png"
    timeline_png(EVENTS[::-1], again, "A $step$")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.unit
def test_picture_of_many_ranks(tmp_path: Path) -> None:
    """Rows as thin as a pixel still show, unhidden by lines around them."""
    from PIL import Image

    events = [Event(rank, "forward", 0, 0, -1, 0.0, 1.0) for rank in range(1024)]
    timeline_png(events, tmp_path / "step.png")
    pixels = np.asarray(Image.open(tmp_path / "step.png").convert("RGB"))
    colour = [int(COLOURS["forward"][i : i + 2], 16) for i in (1, 3, 5)]
    assert (pixels == colour).all(axis=2).mean() > 0.7


@pytest.mark.unit
def test_pictures_that_cannot_be(tmp_path: Path) -> None:
    assert set(COLOURS) == set(KINDS)
    with pytest.raises(PlanError, match=r"step.jpg: a timeline is drawn as a .png"):
        timeline_png(EVENTS, tmp_path / "step.jpg")
    with pytest.raises(PlanError, match="no events"):
        timeline_png([], tmp_path / "step.png")
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written"):
        timeline_png(EVENTS, tmp_path / "file" / "step.png")
