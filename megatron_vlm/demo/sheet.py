"""The answer sheet: how the demo's answers are marked, and one page that shows them.

Digits are marked in place: the third digit read must be the third digit written. Everything
else is right or wrong as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from megatron_vlm.demo.sources import sheet_font
from megatron_vlm.errors import DataError

_CARD = (600, 216)
_PICTURE = (250, 172)
_GAP = 24
_HEADER = 148
_MAX_ENLARGEMENT = 4.0

_PAGE = "#f3f4f6"
_WHITE = "#ffffff"
_INK = "#111827"
_GREY = "#6b7280"
_FRAME = "#d1d5db"
_GREEN = "#15803d"
_RED = "#dc2626"


@dataclass(frozen=True)
class SheetRow:
    """One question put to the model, the right answer, and the answer it gave."""

    picture: Image.Image
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the whole answer is right."""
        return _same(self.expected, self.given)


def digit_accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    """Digits right in place over digits expected, for `(expected, given)` readings, in 0..1.

    Answers are split at white space and compared position by position. A missing digit is
    wrong and shifts what follows; surplus ones neither help nor harm here (`exact_match`
    counts them as wrong). Raises DataError if there is no digit to read.
    """
    marks = [_digits_in_place(expected, given) for expected, given in pairs]
    total = sum(of for _, of in marks)
    if total == 0:
        raise DataError(
            f"digit accuracy of {len(pairs)} answers: no digit is expected in any; "
            "expected at least one reading question, so raise heldout_samples"
        )
    return sum(right for right, _ in marks) / total


def exact_match(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of `(expected, given)` answers that are the same but for outer spaces, in 0..1.

    Raises DataError if there are none.
    """
    if not pairs:
        raise DataError("exact match of 0 answers: expected at least one, so raise heldout_samples")
    return sum(_same(expected, given) for expected, given in pairs) / len(pairs)


def write_sheet(
    path: Path, rows: Sequence[SheetRow], title: str, limit: int = 24, columns: int = 3
) -> None:
    """Write the first `limit` rows to `path` as one PNG of `columns` cards a line.

    Each card has the picture at its natural aspect, the question, what was expected and what
    was given; a green tick or a red cross says whether it is right, and every word that is
    wrong in its place is red. Raises DataError without rows or if `path` cannot be written.
    """
    shown = list(rows[:limit])
    if not shown:
        raise DataError(f"{path}: an answer sheet of 0 rows was asked for; expected at least one")
    lines = -(-len(shown) // columns)
    width = columns * _CARD[0] + (columns + 1) * _GAP
    height = _HEADER + lines * (_CARD[1] + _GAP)
    page = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP + 4, 30), title, fill=_INK, font=sheet_font(40, bold=True))
    right = sum(row.right for row in shown)
    draw.text(
        (_GAP + 4, 92),
        f"{right} of {len(shown)} answers entirely right",
        fill=_GREY,
        font=sheet_font(26),
    )
    for index, row in enumerate(shown):
        x = _GAP + index % columns * (_CARD[0] + _GAP)
        y = _HEADER + index // columns * (_CARD[1] + _GAP)
        _card(page, draw, x, y, row)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise DataError(
            f"{path}: the answer sheet cannot be written ({error.strerror or error}); "
            "expected a file in a folder you may write to"
        ) from error


def _same(expected: str, given: str) -> bool:
    return expected.strip() == given.strip()


def _digits_in_place(expected: str, given: str) -> tuple[int, int]:
    """Digits right in their place, and digits expected."""
    wanted = expected.split()
    return sum(a == b for a, b in zip(wanted, given.split(), strict=False)), len(wanted)


def _card(page: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, row: SheetRow) -> None:
    width, height = _CARD
    colour = _GREEN if row.right else _RED
    draw.rounded_rectangle((x, y, x + width, y + height), 14, fill=_WHITE, outline=_FRAME, width=2)
    draw.rounded_rectangle((x, y, x + 10, y + height), 5, fill=colour)

    box_width, box_height = _PICTURE
    left, top = x + 28, y + (height - box_height) // 2
    picture = row.picture.convert("RGB")
    factor = min(box_width / picture.width, box_height / picture.height, _MAX_ENLARGEMENT)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    corner = (left + (box_width - size[0]) // 2, top + (box_height - size[1]) // 2)
    page.paste(picture, corner)
    draw.rectangle(
        (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1]), outline=_FRAME
    )

    text_x = left + box_width + 24
    space = x + width - 18 - text_x
    _fit(draw, (text_x, y + 26), [(_printable(row.question), _GREY)], 18, space)
    draw.text((text_x, y + 66), "expected", fill=_GREY, font=sheet_font(16))
    _fit(draw, (text_x, y + 88), [(_printable(row.expected), _INK)], 26, space, bold=True)
    draw.text((text_x, y + 134), "given", fill=_GREY, font=sheet_font(16))
    _fit(draw, (text_x, y + 156), _given_words(row), 26, space - 44, bold=True)
    _badge(draw, x + width - 38, y + 172, row.right, colour)


def _given_words(row: SheetRow) -> list[tuple[str, str]]:
    """The given answer in coloured words: green what is right in its place, red what is not."""
    given = _printable(row.given).split()
    if not given:
        return [("(nothing)", _RED)]
    wanted = _printable(row.expected).split()
    padded = [*wanted, *[""] * len(given)]
    return [
        (word, _GREEN if word == right else _RED)
        for word, right in zip(given, padded, strict=False)
    ]


def _printable(text: str) -> str:
    """A model may answer with any bytes; what has no glyph is shown as a middle dot."""
    return "".join(letter if letter.isprintable() else "\u00b7" for letter in text)


def _fit(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    words: list[tuple[str, str]],
    size: int,
    space: int,
    bold: bool = False,
) -> None:
    """Draw coloured words on one line of at most `space` pixels: smaller if need be, then cut."""
    joined = " ".join(word for word, _ in words)
    while size > 14 and draw.textlength(joined, font=sheet_font(size, bold)) > space:
        size -= 1
    typeface = sheet_font(size, bold)
    x, y = float(corner[0]), corner[1]
    end = corner[0] + space
    blank = draw.textlength(" ", font=typeface)
    ellipsis = draw.textlength("...", font=typeface)
    for word, colour in words:
        if x + draw.textlength(word, font=typeface) > end:
            while word and x + draw.textlength(word, font=typeface) + ellipsis > end:
                word = word[:-1]
            draw.text((x, y), word + "...", fill=colour, font=typeface)
            return
        draw.text((x, y), word, fill=colour, font=typeface)
        x += draw.textlength(word, font=typeface) + blank


def _badge(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool, colour: str) -> None:
    """A tick or a cross, drawn as strokes because few fonts have them."""
    draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill=colour)
    if right:
        draw.line([(x - 9, y), (x - 2, y + 8), (x + 10, y - 8)], _WHITE, 5, joint="curve")
    else:
        draw.line([(x - 8, y - 8), (x + 8, y + 8)], _WHITE, 5)
        draw.line([(x - 8, y + 8), (x + 8, y - 8)], _WHITE, 5)
