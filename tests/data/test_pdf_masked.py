"""Pages with covered text: what is covered is gone from the pixels and is the whole answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_vlm.data.draft import Draft, Picture, Special, Text
from megatron_vlm.data.pdf.masked import masked_pages
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.errors import DataError
from tests.data.pdf_files import Page, image_object, pdf, prose, render, text_width, wrap

pytestmark = pytest.mark.unit

Build = Callable[[Sequence[str]], bytes]
"""A document of one page with these paragraphs, an empty one left out."""

TEXTS = [prose(seed, words) for seed, words in enumerate((9, 30, 25, 8, 40, 18, 22, 12))]
HALF = PdfSettings(covered_share=0.5)


def answer(draft: Draft) -> str:
    learned = [part.text for part in draft.parts if isinstance(part, Text) and part.learned]
    assert len(learned) == 1
    return learned[0]


def pixels(draft: Draft) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(draft.media[0].read())).convert("RGB"))


def covers(draft: Draft) -> NDArray[np.bool_]:
    entry = json.loads(draft.entry)
    width, height = entry["size"]
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in entry["covers"]:
        mask[y0:y1, x0:x1] = True
    return mask


def only_page(file: bytes, settings: PdfSettings = HALF) -> Draft:
    (draft,) = masked_pages(file, "a.pdf", settings)
    return draft


def stack(texts: Sequence[str], page: Page, gap: float = 8, **style: object) -> Page:
    """Paragraphs one below the other. An empty text keeps the place of the one in `TEXTS`."""
    y = 470.0
    for text, place in zip(texts, TEXTS, strict=True):
        after = Page().paragraph(40, y, place, **style)  # type: ignore[arg-type]
        if text:
            page.paragraph(40, y, text, **style)  # type: ignore[arg-type]
        y = after - gap
    return page


def stacked(texts: Sequence[str]) -> bytes:
    return pdf(stack(texts, Page()))


def style(**options: object) -> Build:
    return lambda texts: pdf(stack(texts, Page(), **options))  # type: ignore[arg-type]


def on_page(**options: object) -> Build:
    return lambda texts: pdf(stack(texts, Page(**options)))  # type: ignore[arg-type]


def content_turned(quarters: int, rotate: int = 0) -> Build:
    """Text that does not run along the page, as wide tables do; the page is cropped besides."""
    matrix = ("0 1 -1 0 500 0", "-1 0 0 -1 400 500", "0 -1 1 0 0 400")[quarters - 1]
    size = (400, 500) if quarters == 2 else (500, 400)

    def build(texts: Sequence[str]) -> bytes:
        page = stack(texts, Page())
        page.width, page.height = size
        page.rotate, page.crop = rotate, [5, 10, size[0] - 1, size[1] - 2]
        page.content.insert(0, f"{matrix} cm")
        return pdf(page)

    return build


def columns(texts: Sequence[str]) -> bytes:
    """Two columns of 25 characters below a heading."""
    page = Page()
    if texts[0]:
        page.paragraph(40, 470, texts[0], width=340)
    for side in range(2):
        y = 430.0 - 5 * side
        for number in range(1 + side, len(TEXTS), 2):
            after = Page().paragraph(0, y, TEXTS[number], width=150)
            if texts[number]:
                page.paragraph(40 + 170 * side, y, texts[number], width=150)
            y = after - 8
    return pdf(page)


def twice(apart: float) -> Build:
    """Painted twice, a little apart, which is how some writers make bold."""

    def build(texts: Sequence[str]) -> bytes:
        page = stack(texts, Page())
        again = [line.replace("1 0 0 1 40.000", f"1 0 0 1 {40 + apart}") for line in page.content]
        if apart:
            page.content += again
        else:
            # The library gives characters that come again at once, at the same place, once.
            page.content = [line for line in page.content for _ in range(2)]
        return pdf(page)

    return build


def scan(texts: Sequence[str]) -> bytes:
    """A picture of text below invisible text, as programs for recognition write it."""
    page = Page()
    image = Image.new("L", (1600, 2000), 245)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=38)
    y = 470.0
    for text, place in zip(texts, TEXTS, strict=True):
        for line in wrap(text or place, "Courier", 10, 300):
            if text:
                # As wide as the invisible line above it.
                width = text_width(line, "Courier", 10)
                page.text(40, y, line, mode=3)
                word = Image.new("L", (round(draw.textlength(line, font)) + 4, 60), 245)
                ImageDraw.Draw(word).text((0, 2), line, 0, font)
                image.paste(word.resize((round(4 * width), 60)), (160, round(2000 - 4 * y) - 40))
            y -= 13
        y -= 8
    picture = image_object(np.asarray(image))
    page.content.insert(0, "q 400 0 0 500 0 0 cm /I0 Do Q")
    page.images.append(picture)
    return pdf(page)


LAYOUTS: dict[str, Build] = {
    "plain": stacked,
    "helvetica": style(font="Helvetica-Bold", size=11),
    "italic": style(font="Times-Italic", size=12),
    "rotated by 90": on_page(rotate=90),
    "rotated by 180": on_page(rotate=180),
    "rotated by 270": on_page(rotate=270),
    "cropped": on_page(crop=[20, 10, 390, 490]),
    "in a form": on_page(form=True),
    "indented": style(gap=0, indent=20, leading=1.15),
    "columns": columns,
    "content turned left": content_turned(1),
    "content upside down": content_turned(2),
    "content turned right": content_turned(3),
    "content turned left, page right": content_turned(1, rotate=90),
    "twice": twice(0.3),
    "twice, at once": twice(0),
    "scan": scan,
}


TURNS = {
    "rotated by 90": 270,
    "rotated by 180": 180,
    "rotated by 270": 90,
    "content turned left": 90,
    "content upside down": 180,
    "content turned right": 270,
}
"""Degrees, clockwise, that put text upright that is not so as the page is displayed."""


def seen(name: str, texts: Sequence[str]) -> NDArray[np.uint8]:
    """A page as another program renders it, turned so that its text is upright."""
    return render(LAYOUTS[name](texts), turn=TURNS.get(name, 0))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_each_paragraph_is_seen_whole_or_covered_whole(name: str, seed: int) -> None:
    draft = only_page(LAYOUTS[name](TEXTS), PdfSettings(covered_share=0.5, seed=seed))
    image, mask = pixels(draft), covers(draft)
    empty = seen(name, [""] * len(TEXTS))
    covered = []
    for number, text in enumerate(TEXTS):
        alone = seen(name, [text if i == number else "" for i in range(len(TEXTS))])
        ink = (alone != empty).any(axis=2)
        assert ink.any()
        if (ink & mask).any():
            assert not (ink & ~mask).any(), f"paragraph {number} sticks out of its cover"
            covered.append(number)
        else:
            np.testing.assert_array_equal(image[ink], alone[ink])
    order = [0, 1, 3, 5, 7, 2, 4, 6] if name == "columns" else range(len(TEXTS))
    assert answer(draft).split("\n\n") == [TEXTS[i] for i in order if i in covered]
    assert 1 <= len(covered) < len(TEXTS)
    assert (image[mask] == 128).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rest_of_the_page_is_as_if_the_words_were_not_there(name: str) -> None:
    draft = only_page(LAYOUTS[name](TEXTS))
    said = answer(draft).split("\n\n")
    assert 1 <= len(said) < len(TEXTS)
    without = seen(name, ["" if text in said else text for text in TEXTS])
    full = seen(name, TEXTS)
    image, mask = pixels(draft), covers(draft)
    np.testing.assert_array_equal(image[~mask], without[~mask])
    np.testing.assert_array_equal(image[~mask], full[~mask])
    assert (full[mask] != without[mask]).any()


def anagram(text: str, seed: int) -> str:
    """Other words of the same lengths: every word's letters are replaced."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    return "".join(str(rng.choice(letters)) if char.isalpha() else char for char in text)


