"""Between the page's own coordinates and those of the page as it is seen."""

from __future__ import annotations

from dataclasses import dataclass

Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): x' = a x + c y + e, y' = b x + d y + f, as PDF writes them."""

IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with x to the right and y down; in points unless said otherwise."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Its extent along x."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Its extent along y."""
        return self.y1 - self.y0

    def meets(self, other: Box) -> bool:
        """Whether they share more than an edge."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )

    def holds_middle_of(self, other: Box) -> bool:
        """Whether the other's middle lies inside."""
        x, y = (other.x0 + other.x1) / 2, (other.y0 + other.y1) / 2
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1

    def joined(self, other: Box) -> Box:
        """The smallest rectangle that holds both."""
        return Box(
            min(self.x0, other.x0),
            min(self.y0, other.y0),
            max(self.x1, other.x1),
            max(self.y1, other.y1),
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """The page as it is seen: turned upright, origin at its upper left corner, in points."""

    matrix: Matrix
    """From the page's own coordinates, in which y grows upwards."""
    width: float
    height: float
    turns: int
    """Quarter turns clockwise from the page's own coordinates."""

    def box(self, left: float, bottom: float, right: float, top: float) -> Box:
        """A rectangle of the page's own coordinates in this frame."""
        (x0, y0), (x1, y1) = apply(self.matrix, left, bottom), apply(self.matrix, right, top)
        return Box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


def make_frame(left: float, bottom: float, right: float, top: float, turns: int) -> Frame:
    """The frame of a page.

    Args:
        left: edges of the page's visible part in its own coordinates.
        bottom: likewise.
        right: likewise.
        top: likewise.
        turns: quarter turns clockwise.
    """
    width, height = right - left, top - bottom
    turns %= 4
    matrices: list[Matrix] = [
        (1, 0, 0, -1, -left, top),
        (0, 1, 1, 0, -bottom, -left),
        (-1, 0, 0, 1, right, -bottom),
        (0, -1, -1, 0, top, right),
    ]
    if turns % 2:
        width, height = height, width
    return Frame(matrices[turns], width, height, turns)


def apply(matrix: Matrix, x: float, y: float) -> tuple[float, float]:
    """Where a point goes."""
    a, b, c, d, e, f = matrix
    return a * x + c * y + e, b * x + d * y + f


def compose(first: Matrix, then: Matrix) -> Matrix:
    """One matrix that does both."""
    a, b, c, d, e, f = first
    origin = apply(then, e, f)
    ta, tb, tc, td = then[:4]
    return (
        ta * a + tc * b,
        tb * a + td * b,
        ta * c + tc * d,
        tb * c + td * d,
        *origin,
    )
