"""How the demo's pictures are drawn: digits on and off the 28-pixel grid, crops, lines of print.

One language token sees 28x28 pixels (14-pixel patches, merged 2x2). On the grid each digit
fills exactly one such cell, so reading is one token in, one digit out: what a decoder of a
million parameters can learn in minutes. Off the grid nothing lines up, as in real life.
Every function returns the picture, the answer and where each part of it came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from megatron_vlm.demo.sources import Digits, Material, font

CELL = 28
"""Pixels on a cell's side: patch_size 14 times spatial_merge_size 2 (dots.vlm1's)."""

MIN_CELLS = 4
"""Fewest cells of a picture. Below 4 * 28 * 28 = 3136 pixels (dots.ocr's min_pixels) a picture
would be enlarged before encoding, and a digit would cover more than one token."""

MAX_DIGITS = 5
"""Most digits in one picture. Our choice."""

LEFT_BLANKS = (0, 0, 0, 0, 0, 0, 0, 0, 1, 2)
"""Blank cells before the first digit, drawn evenly. Our choice: a small decoder learns where the
digits start more slowly than how they look, so most pictures begin with a digit."""

RIGHT_BLANKS = (0, 0, 0, 0, 0, 0, 1, 1, 1, 2)
"""Blank cells after the last digit, drawn evenly. Our choice."""

ROWS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)
"""Rows of cells, of which one holds the digits, drawn evenly. Our choice."""

_CROP_PIXELS = (3136, 12544)  # 4 to 16 language tokens, so that photographs stay cheap


@dataclass(frozen=True)
class Drawn:
    """A picture (RGB), the right answer, and JSON-ready facts on where its parts came from."""

    picture: Image.Image
    answer: str
    provenance: dict[str, Any]


def reading(values: list[int]) -> str:
    """Digits as the demo writes them: left to right, parted by single spaces ("4 2 7")."""
    return " ".join(str(value) for value in values)


def digits_on_grid(material: Material, rng: np.random.Generator) -> tuple[Drawn, list[int]]:
    """1 to MAX_DIGITS digits side by side, each in its own cell, with blank cells around.

    Height and width are multiples of CELL. Returns the picture, answered by its reading, and
    the digits from left to right. Provenance: `digits` (rows of `load_digits`) and `cells`
    (row and column of each, in cells).
    """
    count = int(rng.integers(1, MAX_DIGITS + 1))
    left, right, rows = (_pick(choices, rng) for choices in (LEFT_BLANKS, RIGHT_BLANKS, ROWS))
    used = left + count + right
    columns = max(used, math.ceil(MIN_CELLS / rows))
    first = left + int(rng.integers(0, columns - used + 1))
    row = int(rng.integers(0, rows))
    places = range(first, first + count)

    canvas, ink = _paper(rows * CELL, columns * CELL, rng)
    chosen = rng.integers(0, len(material.digits.values), size=count)
    for digit, column in zip(chosen, places, strict=True):
        box = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
        _write(canvas[box], _glyph(material.digits, int(digit), CELL, rng), ink)
    values, indices = _read_off(material.digits, chosen)
    provenance = {"digits": indices, "cells": [[row, column] for column in places]}
    return Drawn(_picture(canvas), reading(values), provenance), values


def digits_off_grid(material: Material, rng: np.random.Generator) -> Drawn:
    """1 to MAX_DIGITS digits of various sizes at arbitrary places, left to right, never touching.

    Neither height nor width is a multiple of CELL. Provenance: `digits` (rows of
    `load_digits`) and `boxes` (left, top, right, bottom of each, in pixels).
    """
    count = int(rng.integers(1, MAX_DIGITS + 1))
    scale = rng.uniform(20, 38)
    sizes = [round(scale * rng.uniform(0.85, 1.15)) for _ in range(count)]
    spaces = [int(rng.integers(1, 14)) for _ in range(count + 1)]
    width = sum(sizes) + sum(spaces)
    height = max(sizes) + int(rng.integers(4, 40))
    width = _off_multiple(max(width, math.ceil(MIN_CELLS * CELL * CELL / height)))
    height = _off_multiple(height)

    canvas, ink = _paper(height, width, rng)
    chosen = rng.integers(0, len(material.digits.values), size=count)
    boxes = []
    x = int(rng.integers(0, width - sum(sizes) - sum(spaces) + 1))
    for digit, size, space in zip(chosen, sizes, spaces, strict=False):
        x += space
        y = int(rng.integers(0, height - size + 1))
        glyph = _glyph(material.digits, int(digit), size, rng)
        _write(canvas[y : y + size, x : x + size], glyph, ink)
        boxes.append([x, y, x + size, y + size])
        x += size
    values, indices = _read_off(material.digits, chosen)
    return Drawn(_picture(canvas), reading(values), {"digits": indices, "boxes": boxes})


def photograph(material: Material, rng: np.random.Generator) -> Drawn:
    """A crop of any size and shape from a photograph; the answer is what the photograph shows.

    Provenance: `package`, `photograph`, and `crop` (left, top, right, bottom in pixels of the
    whole photograph).
    """
    source = material.photographs[int(rng.integers(0, len(material.photographs)))]
    whole_width, whole_height = source.picture.size
    # At least 60 % of the shorter side, else most crops would show no part of the subject.
    shortest = round(0.6 * min(whole_width, whole_height))
    height = int(rng.integers(shortest, whole_height + 1))
    width = int(rng.integers(shortest, min(whole_width, 3 * height) + 1))
    height = min(height, 3 * width)
    left = int(rng.integers(0, whole_width - width + 1))
    top = int(rng.integers(0, whole_height - height + 1))
    crop = source.picture.crop((left, top, left + width, top + height))
    factor = math.sqrt(rng.uniform(*_CROP_PIXELS) / (width * height))
    size = (max(CELL, round(width * factor)), max(CELL, round(height * factor)))
    picture = crop.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    box = [left, top + source.top, left + width, top + height + source.top]
    provenance = {"package": source.package, "photograph": source.file, "crop": box}
    return Drawn(picture, source.answer, provenance)


def text_line(material: Material, rng: np.random.Generator) -> Drawn:
    """One to three words in a real font on one row of cells; the answer is the words.

    CELL pixels high, a multiple of CELL wide. Provenance: `file`, `line_number` and `line` the
    words stand in, `words`, `font` and `font_size` in pixels per em.
    """
    piece = material.pieces[int(rng.integers(0, len(material.pieces)))]
    name = material.fonts[int(rng.integers(0, len(material.fonts)))]
    size = int(rng.integers(14, 19))
    typeface = font(name, size)
    left, top, right, bottom = typeface.getbbox(piece.words)
    indent = int(rng.integers(3, 9))
    columns = max(MIN_CELLS, math.ceil((right - left + indent + 3) / CELL))
    mask = Image.new("L", (columns * CELL, CELL), 0)
    slack = max(0, CELL - int(bottom - top))
    down = slack // 2 + int(rng.integers(-1, 2))
    ImageDraw.Draw(mask).text((indent - left, down - top), piece.words, fill=255, font=typeface)
    canvas, ink = _paper(CELL, columns * CELL, rng)
    _write(canvas, np.asarray(mask, dtype=np.float32) / 255, ink)
    provenance = {
        "file": piece.file,
        "line_number": piece.line_number,
        "line": piece.line,
        "words": piece.words,
        "font": Path(name).stem,
        "font_size": size,
    }
    return Drawn(_picture(canvas), piece.words, provenance)


def _pick(choices: tuple[int, ...], rng: np.random.Generator) -> int:
    return choices[int(rng.integers(0, len(choices)))]


def _paper(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lightly tinted paper `[height, width, 3]` and an ink `[3]` of random darkness, in 0..255."""
    paper = 255 - rng.uniform(0, 60, size=3)
    ink = rng.uniform(0, 90, size=3)
    contrast = rng.uniform(0.65, 1.0)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = paper
    return canvas, (paper + contrast * (ink - paper)).astype(np.float32)


def _glyph(digits: Digits, digit: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One digit's ink `[size, size]` in 0..1, enlarged smoothly, slightly turned and moved."""
    # A blank border keeps the bicubic filter from cutting strokes off at the edge.
    bordered = np.zeros((12, 12), dtype=np.uint8)
    bordered[2:10, 2:10] = digits.images[digit]
    padded = Image.fromarray(bordered)
    angle = rng.uniform(-0.14, 0.14)
    step = 8 / size * rng.uniform(0.98, 1.18)
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    middle = size / 2
    shift_x, shift_y = rng.uniform(-0.4, 0.4, size=2)
    matrix = (
        cos, sin, 6 + shift_x - (cos + sin) * middle,
        -sin, cos, 6 + shift_y - (cos - sin) * middle,
    )  # fmt: skip
    turned = padded.transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    return np.asarray(turned, dtype=np.float32) / 255


def _write(canvas: np.ndarray, mask: np.ndarray, ink: np.ndarray) -> None:
    """Blend `ink` into `canvas` in place, as much as `mask` `[height, width]` says."""
    canvas += mask[:, :, None] * (ink - canvas)


def _picture(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def _read_off(digits: Digits, chosen: np.ndarray) -> tuple[list[int], list[int]]:
    return digits.values[chosen].tolist(), digits.indices[chosen].tolist()


def _off_multiple(side: int) -> int:
    return side + 1 if side % CELL == 0 else side
