"""Grounding as text: boxes, points, depths and counts, written out, read back, and measured.

A text refers to its entry's `objects` by marks: `<box:0>`, `<point:0>`, `<depth:0>`, `<box3d:0>`,
`<count:cat>`. Objects are in pixels of the picture as it is stored, upright. What the model reads
and writes is integers of one of two conventions:

- `relative`: 0 to 999 along each side of the picture (Seed1.5-VL);
- `absolute`: pixels of the picture as the model sees it, after resizing (Qwen2.5-VL).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from megatron_vlm.data.draft import Mark, Part, Text
from megatron_vlm.errors import DataError

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

Convention: TypeAlias = Literal["relative", "absolute"]

RELATIVE_MAX = 999
"""A picture's far edge in relative coordinates. Seed1.5-VL: integers in [0, 999]."""

FORMS: dict[str, str] = {
    "box": "<bbox>x1 y1 x2 y2</bbox>",
    "point": "<point>x y</point>",
    "depth": "<depth>metres</depth>",
    "box3d": "<bbox3d>x y z w h l roll pitch yaw</bbox3d>",
    "count": "number, after the objects' points where these are wanted",
}
"""Forms of marks and what is written for each. Coordinates are integers, without leading zeros;
metres and radians have two decimals (a centimetre, about half a degree). Our choice, after the tags
of Seed1.5-VL."""

_NUMBERS = {"box": 4, "point": 2, "depth": 1, "box3d": 9}
_SLACK = 0.5
_MARK = re.compile(r"<(?:(box|point|depth|box3d):([0-9]{1,9})|count:([^<>\n]{1,200}))>")
_BOX = re.compile(r"<bbox>\s*([0-9]{1,6})" + r"[\s,]+([0-9]{1,6})" * 3 + r"\s*</bbox>", re.ASCII)
_POINT = re.compile(r"<point>\s*([0-9]{1,6})[\s,]+([0-9]{1,6})\s*</point>", re.ASCII)


def split_marks(
    text: str, learned: bool, objects: Sequence[Any] | None, pictures: Sequence[int]
) -> list[Part]:
    """A text as runs of text and the marks between them.

    Args:
        text: holds marks, if the entry has objects; without objects all of it is text.
        learned: what all parts are.
        objects: the entry's `objects`.
        pictures: place in `Draft.media` of each of the entry's pictures, which `image` of an
            object counts.

    Raises:
        DataError: a mark refers to what is not there, or to an object that lacks what it needs.
    """
    if objects is None:
        return [Text(text, learned)] if text else []
    parts: list[Part] = []
    end = 0
    for match in _MARK.finditer(text):
        if match.start() > end:
            parts.append(Text(text[end : match.start()], learned))
        end = match.end()
        if match[3]:
            target = _counted(match[3], objects)
        else:
            target = _object(match[1], int(match[2]), objects)
        parts.append(Mark(match[1] or "count", target, _medium(target, pictures), learned))
    if end < len(text):
        parts.append(Text(text[end:], learned))
    return parts


def resolve_marks(
    parts: Sequence[Part],
    sizes_stored: Sequence[Size | None],
    sizes_seen: Sequence[Size | None] | None,
    convention: Convention,
    count_points: bool = False,
) -> list[Part]:
    """Parts with each mark written out as text.

    Args:
        parts: of one draft.
        sizes_stored: of each of the draft's media as it is stored; null for a video.
        sizes_seen: what each is resized to (`geometry.target_size`); only `absolute` needs it.
        convention: of the coordinates.
        count_points: list the objects' points before their number.

    Raises:
        DataError: an object that does not lie in its picture; names it and the reason.
    """
    resolved: list[Part] = []
    for part in parts:
        if isinstance(part, Mark):
            stored = sizes_stored[part.medium]
            seen = sizes_seen[part.medium] if sizes_seen is not None else None
            if stored is None:
                raise ValueError(f"medium {part.medium} of a mark is no picture")
            written = render_mark(part, stored, seen, convention, count_points)
            part = Text(written, part.learned)
        resolved.append(part)
    return resolved