MONOSPACED = [name for name in LAYOUTS if name not in ("helvetica", "italic")]


@pytest.mark.parametrize("name", MONOSPACED)
def test_pages_that_differ_in_covered_words_alone_look_the_same(name: str) -> None:
    """The proof that nothing of the words is left: not even the covers' sizes depend on them."""
    build = LAYOUTS[name]
    first = only_page(build(TEXTS))
    said = answer(first).split("\n\n")
    assert said
    other = [anagram(text, i) if text in said else text for i, text in enumerate(TEXTS)]
    second = only_page(build(other))
    assert not np.array_equal(seen(name, TEXTS), seen(name, other))
    assert first.media[0].read() == second.media[0].read()
    order = [0, 1, 3, 5, 7, 2, 4, 6] if name == "columns" else range(len(TEXTS))
    assert answer(second).split("\n\n") == [other[i] for i in order if TEXTS[i] in said]


def test_parts_are_a_question_about_one_picture() -> None:
    draft = only_page(stacked(TEXTS), PdfSettings(instruction="What is there?"))
    assert list(draft.parts) == [
        Special("user", False),
        Picture(0),
        Text("\nWhat is there?", False),
        Special("end", False),
        Special("assistant", False),
        Text(answer(draft), True),
        Special("end", True),
        Special("eos", True),
    ]
    (medium,) = draft.media
    assert medium.size == len(medium.read())
    assert medium.name == "a.pdf page 1"
    entry = json.loads(draft.entry)
    assert (entry["file"], entry["page"], entry["pages"]) == ("a.pdf", 1, 1)


