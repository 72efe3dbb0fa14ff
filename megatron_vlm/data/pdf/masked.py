"""Masked-page reading: a page with covered text, and the covered text as the answer.

After dots.vlm1, which renders whole pages with some text blocks masked and learns the masked
text; which share it masks is not published.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from megatron_vlm.data.chat import Thinking, Turn
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import Draft, Medium, Part, Picture, Special, Text
from megatron_vlm.data.marks import IMAGE_MARK
from megatron_vlm.data.pdf.left_out import left_out, nothing_left
from megatron_vlm.data.pdf.pool import read_pages
from megatron_vlm.data.pdf.settings import PdfSettings


def masked_pages(
    encoded: bytes,
    name: str,
    settings: PdfSettings | None = None,
    template: ChatTemplate | None = None,
    thinking: Thinking = "keep",
) -> list[Draft]:
    """One conversation for each page with enough text: a picture of the page, and the answer.

    What is covered is drawn from the seed, the document's name and the page's number, so that it
    is the same wherever it is drawn. The answer is exactly the covered text, block after block in
    reading order, with an empty line between blocks.

    Args:
        encoded: the PDF file.
        name: the document's key in the draw, and what errors and media call it.
        settings: rendering, share, question and limits; null for the defaults.
        template: what writes question and answer; null: the built-in format.
        thinking: what the template is told; there are no traces.

    Returns:
        Drafts in the order of the pages. `entry` holds the file, the page (from 1), the number
        of pages, the picture's size (width, height), the covers (x0, y0, x1, y1 in its pixels),
        and how many pages were left out for which reason.

    Raises:
        DataError: the document cannot be read, or none of its pages can be used; names it.
        TaskFailed: no process can be started to read it.
    """
    settings = settings or PdfSettings()
    pages, answers = read_pages(encoded, name, "masked", settings)
    reasons = left_out(pages, answers, settings)
    drafts = []
    for number, (page, blobs) in enumerate(answers, start=1):
        if "left_out" in page:
            continue
        entry = {
            "file": name,
            "page": number,
            "pages": pages,
            "size": page["size"],
            "covers": page["covers"],
            "left_out": reasons,
        }
        medium = Medium(f"{name} page {number}", len(blobs[0]), partial(bytes, blobs[0]))
        parts = _question(settings.instruction, page["answer"], template, thinking)
        drafts.append(Draft(parts, [medium], json.dumps(entry).encode()))
    if not drafts:
        raise nothing_left(name, pages, reasons)
    return drafts


def _question(
    instruction: str, answer: str, template: ChatTemplate | None, thinking: Thinking
) -> Sequence[Part]:
    """A question about one picture, as `chat` or a template writes it.

    What a page says is plain text, also where it spells a mark such as `<image>`.
    """
    if template is not None:
        turns = [Turn("user", f"{IMAGE_MARK}\n{instruction}"), Turn("assistant", answer)]

        def split(turn: int, _: bool, text: str) -> list[Part]:
            if turn == 1:
                return [Text(text, True)]
            return [Picture(0), Text(text.removeprefix(IMAGE_MARK), False)]

        return template.write(turns, split, thinking)
    return [
        Special("user", False),
        Picture(0),
        Text("\n" + instruction, False),
        Special("end", False),
        Special("assistant", False),
        Text(answer, True),
        Special("end", True),
        Special("eos", True),
    ]