def render_mark(
    mark: Mark,
    stored_size: Size,
    seen_size: Size | None,
    convention: Convention,
    count_points: bool = False,
) -> str:
    """The text of one mark, as `FORMS` says.

    A side that rounding would leave empty is one unit long.

    Args:
        mark: from `split_marks`.
        stored_size: of its picture as it is stored.
        seen_size: what that is resized to; may be null where the convention is `relative`.
        convention: of the coordinates.
        count_points: list the objects' points before their number.

    Raises:
        DataError: the object does not lie in the picture, or has no point that could be listed.
    """
    target, name = mark.target, mark.target["name"]
    limits = _limits(convention, stored_size, seen_size)
    if mark.form == "box":
        return _box(target["box"], stored_size, limits, name)
    if mark.form == "point":
        return _point(target["point"], stored_size, limits, name)
    if mark.form == "depth":
        if "point" in target:
            # Not written, but a point outside is a sign of a depth of something else.
            _point(target["point"], stored_size, limits, name)
        return f"<depth>{_decimals(target['depth'])}</depth>"
    if mark.form == "box3d":
        return f"<bbox3d>{_decimals(target['box3d'])}</bbox3d>"
    if mark.form != "count":
        raise ValueError(f"form {mark.form!r}: expected one of {', '.join(FORMS)}")
    written = []
    for counted in target["objects"] if count_points else ():
        if counted["point"] is None:
            raise DataError(
                f"{counted['name']}: has neither 'point' nor 'box'; {name} is to list its point"
            )
        written.append(_point(counted["point"], stored_size, limits, counted["name"]))
    return " ".join([*written, str(len(target["objects"]))])


def parse_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """(x1, y1, x2, y2) of every well-formed box in a text, in order, in the text's convention.

    What lies between is passed over; the numbers are as they are written, in range or not.
    """
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in _BOX.findall(text)]


def parse_points(text: str) -> list[tuple[int, int]]:
    """(x, y) of every well-formed point in a text; as `parse_boxes`."""
    return [(int(x), int(y)) for x, y in _POINT.findall(text)]


def to_pixels(
    values: Sequence[float],
    convention: Convention,
    stored_size: Size,
    seen_size: Size | None = None,
) -> list[float]:
    """Written coordinates in pixels of the picture as it is stored.

    Within one unit of the convention of what `render_mark` was given.

    Args:
        values: x and y in turn: a point's two, a box's four.
        convention: theirs.
        stored_size: of the picture as it is stored.
        seen_size: what that is resized to; may be null where the convention is `relative`.
    """
    limits = _limits(convention, stored_size, seen_size)
    sides = (stored_size[1], stored_size[0])
    return [value * sides[i % 2] / limits[i % 2] for i, value in enumerate(values)]


def _object(form: str, index: int, objects: Sequence[Any]) -> dict[str, Any]:
    """What is used of the object that a mark refers to, checked as far as no picture is needed."""
    if index >= len(objects):
        raise DataError(f"<{form}:{index}>: the entry has {len(objects)} objects; mend the mark")
    name = f"objects[{index}]"
    given = _dict(objects[index], name)
    if form not in given:
        raise DataError(f"{name}: has no {form!r}, which <{form}:{index}> asks for")
    values = _numbers(given, form, name)
    target: dict[str, Any] = {"name": name, "image": given.get("image", 0), form: values}
    if form == "depth":
        if not values[0] > 0:
            raise DataError(f"{name}.depth: {given['depth']}; expected metres above 0")
        if "point" in given:
            target["point"] = _numbers(given, "point", name)
    elif form == "box" and not (values[0] < values[2] and values[1] < values[3]):
        raise DataError(f"{name}.box: {values}; expected x1 < x2 and y1 < y2")
    elif form == "box3d":
        if not min(values[3:6]) > 0:
            raise DataError(f"{name}.box3d: sides {values[3:6]}; expected metres above 0")
        if not max(map(abs, values[6:])) <= 2 * math.pi:
            raise DataError(
                f"{name}.box3d: angles {values[6:]}; expected radians, from -2 pi to 2 pi"
            )
    return target


