"""Pictures on the page: pixels, the grid of their language tokens, boxes and points over them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlm.data.look.markup import counted, safe
from megatron_vlm.data.look.painting import data_uri
from megatron_vlm.data.look.row_view import ShownPicture

_TINY = 112
"""Pixels on the longer side below which a picture is enlarged. Our choice."""


def picture_figure(picture: ShownPicture, tokens: int, quality: int | None) -> str:
    """A picture among the tokens, with its language tokens' grid and the marks that texts name.

    Args:
        picture: as the model sees it.
        tokens: language tokens.
        quality: of a JPEG; null: PNG.
    """
    height, width = picture.pixels.shape[:2]
    classes = ["pic"]
    classes += ["frame"] if picture.pts is not None else []
    classes += ["tiny"] if max(height, width) < _TINY else []
    name = (
        f"frame {picture.ordinal + 1}"
        if picture.pts is not None
        else f"picture {picture.ordinal + 1}"
    )
    told = [name]
    if picture.pts is not None:
        told.append(f"{picture.seconds} s" if picture.seconds else f"pts {picture.pts}")
    told += [
        f"{width} x {height} pixels",
        f"{picture.grid_w} x {picture.grid_h} patches",
        counted(tokens, "token"),
        f"stored {picture.stored[1]} x {picture.stored[0]}",
    ]
    outside = sum(not _inside(mark.values, picture.extent) for mark in picture.marks)
    told += [f"{outside} of {counted(len(picture.marks), 'mark')} not inside"] if outside else []
    merge = round((picture.grid_h * picture.grid_w / tokens) ** 0.5)
    columns, rows = picture.grid_w // merge, picture.grid_h // merge
    grid = "".join(f"M{x} 0V{rows}" for x in range(1, columns))
    grid += "".join(f"M0 {y}H{columns}" for y in range(1, rows))
    facts = "".join(f"<span>{safe(fact)}</span>" for fact in told)
    return (
        f'<span class="{" ".join(classes)}" data-n="{tokens}" data-kind="{name}">'
        f'<button type="button" class="view" aria-pressed="false" aria-label="{name}, larger">'
        f'<img src="{data_uri(picture.pixels, quality)}" width="{width}" height="{height}" '
        f'alt="{name}"><svg class="patches" viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" aria-hidden="true"><path d="{grid}"/></svg>{_marks(picture)}'
        f'</button><span class="cap">{facts}</span></span>'
    )


def _marks(picture: ShownPicture) -> str:
    if not picture.marks:
        return ""
    width, height = picture.extent
    shapes = []
    for mark in picture.marks:
        kind = "learned" if mark.learned else "context"
        told = f"<title>{' '.join(map(str, mark.values))}, {kind}</title>"
        if len(mark.values) == 2:
            x, y = mark.values
            shapes.append(f'<path class="{kind}" d="M{x} {y}h0">{told}</path>')
        else:
            x1, y1, x2, y2 = mark.values
            shapes.append(
                f'<rect class="{kind}" x="{min(x1, x2)}" y="{min(y1, y2)}" '
                f'width="{abs(x2 - x1)}" height="{abs(y2 - y1)}">{told}</rect>'
            )
    return (
        f'<svg class="marks" viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        f"{''.join(shapes)}</svg>"
    )


def _inside(values: Sequence[int], extent: tuple[int, int]) -> bool:
    ordered = len(values) == 2 or (values[0] < values[2] and values[1] < values[3])
    return ordered and all(value <= extent[i % 2] for i, value in enumerate(values))
