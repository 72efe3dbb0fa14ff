"""Preferences (`images`, `prompt`, `chosen`, `rejected`): two samples an entry, chosen first.

A prompt and an answer are each a text or a list of turns. Where chosen and rejected are whole
conversations, what both begin with is the prompt. Only the answer is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.chat import Thinking, Turn, has_reasoning
from megatron_vlm.data.draft import Draft
from megatron_vlm.data.marks import IMAGE_MARK, VIDEO_MARK
from megatron_vlm.data.sources.conversations import (
    Content,
    media_root,
    objects_of,
    turns_of,
)
from megatron_vlm.data.sources.media import FindMedium, MediaFolder, entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import RecordSource, open_records
from megatron_vlm.errors import DataError

SIDES = ("chosen", "rejected")
"""The samples of an entry, in order."""


def open_preferences(path: Path, options: SourceOptions) -> RecordSource:
    """Preferences from a JSON list, JSON lines or Parquet.

    Args:
        path: a file, or a folder of such files.
        options: `image_root`, `fps`, `thinking`, `template`.

    Raises:
        DataError: nothing there, unreadable, or no media root.
    """
    files, names = open_records(path, '{"images", "prompt", "chosen", "rejected"}')
    folder = MediaFolder.open(media_root(path, options))
    to_drafts = partial(preference_drafts, find=folder.find, options=options)
    return RecordSource("preference", files, names, to_drafts)


def preference_drafts(entry: Any, find: FindMedium, options: SourceOptions) -> Sequence[Draft]:
    """Both samples of one entry. Beside each is kept the entry without the other's answer.

    Args:
        entry: `prompt`, `chosen`, `rejected`; media as a conversation has them.
        find: gives its media.
        options: `fps`, `thinking`, `template`.

    Raises:
        DataError: the reason why it cannot be a pair; names the field.
    """
    if not isinstance(entry, dict):
        raise DataError(f"entry is {type(entry).__name__}; expected an object")
    for side in SIDES:
        if not isinstance(entry.get(side), str | list) or not entry[side]:
            raise DataError(f"{side}: expected an answer, as a text or a list of turns")
    if entry["chosen"] == entry["rejected"]:
        raise DataError("chosen, rejected: are the same, so there is nothing to prefer")
    prompt, answers = _split(entry)
    drafts = []
    shown: list[list[Turn]] = []
    for side, other in zip(SIDES, reversed(SIDES), strict=True):
        content = Content(find)
        content.add_listed(entry)
        asked = turns_of(prompt, "prompt", content)
        answered = turns_of(answers[side], side, content)
        turns: list[Turn] = [*(turn._replace(learned=False) for turn in asked), *answered]
        shown.append(turns)
        kept = {key: value for key, value in entry.items() if key != other}
        drafts.append(content.draft([turns], options, entry_json(kept), objects_of(entry)))
    _check_pair(shown[0], shown[1], options.thinking.mode)
    return drafts


def _check_pair(chosen: list[Turn], rejected: list[Turn], thinking: Thinking) -> None:
    """Raises DataError unless both answer the same prompt, and not with the same words."""
    thinks = [any(has_reasoning(turn) for turn in turns) for turns in (chosen, rejected)]
    if thinking == "toggle" and thinks[0] != thinks[1]:
        raise DataError(
            "chosen, rejected: only one has a thinking trace, so that thinking that is toggled "
            "gives them different prompts; give both a trace, or keep or drop them (--thinking)"
        )
    spoken = [
        [
            turn if thinking != "drop" and has_reasoning(turn) else turn._replace(reasoning=None)
            for turn in turns
        ]
        for turns in (chosen, rejected)
    ]
    # The same marks may stand for different media.
    shows = any(mark in turn.text for turn in chosen for mark in (IMAGE_MARK, VIDEO_MARK))
    if spoken[0] == spoken[1] and not shows:
        raise DataError(
            "chosen, rejected: say the same once their traces are dropped; keep the traces "
            "(--thinking keep) or leave the pair out"
            if any(thinks)
            else "chosen, rejected: say the same, so there is nothing to prefer"
        )


def _split(entry: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt's turns, and the turns of each answer."""
    prompt, chosen, rejected = entry.get("prompt"), entry["chosen"], entry["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared:
            # Some sets repeat the question as a text beside whole conversations.
            if prompt is not None and prompt not in _texts(chosen[shared - 1]):
                raise DataError(
                    "prompt: differs from what chosen and rejected begin with; keep one of them"
                )
            return chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if prompt is None:
        raise DataError("prompt: is missing, and chosen and rejected begin with no common turns")
    answers = {
        side: [{"role": "assistant", "content": entry[side]}]
        if isinstance(entry[side], str)
        else entry[side]
        for side in SIDES
    }
    return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), answers


def _texts(turn: Any) -> list[Any]:
    """The texts that a turn holds."""
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    if isinstance(content, list):
        return [part.get("text") for part in content if isinstance(part, dict)]
    return [content]
