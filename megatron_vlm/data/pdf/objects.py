"""The painted objects of a page: text, pictures and drawings, also those inside forms."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.data.pdf.frames import IDENTITY, Box, Frame, Matrix, apply, compose
from megatron_vlm.errors import DataError

MAX_OBJECTS = 200_000
"""Most objects of a page that are looked at, those inside forms counted each time."""
_MAX_FORM_DEPTH = 12


def page_objects(page: Any, kind: int) -> Iterator[tuple[Any, Matrix]]:
    """Objects of one kind, with the matrix of the forms around each.

    Args:
        page: a loaded page.
        kind: `FPDF_PAGEOBJ_TEXT` or another of them.

    Raises:
        DataError: the page has more than `MAX_OBJECTS`.
    """
    import pypdfium2.raw as pdfium

    seen = 0
    # What is still to be looked at: a container's objects, its matrix and its depth.
    pending: list[tuple[Callable[[Any, int], Any], Any, int, Matrix, int]] = [
        (pdfium.FPDFPage_GetObject, page, pdfium.FPDFPage_CountObjects(page), IDENTITY, 0)
    ]
    while pending:
        get, container, count, matrix, depth = pending.pop()
        for number in range(count):
            seen += 1
            if seen > MAX_OBJECTS:
                raise DataError(f"more than {MAX_OBJECTS} objects")
            item = get(container, number)
            if not item:
                continue
            found = pdfium.FPDFPageObj_GetType(item)
            if found == kind:
                yield item, matrix
            elif found == pdfium.FPDF_PAGEOBJ_FORM and depth < _MAX_FORM_DEPTH:
                inner = compose(object_matrix(item), matrix)
                size = pdfium.FPDFFormObj_CountObjects(item)
                pending.append((pdfium.FPDFFormObj_GetObject, item, size, inner, depth + 1))


def object_matrix(item: Any) -> Matrix:
    """The matrix that places an object."""
    import pypdfium2.raw as pdfium

    matrix = pdfium.FS_MATRIX()
    if not pdfium.FPDFPageObj_GetMatrix(item, matrix):
        return IDENTITY
    return (matrix.a, matrix.b, matrix.c, matrix.d, matrix.e, matrix.f)


def object_bounds(item: Any, outer: Matrix, frame: Frame) -> Box | None:
    """Where an object paints at most, in the frame; None where the library cannot say.

    Args:
        item: the object.
        outer: matrix of the forms around it.
        frame: the page as it is seen.
    """
    import pypdfium2.raw as pdfium

    edges = [ctypes.c_float() for _ in range(4)]
    if not pdfium.FPDFPageObj_GetBounds(item, *edges):
        return None
    left, bottom, right, top = (edge.value for edge in edges)
    corners = [
        apply(compose(outer, frame.matrix), x, y) for x in (left, right) for y in (bottom, top)
    ]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    if not all(map(math.isfinite, (*xs, *ys))):
        return None
    return Box(min(xs), min(ys), max(xs), max(ys))


def address(item: Any) -> int:
    """What tells one object from another while the page is loaded; 0 for none."""
    return ctypes.cast(item, ctypes.c_void_p).value or 0
