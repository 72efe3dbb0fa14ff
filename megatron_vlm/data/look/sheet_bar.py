"""A row at a glance: a bar that tells where its samples are, and what they consist of."""

from __future__ import annotations

import numpy as np

from megatron_vlm.data.look.markup import safe
from megatron_vlm.data.look.row_view import RowView

_BINS = 800
"""Stretches of a row's bar. Our choice."""


def row_bar(row: RowView, seq_length: int) -> str:
    """The row at a glance: what most of each stretch is, and where its segments are."""
    kinds = ("filler", "padding", "context", "learned", "picture")
    state = np.zeros(seq_length, np.int64)
    for segment in row.segments:
        for span in segment.spans:
            kind = span.kind if span.kind in kinds else ("learned" if span.learned else "context")
            state[span.first : span.first + span.tokens] = kinds.index(kind)
    bins = min(_BINS, seq_length)
    place = np.arange(seq_length) * bins // seq_length
    counts = np.bincount(place * len(kinds) + state, minlength=bins * len(kinds))
    most = counts.reshape(bins, len(kinds)).argmax(axis=1)
    starts = np.flatnonzero(np.diff(most, prepend=-1))
    widths = np.diff(starts, append=bins)
    shapes = [
        f'<rect class="{kinds[most[x]]}" x="{x}" y="0" width="{width}" height="10"/>'
        for x, width in zip(starts.tolist(), widths.tolist(), strict=True)
    ]
    for number, segment in enumerate(row.segments):
        x, width = (value * bins / seq_length for value in (segment.first, segment.padded))
        label = safe("; ".join(f"{s.source} {s.number}" for s in segment.samples[:8]))
        shapes.append(
            f'<a href="#row-{row.number}-{number}" aria-label="{label}"><rect class="whole" '
            f'x="{x:g}" y="0" width="{width:g}" height="10"><title>{label}</title></rect></a>'
            f'<path class="edge" d="M{x + width:g} 0V10"/>'
        )
    scale = "".join(f"<span>{seq_length * part // 4:,}</span>" for part in range(5))
    return (
        f'<svg class="bar" viewBox="0 0 {bins} 10" preserveAspectRatio="none">{"".join(shapes)}'
        f'</svg><div class="scale" aria-hidden="true">{scale}</div>'
    )
