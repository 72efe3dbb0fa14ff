"""Marks are checked against answers marked by hand, the sheet by what can be seen on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.demo.sheet import SheetRow, digit_accuracy, exact_match, write_sheet
from megatron_vlm.errors import DataError

pytestmark = pytest.mark.unit

GREEN, RED, MAGENTA = (21, 128, 61), (220, 38, 38), (255, 0, 255)


@pytest.mark.parametrize(
    ("expected", "given", "in_place", "exact"),
    [
        ("4 2 7", "4 2 7", 1, 1),
        ("4 2 7", " 4 2 7\n", 1, 1),
        ("4 2 7", "4 7", 1 / 3, 0),
        ("4 2 7", "2 4 7", 1 / 3, 0),
        ("4 2 7", "427", 0, 0),
        ("4 2 7", "", 0, 0),
        ("4", "4 4", 1, 0),
    ],
)
def test_marks(expected: str, given: str, in_place: float, exact: float) -> None:
    assert digit_accuracy([(expected, given)]) == pytest.approx(in_place)
    assert exact_match([(expected, given)]) == exact


def test_accuracies_weigh_digits_and_answers() -> None:
    pairs = [("1 2 3 4", "1 2 3 4"), ("5", "6"), ("7 8", "7")]
    assert digit_accuracy(pairs) == pytest.approx(5 / 7)
    assert exact_match(pairs) == pytest.approx(1 / 3)


def test_nothing_to_mark_is_an_error() -> None:
    with pytest.raises(DataError, match="no digit is expected"):
        digit_accuracy([])
    with pytest.raises(DataError, match="0 answers"):
        exact_match([])


def near(page: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where the page `[height, width, 3]` has a colour, `[height, width]`."""
    return np.asarray((np.abs(page.astype(int) - colour) <= 2).all(axis=2))


def sheet(path: Path, rows: list[SheetRow], **options: int) -> np.ndarray:
    write_sheet(path, rows, "Answers", **options)
    with Image.open(path) as page:
        assert page.format == "PNG"
        return np.asarray(page.convert("RGB"))


def row(given: str, size: tuple[int, int] = (84, 28)) -> SheetRow:
    return SheetRow(Image.new("RGB", size, MAGENTA), "Which digits, left to right?", "4 2 7", given)


@pytest.mark.parametrize("size", [(84, 28), (40, 120), (1000, 400), (33, 31)])
def test_pictures_keep_their_aspect(size: tuple[int, int], tmp_path: Path) -> None:
    page = sheet(tmp_path / "sheet.png", [row("4 2 7", size)])
    ys, xs = np.nonzero(near(page, MAGENTA))
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)
    assert width >= 240 or height >= 120


def test_right_is_green_and_wrong_is_red(tmp_path: Path) -> None:
    right = sheet(tmp_path / "right.png", [row("4 2 7")])
    wrong = sheet(tmp_path / "wrong.png", [row("9 9 9")])
    partly = sheet(tmp_path / "partly.png", [row("4 2 9")])
    assert near(right, GREEN).sum() > 1000
    assert near(right, RED).sum() == 0
    assert near(wrong, RED).sum() > 1000
    assert near(wrong, GREEN).sum() == 0
    assert near(partly, RED).sum() > 1000
    assert 0 < near(partly, GREEN).sum() < near(partly, RED).sum()


def test_twenty_four_rows_in_three_columns_and_more_are_left_out(tmp_path: Path) -> None:
    page = sheet(tmp_path / "sheet.png", [row("4 2 7") for _ in range(30)])
    filled = near(page, MAGENTA)

    def runs(axis: int, marked: np.ndarray) -> int:
        lit = marked.any(axis=axis).astype(int)
        return int((np.diff(lit, prepend=0) == 1).sum())

    assert runs(0, filled) == 3
    assert runs(1, filled) == 8
    wide = sheet(tmp_path / "wide.png", [row("4 2 7") for _ in range(5)], limit=4, columns=2)
    assert runs(1, near(wide, MAGENTA)) == 2


def test_any_answer_can_be_shown(tmp_path: Path) -> None:
    answers = ["", "\x00\x07\n\r", "x" * 500, "w " * 300, "\ud800 \u4e2d", "<image>\n4 2 7"]
    page = sheet(tmp_path / "deep/sheet.png", [row(answer) for answer in answers])
    # Nothing runs over the right edge of the last column's card.
    assert not near(page[200:], RED)[:, -24:].any()


def test_a_sheet_needs_rows_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 rows"):
        write_sheet(tmp_path / "sheet.png", [], "Answers")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_sheet(tmp_path / "file/sheet.png", [row("4 2 7")], "Answers")