def test_draws_follow_from_seed_name_and_page() -> None:
    file = pdf(*[_page(TEXTS) for _ in range(4)])
    first = masked_pages(file, "a.pdf", HALF)
    again = masked_pages(file, "a.pdf", HALF)
    assert [draft.entry for draft in first] == [draft.entry for draft in again]
    assert [answer(draft) for draft in first] == [answer(draft) for draft in again]
    assert len({answer(draft) for draft in first}) > 1, "pages draw alike"
    renamed = masked_pages(file, "b.pdf", HALF)
    assert [answer(draft) for draft in first] != [answer(draft) for draft in renamed]
    reseeded = masked_pages(file, "a.pdf", PdfSettings(covered_share=0.5, seed=1))
    assert [answer(draft) for draft in first] != [answer(draft) for draft in reseeded]


def _page(texts: Sequence[str]) -> Page:
    page = Page()
    y = 470.0
    for text in texts:
        y = page.paragraph(40, y, text) - 8
    return page


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.25, 2), (0.5, 4), (1.0, 7)])
def test_the_share_is_one_of_blocks(share: float, count: int) -> None:
    draft = only_page(stacked(TEXTS), PdfSettings(covered_share=share, min_block_chars=1))
    assert len(json.loads(draft.entry)["covers"]) == count
    assert len(answer(draft).split("\n\n")) == count


ALL = PdfSettings(covered_share=1.0)


def test_small_short_and_hidden_text_is_never_covered() -> None:
    page = _page(TEXTS[:3])
    page.text(40, 100, "Too short")
    page.text(40, 80, prose(50, 8), size=3)
    page.text(40, 60, "white " + prose(51, 6), color="1 g")
    page.text(40, 30, "hidden " + prose(52, 6), mode=3)
    said = answer(only_page(pdf(page), ALL))
    assert set(said.split("\n\n")) <= set(TEXTS[:3])
    assert len(said.split("\n\n")) == 3


def ever_covered(file: bytes) -> set[str]:
    """Blocks that some seed covers."""
    said: set[str] = set()
    for seed in range(6):
        draft = only_page(file, PdfSettings(covered_share=0.6, seed=seed, dpi=72))
        said |= set(answer(draft).split("\n\n"))
    return said