def _counted(label: str, objects: Sequence[Any]) -> dict[str, Any]:
    """The objects of a label, and their one picture."""
    name = f"<count:{label}>"
    named = [(f"objects[{i}]", value) for i, value in enumerate(objects)]
    found = [(n, given) for n, value in named if (given := _dict(value, n)).get("label") == label]
    if not found:
        raise DataError(f"{name}: no object has this label; mend it, or write 0 if there is none")
    image = found[0][1].get("image", 0)
    if any(given.get("image", 0) != image for _, given in found):
        raise DataError(f"{name}: these objects lie in several pictures; expected one")
    counted = []
    for object_name, given in found:
        point = None
        if "point" in given:
            point = _numbers(given, "point", object_name)
        elif "box" in given:
            x1, y1, x2, y2 = _numbers(given, "box", object_name)
            point = [(x1 + x2) / 2, (y1 + y2) / 2]
        counted.append({"name": object_name, "point": point})
    return {"name": name, "image": image, "objects": counted}


def _medium(target: dict[str, Any], pictures: Sequence[int]) -> int:
    image = target["image"]
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < len(pictures):
        raise DataError(
            f"{target['name']}: image {str(image)[:40]}; expected the place of one of the entry's "
            f"{len(pictures)} pictures, from 0"
        )
    return pictures[image]


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name}: is {type(value).__name__}; expected an object")
    return value


def _numbers(given: dict[str, Any], field: str, name: str) -> list[float]:
    wanted = _NUMBERS[field]
    values = [given[field]] if field == "depth" else given[field]
    if not isinstance(values, list) or len(values) != wanted or not all(map(_usable, values)):
        plural = "a number" if wanted == 1 else f"{wanted} numbers"
        raise DataError(
            f"{name}.{field}: {str(given[field])[:80]}; expected {plural} between -1e9 and 1e9"
        )
    return [float(number) for number in values]


def _usable(value: Any) -> bool:
    # The comparison is false for NaN, and exact for integers too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _limits(convention: Convention, stored_size: Size, seen_size: Size | None) -> tuple[int, int]:
    """What the far edge's (x, y) are written as."""
    if min(stored_size) < 1 or (seen_size is not None and min(seen_size) < 1):
        raise ValueError(f"sizes {stored_size}, {seen_size}: expected sides of at least 1")
    if convention == "relative":
        return RELATIVE_MAX, RELATIVE_MAX
    if convention != "absolute":
        raise ValueError(f"convention {convention!r}: expected relative or absolute")
    if seen_size is None:
        raise ValueError("absolute coordinates need the size that the model sees")
    return seen_size[1], seen_size[0]


def _point(values: list[float], size: Size, limits: tuple[int, int], name: str) -> str:
    x, y = (
        _inside(value, side, axis, name) * limit / side
        for value, side, axis, limit in zip(values, (size[1], size[0]), "xy", limits, strict=True)
    )
    return f"<point>{round(x)} {round(y)}</point>"


def _box(values: list[float], size: Size, limits: tuple[int, int], name: str) -> str:
    x1, x2 = _span(values[0::2], size[1], limits[0], "x", name)
    y1, y2 = _span(values[1::2], size[0], limits[1], "y", name)
    return f"<bbox>{x1} {y1} {x2} {y2}</bbox>"


def _span(values: list[float], side: int, limit: int, axis: str, name: str) -> tuple[int, int]:
    low, high = (_inside(value, side, axis, name) for value in values)
    if not low < high:
        raise DataError(f"{name}.box: has no extent along {axis} inside its picture; mend it")
    low, high = low * limit / side, high * limit / side
    if round(low) < round(high):
        return round(low), round(high)
    return math.floor(low), math.floor(low) + 1


def _inside(value: float, side: int, axis: str, name: str) -> float:
    if not -_SLACK <= value <= side + _SLACK:
        raise DataError(
            f"{name}: {axis} = {value:g} lies outside its picture of {side} pixels; expected "
            "pixels of the stored picture, upright"
        )
    return min(max(value, 0.0), float(side))


def _decimals(values: Sequence[float]) -> str:
    # Adding 0 after rounding takes the sign off a zero.
    return " ".join(f"{round(value, 2) + 0.0:.2f}" for value in values)
