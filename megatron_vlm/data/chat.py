"""The chat format: how a conversation becomes token ids, and which of them are targets.

`<|user|>TEXT<|end|><|assistant|>TEXT<|end|> ... <|eos|>`, with one `<|image|>` placeholder where
each picture goes. Only what the assistant has to say is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError

IMAGE_MARK = "<image>"
"""What a text holds where a picture goes."""

Role = Literal["system", "user", "assistant"]

CHAT_SETTINGS: dict[str, object] = {
    "turn": "<|ROLE|>TEXT<|end|>",
    "roles": list(get_args(Role)),
    "sample_end": "<|eos|>",
    "image_mark": IMAGE_MARK,
    "loss": "assistant text, its <|end|>, and <|eos|> after an assistant turn",
}
"""The format as `dataset.json` records it."""


class Turn(NamedTuple):
    """One speaker's text, with `<image>` where pictures go."""

    role: Role
    text: str


def encode_conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn | tuple[Role, str]], num_pictures: int
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and the flag of each: 1 where this token is a target.

    Without any mark, the pictures and a line break open the first user turn (the first turn, if
    there is no user), just as if they had been marked there.

    Args:
        tokenizer: gives ids and special tokens.
        turns: in order.
        num_pictures: placeholders wanted.

    Returns:
        ids [n] with exactly `num_pictures` placeholders, and flags [n].

    Raises:
        DataError: no assistant turn, an unknown role, or marks and pictures differ in number.
    """
    marked = _place_marks([Turn(*turn) for turn in turns], num_pictures)
    if not any(turn.role == "assistant" for turn in marked):
        raise DataError("conversation has no assistant turn, so there is nothing to learn")
    ids: list[int] = []
    loss: list[int] = []
    for turn in marked:
        learned = int(turn.role == "assistant")
        ids.append(tokenizer.special(turn.role))
        loss.append(0)
        for part, piece in enumerate(turn.text.split(IMAGE_MARK)):
            if part:
                ids.append(tokenizer.image_id)
                # The placeholder grows into features, which no token can predict.
                loss.append(0)
            text_ids = tokenizer.encode(piece)
            ids += text_ids
            loss += [learned] * len(text_ids)
        ids.append(tokenizer.special("end"))
        loss.append(learned)
    ids.append(tokenizer.eos_id)
    loss.append(int(marked[-1].role == "assistant"))
    return ids, loss


def encode_prompt(tokenizer: Tokenizer, text: str, num_pictures: int) -> list[int]:
    """Ids of one user turn and the opening of the answer, for generation.

    Equal to the beginning of `encode_conversation` of the same question.

    Raises:
        DataError: marks and pictures differ in number.
    """
    conversation: list[Turn] = [Turn("user", text), Turn("assistant", "")]
    ids, _ = encode_conversation(tokenizer, conversation, num_pictures)
    return ids[:-2]


def _place_marks(turns: list[Turn], num_pictures: int) -> list[Turn]:
    for turn in turns:
        if turn.role not in get_args(Role):
            raise DataError(f"role {turn.role!r}: expected one of {', '.join(get_args(Role))}")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == num_pictures:
        return turns
    if marks or not turns:
        raise DataError(
            f"{marks} {IMAGE_MARK} marks but {num_pictures} pictures; expected as many marks as "
            "pictures, or none"
        )
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    opened = Turn(turns[first].role, IMAGE_MARK * num_pictures + "\n" + turns[first].text)
    return [*turns[:first], opened, *turns[first + 1 :]]
