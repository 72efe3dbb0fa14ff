"""The text of single tokens.

A token may hold a part of a character only, and some tokenizers write a token otherwise at the
start of a text than within it. So tokens are decoded behind those before them, and those that make
up one character together stay together.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from megatron_vlm.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""

_MOST_TOGETHER = 16
"""Tokens that are waited for until a character is whole; it has four bytes at most, but a token may
end one and begin another. Our choice."""


class Spelled(NamedTuple):
    """Tokens that follow each other, and their text."""

    tokens: int
    """How many: 1, or those of one character."""
    text: str
    """May be empty, of a token that writes nothing."""
    special: bool
    """Whether it is an added token, spelled."""


def spell(
    tokenizer: Tokenizer, ids: Sequence[int], bounds: Set[int] = frozenset()
) -> list[Spelled]:
    """The text of each token.

    Args:
        tokenizer: of the ids.
        ids: in order.
        bounds: places in `ids` that no group of tokens goes across.

    Returns:
        As many tokens as `ids`, in their order.
    """
    spelled: list[Spelled] = []
    run: list[int] = []
    inside: set[int] = set()

    def end_run() -> None:
        spelled.extend(_spell_run(tokenizer, run, inside))
        run.clear()
        inside.clear()

    for place, token in enumerate(ids):
        if token in tokenizer.added_ids:
            end_run()
            spelled.append(Spelled(1, tokenizer.decode([token], False), True))
            continue
        if place in bounds:
            inside.add(len(run))
        run.append(token)
    end_run()
    return spelled


def _spell_run(tokenizer: Tokenizer, ids: Sequence[int], bounds: Set[int]) -> list[Spelled]:
    """Of ordinary tokens."""
    spelled: list[Spelled] = []
    # Decoded are always the group before and the one at hand: what they differ in is its text.
    before = first = 0
    for end in range(1, len(ids) + 1):
        shown = tokenizer.decode(ids[before:end])
        closed = end == len(ids) or end in bounds or end - first == _MOST_TOGETHER
        if shown.endswith(_UNFINISHED) and not closed:
            continue
        context = tokenizer.decode(ids[before:first])
        if not shown.startswith(context):
            context, shown = "", tokenizer.decode(ids[first:end])
        spelled.append(Spelled(end - first, shown[len(context) :], False))
        before, first = first, end
    return spelled
