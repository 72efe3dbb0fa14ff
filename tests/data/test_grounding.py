"""Grounding marks: what is written for them, and that it can be read back."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data.draft import Mark, Part, Text
from megatron_vlm.data.geometry import target_size
from megatron_vlm.data.grounding import (
    FORMS,
    Convention,
    parse_boxes,
    parse_points,
    render_mark,
    resolve_marks,
    split_marks,
    to_pixels,
)
from megatron_vlm.errors import DataError
from tests.data.samples import VISION

pytestmark = pytest.mark.unit

OBJECTS: list[dict[str, Any]] = [
    {"label": "cat", "box": [0, 0, 50, 100]},
    {"label": "cat", "point": [100, 50.5], "box": [90, 40, 110, 61]},
    {"label": "door", "image": 1, "depth": 1.726, "point": [3, 4]},
    {"label": "car", "box3d": [1, -0.001, 12.345, 2, 1.5, 4, 0, 0.1, -3.14159]},
]
SIZES = [(100, 200), None, (10, 20)]
"""Media: a picture, a video, a picture."""


def written(text: str, convention: Convention = "relative", **options: Any) -> str:
    parts = split_marks(text, True, OBJECTS, [0, 2])
    seen = [(56, 112), None, (28, 56)]
    resolved = resolve_marks(parts, SIZES, seen, convention, **options)
    assert all(isinstance(part, Text) and part.learned for part in resolved)
    return "".join(part.text for part in resolved if isinstance(part, Text))


def test_text_is_split_at_its_marks() -> None:
    parts = split_marks("a <box:0><depth:2> b", False, OBJECTS, [5, 7])
    assert [type(part) for part in parts] == [Text, Mark, Mark, Text]
    box, depth = parts[1], parts[2]
    assert isinstance(box, Mark) and isinstance(depth, Mark)
    assert (box.form, box.medium, box.learned) == ("box", 5, False)
    assert (depth.form, depth.medium) == ("depth", 7)
    assert parts[0] == Text("a ", False)
    assert parts[3] == Text(" b", False)


def test_without_objects_marks_are_text() -> None:
    assert split_marks("<box:0>", True, None, []) == [Text("<box:0>", True)]
    assert split_marks("", True, None, []) == []
    assert split_marks("<box:x> <box:-1> <cube:0>", True, [], []) == [
        Text("<box:x> <box:-1> <cube:0>", True)
    ]


def test_every_form_by_hand() -> None:
    # The picture has 200 x 100 pixels (width x height) and is seen as 112 x 56.
    assert written("<box:0>") == "<bbox>0 0 250 999</bbox>"
    assert written("<box:0>", "absolute") == "<bbox>0 0 28 56</bbox>"
    assert written("at <point:1>.") == "at <point>500 504</point>."
    assert written("<point:1>", "absolute") == "<point>56 28</point>"
    assert written("<depth:2>") == "<depth>1.73</depth>"
    assert written("<box3d:3>") == (
        "<bbox3d>1.00 0.00 12.35 2.00 1.50 4.00 0.00 0.10 -3.14</bbox3d>"
    )
    assert written("<count:cat> cats") == "2 cats"
    # The first has only a box: its middle is (25, 50).
    assert written("<count:cat> cats", count_points=True) == (
        "<point>125 500</point> <point>500 504</point> 2 cats"
    )
    assert set(FORMS) == {"box", "point", "depth", "box3d", "count"}


def test_reading_passes_over_what_is_no_box() -> None:
    text = (
        "<bbox>1 2 3 4</bbox> <bbox>1 2 3</bbox><bbox> 5, 6,7 ,8 </bbox><bbox>1 2 3 4 5</bbox>"
        "<bbox>-1 2 3 4</bbox><bbox>1.5 2 3 4</bbox><bbox>9 9 9 99999999</bbox><point>1 2</point>"
    )
    assert parse_boxes(text) == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert parse_points(text + "<point>3</point><point>\n10 20</point>") == [(1, 2), (10, 20)]
    # A model may write anything: time has to grow with the length alone.
    assert parse_boxes("<bbox>" * 20_000 + " " * 100_000 + "1 " * 100_000) == []


@pytest.mark.parametrize("convention", ["relative", "absolute"])
def test_round_trip_within_one_unit(convention: Convention) -> None:
    rng = np.random.default_rng(5)
    for _ in range(1500):
        width, height = (int(v) for v in np.exp(rng.uniform(0, 9.2, 2)))
        if max(width, height) > 200 * min(width, height):
            continue
        stored, seen = (height, width), target_size(height, width, VISION)
        x1, x2 = sorted(rng.uniform(-0.5, width + 0.5, 2))
        y1, y2 = sorted(rng.uniform(-0.5, height + 0.5, 2))
        if rng.random() < 0.2:  # narrow, and often at the far edge
            x1 = max(0.0, x2 - 1e-9)
        if min(x2, width) <= max(x1, 0.0) or min(y2, height) <= max(y1, 0.0):
            continue
        (mark,) = split_marks("<box:0>", True, [{"box": [x1, y1, x2, y2]}], [0])
        assert isinstance(mark, Mark)
        text = render_mark(mark, stored, seen, convention)
        assert re.fullmatch(r"<bbox>(0|[1-9]\d*)( (0|[1-9]\d*)){3}</bbox>", text)
        ((a, b, c, d),) = parse_boxes(text)
        most_x, most_y = (999, 999) if convention == "relative" else (seen[1], seen[0])
        assert 0 <= a < c <= most_x
        assert 0 <= b < d <= most_y
        back = to_pixels((a, b, c, d), convention, stored, seen)
        units = (width / most_x, height / most_y) * 2
        clipped = [
            min(max(value, 0.0), side)
            for value, side in zip((x1, y1, x2, y2), (width, height) * 2, strict=True)
        ]
        for value, given, unit in zip(back, clipped, units, strict=True):
            assert abs(value - given) <= unit * (1 + 1e-9)

        (point,) = split_marks("<point:0>", True, [{"point": [x1, y1]}], [0])
        assert isinstance(point, Mark)
        ((px, py),) = parse_points(render_mark(point, stored, seen, convention))
        bx, by = to_pixels((px, py), convention, stored, seen)
        # Nothing keeps a point from being the nearest.
        assert abs(bx - clipped[0]) <= units[0] * 0.5 * (1 + 1e-9)
        assert abs(by - clipped[1]) <= units[1] * 0.5 * (1 + 1e-9)


def test_sliver_at_the_far_edge() -> None:
    for side in range(1, 300):
        box = [np.nextafter(side, 0).item(), 0, side, 1]
        (mark,) = split_marks("<box:0>", True, [{"box": box}], [0])
        assert isinstance(mark, Mark)
        ((x1, _, x2, _),) = parse_boxes(render_mark(mark, (1, side), None, "relative"))
        assert (x1, x2) == (998, 999)


def test_relative_needs_no_seen_size() -> None:
    parts = split_marks("<box:0>", False, OBJECTS, [0])
    assert resolve_marks(parts, [(100, 200)], None, "relative") == [
        Text("<bbox>0 0 250 999</bbox>", False)
    ]
    with pytest.raises(ValueError, match="absolute coordinates need"):
        resolve_marks(parts, [(100, 200)], None, "absolute")


BIG = 10**400


@pytest.mark.parametrize(
    ("text", "objects", "reason"),
    [
        ("<box:4>", OBJECTS, "<box:4>: the entry has 4 objects"),
        ("<box:999999999>", OBJECTS, "the entry has 4 objects"),
        ("<box:0>", ["cat"], r"objects\[0\]: is str"),
        ("<point:0>", OBJECTS, "has no 'point', which <point:0> asks for"),
        ("<box:0>", [{"box": [5, 0, 5, 9]}], "x1 < x2 and y1 < y2"),
        ("<box:0>", [{"box": [0, 9, 5, 1]}], "x1 < x2 and y1 < y2"),
        ("<box:0>", [{"box": [0, 0, 5]}], "expected 4 numbers"),
        ("<box:0>", [{"box": "0 0 5 5"}], "expected 4 numbers"),
        ("<box:0>", [{"box": [0, 0, math.nan, 5]}], "expected 4 numbers"),
        ("<box:0>", [{"box": [0, 0, math.inf, 5]}], "expected 4 numbers"),
        ("<box:0>", [{"box": [0, 0, BIG, 5]}], "expected 4 numbers"),
        ("<box:0>", [{"box": [0, 0, True, 5]}], "expected 4 numbers"),
        ("<box:0>", [{"box": [0, 0, 200.6, 5]}], "x = 200.6 lies outside its picture of 200"),
        ("<box:0>", [{"box": [0, -0.6, 20, 5]}], "y = -0.6 lies outside its picture of 100"),
        ("<box:0>", [{"box": [200, 0, 200.4, 5]}], "no extent along x"),
        ("<box:0>", [{"box": [0, 0, 5, 5], "image": 2}], "image 2; expected the place of one of"),
        ("<box:0>", [{"box": [0, 0, 5, 5], "image": -1}], "image -1"),
        ("<box:0>", [{"box": [0, 0, 5, 5], "image": True}], "image True"),
        ("<box:0>", [{"box": [0, 0, 5, 5], "image": [0]}], r"image \[0\]"),
        ("<point:0>", [{"point": [1, 101]}], "y = 101 lies outside"),
        ("<depth:0>", [{"depth": 0}], "metres above 0"),
        ("<depth:0>", [{"depth": [1.0]}], "expected a number"),
        ("<depth:0>", [{"depth": 1, "point": [300, 0]}], "x = 300 lies outside"),
        ("<box3d:0>", [{"box3d": [0, 0, 0, 1, 0, 1, 0, 0, 0]}], "metres above 0"),
        ("<box3d:0>", [{"box3d": [0, 0, 0, 1, 1, 1, 0, 0, 90]}], "expected radians"),
        ("<count:dog>", OBJECTS, "no object has this label"),
        ("<count:a>", [{"label": "a"}, {"label": "a", "image": 1}], "several pictures"),
        ("<count:a>", [{"label": "a", "image": [0]}], r"image \[0\]"),
        ("<count:a>", [{"label": "a"}], "neither 'point' nor 'box'"),
        ("<count:a>", [{"label": "a", "point": [500, 1]}], "x = 500 lies outside"),
    ],
)
def test_objects_that_cannot_be_written(text: str, objects: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        parts: list[Part] = split_marks(text, True, objects, [0, 2])
        resolve_marks(parts, SIZES, None, "relative", count_points=True)
    assert "\n" not in str(caught.value)