@pytest.mark.parametrize(
    "intruder",
    [
        # Only the tails of the large letters reach into the line.
        {"x": 60, "y": 113, "text": "yg", "size": 60, "font": "Times-Roman"},
        # It runs across, and paints nothing.
        {"x": 100, "y": 60, "text": "sideways words", "mode": 3, "matrix": "0 1 -1 0"},
    ],
)
def test_text_that_other_text_runs_into_is_never_covered(intruder: dict[str, Any]) -> None:
    page = _page(TEXTS[:4])
    line = "below " + prose(53, 5)
    page.text(40, 100, line)
    assert ever_covered(pdf(page)) == {*TEXTS[:4], line}
    page.text(**intruder)
    assert ever_covered(pdf(page)) == set(TEXTS[:4])


def test_covers_grow_over_ink_that_sticks_out_but_not_far() -> None:
    def drawn(width: float) -> tuple[bytes, bytes]:
        page, alone = _page(TEXTS[:4]), Page()
        for made in (page, alone):
            # The outlines of the letters, drawn with a broad pen.
            made.content.append(f"{width} w 1 j")
            made.text(40, 100, "outlines of " + prose(53, 4), mode=1)
        return pdf(page), pdf(alone)

    page, alone = drawn(7.0)
    drafts = [only_page(page, PdfSettings(covered_share=0.6, seed=seed)) for seed in range(6)]
    covering = [draft for draft in drafts if "outlines of" in answer(draft)]
    assert covering
    ink = (render(alone) != 255).any(axis=2)
    for draft in covering:
        assert not (ink & ~covers(draft)).any()
    page, _ = drawn(25.0)
    assert ever_covered(page) == set(TEXTS[:4])


def test_a_cover_does_not_tell_letters_that_stick_out_of_their_place() -> None:
    def covers_of(last: str) -> list[list[int]]:
        page = Page()
        for number in range(8):
            # A V of Courier is a little wider than its place.
            page.text(40, 450 - 30 * number, f"the quiet river of the {'x' * number}{last}")
        return json.loads(only_page(pdf(page), ALL).entry)["covers"]  # type: ignore[no-any-return]

    assert covers_of("V") == covers_of("l")


def test_text_of_one_object_in_two_columns() -> None:
    page = _page(TEXTS[:3])
    for number in range(4):
        left, right = (f"the {side} column, line {number}" for side in ("left", "right"))
        line = f"[({left}) -6000 ({right})] TJ"
        page.content.append(f"BT 0 Tr /F0 10 Tf 1 0 0 1 40 {200 - 12 * number} Tm {line} ET")
    covered = ever_covered(pdf(page))
    assert set(TEXTS[:3]) <= covered
    for text in covered - set(TEXTS[:3]):
        assert "left" not in text or "right" not in text


def test_a_watermark_over_everything_leaves_the_page_out() -> None:
    page = _page(TEXTS)
    for offset in range(-400, 400, 40):
        page.text(200 + offset, 60, "DRAFT " * 4, size=50, matrix="0.6 0.8 -0.8 0.6", color=".8 g")
    with pytest.raises(DataError, match="without touching other text"):
        masked_pages(pdf(page), "a.pdf")


def test_ligatures_and_hyphens_are_read_out() -> None:
    page = _page(TEXTS[:3])
    page.text(40, 200, "The meadow was quiet on a bright evening, no har-")
    page.text(40, 188, "bour was seen.")
    assert "a bright evening, no harbour was seen." in answer(only_page(pdf(page), ALL))


