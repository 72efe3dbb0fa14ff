"""Where tokens stand: along their segment, and in three dimensions where pictures have rows.

M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): a text token stands at the same place in time,
height and width. A picture's tokens share the time at which it begins, and differ in height and
width by their row and column. The text behind it goes on after its longer side. Each frame of a
video is a picture of its own, with its timestamp as text before it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int32] | NDArray[np.int64]


def segment_positions(cu_seqlens: Integers) -> NDArray[np.int64]:
    """int64 [tokens], from 0 in each segment.

    Args:
        cu_seqlens: [segments + 1] bounds of the segments.
    """
    bounds = cu_seqlens.astype(np.int64)
    positions: NDArray[np.int64] = np.arange(bounds[-1], dtype=np.int64)
    return positions - np.repeat(bounds[:-1], np.diff(bounds))


def multimodal_positions(
    cu_seqlens: Integers, spans: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [3, tokens]: time, height and width, each from 0 in every segment.

    Args:
        cu_seqlens: [segments + 1] bounds of the segments.
        spans: [pictures, 2] first token and number of tokens of each picture, ascending; none lies
            across a bound.
        columns: [pictures] tokens along each picture's width.
    """
    text = segment_positions(cu_seqlens)
    if not len(spans):
        return np.stack([text] * 3)
    starts, counts = spans.T
    longer = np.maximum(columns, counts // columns)
    # Tokens behind a picture move up by what its longer side is short of its tokens.
    saved = np.cumsum(counts - longer)
    bounds = cu_seqlens.astype(np.int64)
    first = np.searchsorted(starts, bounds[:-1])
    earlier = np.concatenate(([0], saved))
    before_segment = np.repeat(earlier[first], np.diff(bounds))
    behind = np.zeros(len(text), np.int64)
    ends = starts + counts
    inside = ends < len(text)
    behind[ends[inside]] = (counts - longer)[inside]
    text -= np.cumsum(behind) - before_segment
    found = np.stack([text] * 3)
    tokens = np.repeat(starts, counts) + _within(counts)
    row, column = np.divmod(_within(counts), np.repeat(columns, counts))
    base = np.repeat(text[starts], counts)
    found[:, tokens] = base, base + row, base + column
    return found


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places within runs of given lengths."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
