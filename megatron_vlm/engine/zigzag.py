"""Which tokens of a packed micro-batch a context-parallel rank holds, and in which order.

Each segment is cut into 2 * cp equal parts; rank r holds parts r and 2 * cp - 1 - r, so causal
attention costs every rank the same. Pure index arithmetic, on numpy.
"""

from __future__ import annotations

import numpy as np


def local_tokens(cu_seqlens: np.ndarray, cp: int, rank: int) -> np.ndarray:
    """Positions in the micro-batch of rank `rank`'s tokens, in its order: `[tokens / cp]` int64.

    Every segment's length must be a multiple of 2 * cp.
    """
    if cp == 1:
        return np.arange(int(cu_seqlens[-1]), dtype=np.int64)
    starts = cu_seqlens[:-1].astype(np.int64)
    parts = (np.diff(cu_seqlens) // (2 * cp)).astype(np.int64)
    pieces = []
    for start, part in zip(starts, parts, strict=True):
        first, second = start + rank * part, start + (2 * cp - 1 - rank) * part
        pieces += [np.arange(first, first + part), np.arange(second, second + part)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def gathered_order(cu_seqlens: np.ndarray, cp: int) -> np.ndarray:
    """Where token t of the micro-batch lies when all ranks' tokens are laid end to end."""
    laid = np.concatenate([local_tokens(cu_seqlens, cp, rank) for rank in range(cp)])
    order = np.empty_like(laid)
    order[laid] = np.arange(len(laid))
    return order