def test_pages_without_enough_text_are_left_out_with_reasons() -> None:
    picture = Page()
    picture.image(
        image_object(np.arange(4096, dtype=np.uint8).reshape(64, 64)), "300 0 0 300 50 50"
    )
    short, shorter = Page(), Page()
    short.text(40, 400, "A few words only")
    shorter.text(40, 400, "Two words")
    single = Page()
    single.paragraph(40, 450, prose(1, 60))
    file = pdf(_page(TEXTS), picture, short, single, Page(), shorter)
    (draft,) = masked_pages(file, "a.pdf")
    assert json.loads(draft.entry)["left_out"] == {
        "no text (a scan)": 2,
        "too little text: 8 to 13 characters; PDF setting min_page_chars is 150": 2,
        "a single block of text, which leaves nothing to read around it": 1,
    }
    with pytest.raises(DataError, match=r"^b\.pdf: none of its 2 pages .*2: no text"):
        masked_pages(pdf(picture, Page()), "b.pdf")
    with pytest.raises(DataError, match=r"1: too little text: 13 characters; PDF setting min_p"):
        masked_pages(pdf(short), "c.pdf")


def test_settings_that_keep_every_block_from_being_covered_are_named() -> None:
    file = pdf(_page(TEXTS[:2]))
    longest = max(len("".join(text.split())) for text in TEXTS[:2])
    with pytest.raises(DataError) as caught:
        masked_pages(file, "a.pdf", PdfSettings(min_block_chars=1000))
    assert f"longest has {longest} characters; PDF setting min_block_chars is 1000" in str(
        caught.value
    )
    # 10 points at 144 to the inch.
    with pytest.raises(DataError) as caught:
        masked_pages(file, "a.pdf", PdfSettings(min_text_pixels=30))
    assert "largest text has 20 pixels; PDF setting min_text_pixels is 30 (" in str(caught.value)


def test_fonts_without_a_unicode_map_are_garbage() -> None:
    codes = "/Encoding<</Type/Encoding/Differences[97" + "".join(
        f"/g{number}" for number in range(26)
    )
    file = pdf(_page(TEXTS), font_extra=codes + "]>>")
    with pytest.raises(DataError, match="lack a Unicode map") as caught:
        masked_pages(file, "a.pdf")
    share = re.search(
        r"map\): ([\d.]+) of its characters; PDF setting max_unmapped is 0\.05", str(caught.value)
    )
    assert share is not None and 0.5 < float(share[1]) <= 1


def test_resolution() -> None:
    file = stacked(TEXTS)
    assert json.loads(only_page(file).entry)["size"] == [800, 1000]
    assert pixels(only_page(file)).shape == (1000, 800, 3)
    longest = PdfSettings(longest_side=750)
    assert json.loads(only_page(file, longest).entry)["size"] == [600, 750]
    bounded = PdfSettings(dpi=288, max_page_pixels=800_000)
    assert json.loads(only_page(file, bounded).entry)["size"] == [800, 1000]


def test_a_huge_page_is_rendered_within_bounds() -> None:
    page = Page(14_400, 14_400)
    y = 14_000.0
    for text in TEXTS:
        y = page.paragraph(400, y, text, size=250, width=13_000) - 300
    width, height = json.loads(only_page(pdf(page)).entry)["size"]
    assert 7_900_000 < width * height <= 8_010_000
    # Text of 10 points on 200 inches is two pixels high.
    page = _page(TEXTS)
    page.width = page.height = 14_400
    with pytest.raises(DataError, match="no block of text that can be covered"):
        masked_pages(pdf(page), "a.pdf")


def test_long_documents_are_cut() -> None:
    pages = [_page(TEXTS[i % 4 : i % 4 + 4]) for i in range(9)]
    drafts = masked_pages(pdf(*pages), "a.pdf", PdfSettings(max_pages=4))
    assert len(drafts) == 4
    assert json.loads(drafts[0].entry)["left_out"] == {"after the first 4 (max_pages)": 5}
    one = drafts[0].media[0].size
    drafts = masked_pages(pdf(*pages), "a.pdf", PdfSettings(max_bytes=int(2.5 * one)))
    assert 1 <= len(drafts) <= 3
    assert sum(draft.media[0].size for draft in drafts) <= 2.5 * one
