"""PDF files as text and pictures in reading order."""

from __future__ import annotations

import json
import zlib
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megatron_vlm.data.draft import Draft, Picture, Special, Text
from megatron_vlm.data.pdf.interleaved import interleaved_documents
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.data.pdf.wording import join, normalise
from megatron_vlm.errors import DataError
from tests.data.pdf_files import (
    Page,
    distance,
    image_object,
    jpeg_object,
    pdf,
    prose,
    render,
    text_width,
    wrap,
)

pytestmark = pytest.mark.unit

MAX_DISTANCE = 0.005
"""Of extracted text from what was typeset, in Levenshtein distance over length."""


def one(file: bytes, settings: PdfSettings | None = None) -> Draft:
    (draft,) = interleaved_documents(file, "a.pdf", settings)
    assert draft.parts[-1] == Special("eos", True)
    assert all(part.learned for part in draft.parts if isinstance(part, Text))
    return draft


def content(draft: Draft) -> list[str | int]:
    """Its texts, and the numbers of its pictures."""
    return [
        part.text if isinstance(part, Text) else part.medium
        for part in draft.parts
        if isinstance(part, Text | Picture)
    ]


def text(file: bytes) -> str:
    return "".join(piece for piece in content(one(file)) if isinstance(piece, str))


def decoded(draft: Draft, number: int = 0) -> NDArray[np.uint8]:
    medium = draft.media[number]
    assert medium.size == len(medium.read())
    return np.asarray(Image.open(BytesIO(medium.read())).convert("RGB"))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """A picture that JPEG keeps well, and that no turn or mirror leaves as it is."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height)]
    return np.stack(channels, axis=2).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def hyphenated_lines(said: str, font: str, width: float, indent: float) -> list[str]:
    """Lines as typesetters break them: what fits, words parted after three letters."""
    lines = [""]
    for word in said.split():
        room = width - (indent if len(lines) == 1 else 0)
        longer = f"{lines[-1]} {word}".strip()
        parted = f"{lines[-1]} {word[:3]}-"
        if text_width(longer, font, 10) <= room:
            lines[-1] = longer
        elif len(word) > 5 and word.isalpha() and text_width(parted, font, 10) <= room:
            lines[-1] = parted
            lines.append(word[3:])
        else:
            lines.append(word)
    return lines


FONTS = ("Times-Roman", "Helvetica", "Courier", "Times-Italic")


@pytest.mark.parametrize("number_of_columns", [1, 2, 3])
@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("style", ["spaced", "indented"])
def test_typeset_text_comes_back(number_of_columns: int, font: str, style: str) -> None:
    """A title, headings and paragraphs with words parted at line ends, in columns."""
    page = Page(600, 800)
    page.text(50, 750, "A title that stands over all columns of the page", "Times-Bold", 18)
    wanted = ["A title that stands over all columns of the page"]
    width = (500 - 20 * (number_of_columns - 1)) / number_of_columns
    seed = 0
    for column in range(number_of_columns):
        x = 50 + column * (width + 20)
        # Columns do not stand on common lines.
        y = 710.0 - 5 * column
        for section in range(2):
            heading = f"{column + 1}.{section + 1} Section"
            page.text(x, y, heading, "Times-Bold", 13)
            wanted.append(heading)
            y -= 22
            for paragraph in range(3):
                seed += 1
                said = prose(seed, 34)
                indent = 14 if style == "indented" and paragraph else 0
                for number, line in enumerate(hyphenated_lines(said, font, width, indent)):
                    page.text(x + (0 if number else indent), y, line, font, 10)
                    y -= 12
                wanted.append(said)
                y -= 0 if style == "indented" and paragraph < 2 else 9
    found = text(pdf(page))
    assert distance("\n\n".join(wanted), found) <= MAX_DISTANCE


@pytest.mark.parametrize("fonttype", [3, 42])
def test_text_that_another_program_typeset_comes_back(fonttype: int) -> None:
    """Embedded fonts with a Unicode map, two columns, letters beyond Latin; by matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    foreign = "Größe über Ελλάδα und Россия, naïve façade: ﬁnal eﬀect ≤ ½."
    plain = foreign.replace("ﬁ", "fi").replace("ﬀ", "ff")
    columns = [[prose(seed, 40) for seed in range(4 * side, 4 * side + 4)] for side in range(2)]
    figure = Figure(figsize=(8.27, 11.69))
    canvas = FigureCanvasPdf(figure)
    wanted = []
    for side, paragraphs in enumerate(columns):
        y = 0.95
        for said in [*paragraphs, foreign]:
            lines = [""]
            for word in said.split():
                longer = f"{lines[-1]} {word}".strip()
                shown = figure.text(0, 0, longer, size=9)
                wide = shown.get_window_extent().width > 0.4 * figure.bbox.width
                shown.remove()
                if wide:
                    lines.append(word)
                else:
                    lines[-1] = longer
            for line in lines:
                figure.text(0.07 + 0.45 * side, y, line, size=9)
                y -= 0.0155
            y -= 0.012
            wanted.append(plain if said == foreign else said)
    file = BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": fonttype}):
        canvas.print_pdf(file)
    assert distance("\n\n".join(wanted), text(file.getvalue())) <= MAX_DISTANCE


def test_every_line_of_a_list_and_every_row_of_a_table_stays_one() -> None:
    page = Page()
    page.paragraph(40, 470, prose(1, 30), width=300)
    rows = [("Name", "Height", "Place"), ("Anna", "172", "Rome"), ("Bo", "98", "Oslo")]
    rows += [("Cleopatra", "160", "Alexandria"), ("Dan", "181", "Perth")]
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            page.text(40 + 90 * column, 380 - 12 * number, cell)
    for number, entry in enumerate(("a short entry", "another entry of it", "and one more")):
        page.text(40, 290 - 15 * number, f"\u2022 {entry}", "Helvetica")
    table = "\n".join(" ".join(row) for row in rows)
    entries = "\n\n".join(
        f"\u2022 {entry}" for entry in ("a short entry", "another entry of it", "and one more")
    )
    assert text(pdf(page)) == f"{prose(1, 30)}\n\n{table}\n\n{entries}"


def test_scripts_without_spaces_are_joined_without() -> None:
    assert join("\u5b57\u5b57", "\u5b57\u5b57", soft=True) == "\u5b57\u5b57\u5b57\u5b57"
    assert join("\u5b57", "a word", soft=True) == "\u5b57 a word"
    assert join("soft\u00ad", "Ware", soft=True) == "softWare"
    assert (
        normalise("\ufb01ne na\u0069\u0308ve\u200b x\u00b2\u00a0y") == "fine na\u00efve x\u00b2 y"
    )


def test_one_line_that_sticks_out_does_not_break_the_others() -> None:
    page = Page()
    page.paragraph(40, 470, prose(3, 60), width=260)
    page.content[4] = page.content[4].replace(") Tj", "oooooooooooooo) Tj")
    found = text(pdf(page))
    assert "oooooooooooooo" in found
    assert found.count("\n") <= 1


def test_a_poem_keeps_its_lines() -> None:
    lines = ["The river is bright,", "the mountain is high, and the evening", "is quiet,"]
    lines += ["a lantern", "in the window of a house", "and nobody there", "to see the light."]
    page = Page()
    for number, line in enumerate(lines):
        page.text(40, 400 - 13 * number, line, "Times-Roman", 11)
    assert text(pdf(page)) == "\n".join(lines)


def test_the_hyphen_of_a_compound_stays_where_the_page_shows_it() -> None:
    page = Page()
    for number, line in enumerate(
        [
            "A well-known harbour was seen from the river, and",
            "the people there were quiet and bright and well-",
            "known for that, which nobody had ever been in Ba-",
            "den, nor in the North-",
            "East.",
        ]
    ):
        page.text(40, 400 - 12 * number, line)
    assert text(pdf(page)) == (
        "A well-known harbour was seen from the river, and the people there were quiet and bright "
        "and well-known for that, which nobody had ever been in Baden, nor in the North-\nEast."
    )


def test_text_painted_twice_is_read_once() -> None:
    page = Page()
    page.paragraph(40, 470, prose(1, 40))
    page.paragraph(40.4, 469.8, prose(1, 40))
    assert text(pdf(page)) == prose(1, 40)


def test_an_initial_of_three_lines_and_indices() -> None:
    page = Page()
    page.text(40, 376, "T", "Times-Roman", 46)
    lines = wrap("his is " + prose(1, 40), "Courier", 10, 270)
    for number, line in enumerate(lines):
        page.text(40 if number > 2 else 70, 400 - 12 * number, line)
    page.text(40, 200, "The area is 12 m", "Times-Roman", 10)
    page.text(40 + text_width("The area is 12 m", "Times-Roman", 10), 204, "2", "Times-Roman", 6)
    found = text(pdf(page))
    assert [line in found.replace("\n", " ") for line in lines] == [True] * len(lines)
    assert "The area is 12 m2" in found


def test_a_short_last_line_above_columns_belongs_to_its_paragraph() -> None:
    page = Page(600, 800)
    # Capitals, so that the last line does not look like a sentence that goes on.
    abstract = prose(7, 38).title()
    y = page.paragraph(50, 700, abstract, width=480) - 14
    assert len(wrap(abstract, "Courier", 10, 480)[-1]) < 38
    columns = [prose(8, 60), prose(9, 60)]
    for side, said in enumerate(columns):
        page.paragraph(50 + 250 * side, y, said, width=230)
    assert text(pdf(page)) == "\n\n".join([abstract, *columns])


def test_an_indent_after_a_full_last_line_begins_a_paragraph() -> None:
    page = Page()
    first = [
        "The meadow was quiet and the river was bright in",
        "those days, and the lantern was seen by everyone",
    ]
    second = [
        "The harbour was quiet too, and nobody had been",
        "there before the evening, when the falcon came.",
    ]
    for number, line in enumerate([*first, *second]):
        page.text(40 + (20 if number == 2 else 0), 400 - 12 * number, line)
    assert text(pdf(page)) == f"{' '.join(first)}\n\n{' '.join(second)}"


def test_a_sentence_goes_on_although_a_word_would_have_fitted() -> None:
    page = Page()
    lines = [
        "The meadow was quiet and the river was seen from",
        "the harbour, where the lantern was bright",
    ]
    lines += ["as it had been, and the falcon came to the castle", "in the evening."]
    for number, line in enumerate(lines):
        page.text(40, 400 - 12 * number, line)
    assert text(pdf(page)) == " ".join(lines)


def test_pictures_stand_where_they_are_read() -> None:
    first, second, third = noise(70, 90, 1), noise(80, 80, 2), noise(66, 100, 3)
    page = Page(600, 800)
    page.text(50, 750, "Over both columns", "Times-Bold", 18)
    texts = [prose(seed, 30) for seed in range(4)]
    y = page.paragraph(50, 700, texts[0], width=240)
    page.image(image_object(first), f"90 0 0 70 60 {y - 80}")
    page.paragraph(50, y - 100, texts[1], width=240)
    page.image(image_object(second), "120 0 0 120 330 585")
    y = page.paragraph(310, 560, texts[2], width=240)
    y = page.paragraph(310, y - 8, texts[3], width=240)
    page.image(image_object(third), f"200 0 0 130 320 {y - 140}")
    draft = one(pdf(page))
    assert content(draft) == [
        f"Over both columns\n\n{texts[0]}\n\n",
        0,
        f"\n\n{texts[1]}\n\n",
        1,
        f"\n\n{texts[2]}\n\n{texts[3]}\n\n",
        2,
    ]
    for number, picture in enumerate((first, second, third)):
        np.testing.assert_array_equal(decoded(draft, number), picture)
    assert draft.media[1].name == "a.pdf page 1 picture 2"


def test_labels_on_a_picture_come_after_it() -> None:
    page = Page()
    y = page.paragraph(40, 470, prose(1, 20))
    page.image(image_object(noise(80, 80)), f"200 0 0 120 80 {y - 130}")
    page.text(100, y - 60, "a label", "Helvetica")
    page.paragraph(40, y - 160, prose(2, 20))
    assert content(one(pdf(page))) == [
        f"{prose(1, 20)}\n\n",
        0,
        f"\n\na label\n\n{prose(2, 20)}",
    ]


TURNS = {
    "upright": ("W 0 0 H 100 100", lambda a: a),
    "mirrored": ("-W 0 0 H 300 100", lambda a: a[:, ::-1]),
    "upside down": ("W 0 0 -H 100 300", lambda a: a[::-1]),
    "half a turn": ("-W 0 0 -H 300 300", lambda a: a[::-1, ::-1]),
    "a quarter left": ("0 H -W 0 300 100", lambda a: np.rot90(a)),
    "a quarter right": ("0 -H W 0 100 300", lambda a: np.rot90(a, -1)),
    "transposed": ("0 -H -W 0 300 300", lambda a: a.transpose(1, 0, 2)),
    "anti-transposed": ("0 H W 0 100 100", lambda a: np.rot90(a.transpose(1, 0, 2), 2)),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("form", [False, True])
def test_pictures_come_out_upright(name: str, form: bool) -> None:
    matrix, turn = TURNS[name]
    stored = smooth(70, 100)
    page = Page(form=form)
    page.paragraph(40, 470, prose(1, 20))
    page.image(image_object(stored), matrix.replace("W", "180").replace("H", "120"))
    file = pdf(page)
    found = decoded(one(file))
    np.testing.assert_array_equal(found, turn(stored))
    # And so it is displayed: the middle of each quarter has the colour that is found there.
    shown = render(file)
    rows, columns = np.nonzero((shown != 255).any(axis=2) & (np.arange(1000) > 300)[:, None])
    box = shown[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    for y in (0.25, 0.75):
        for x in (0.25, 0.75):
            here = found[int(y * found.shape[0]), int(x * found.shape[1])].astype(int)
            there = box[int(y * box.shape[0]), int(x * box.shape[1])].astype(int)
            assert np.abs(here - there).max() < 12


def test_pictures_of_a_rotated_page_come_out_as_displayed() -> None:
    page = Page(rotate=90)
    for number, line in enumerate(("A page that is turned", "so that one can read it")):
        page.text(40 + 12 * number, 40, line, matrix="0 1 -1 0")
    stored = smooth(70, 100)
    page.image(image_object(stored), "0 150 -105 0 300 100")
    np.testing.assert_array_equal(decoded(one(pdf(page))), stored)


def with_picture(item: bytes, mask: bytes | None = None) -> Draft:
    page = Page()
    page.paragraph(40, 470, prose(1, 20))
    page.image(item, "150 0 0 105 60 200", mask)
    return one(pdf(page))


def test_a_jpeg_comes_as_it_is() -> None:
    data = jpeg(smooth(70, 100))
    assert with_picture(jpeg_object(data, (70, 100))).media[0].read() == data


def test_a_jpeg_that_the_pdf_shows_otherwise_comes_as_it_is_shown() -> None:
    picture = smooth(70, 100)
    inverted = jpeg_object(jpeg(picture), (70, 100), extra="/Decode[1 0 1 0 1 0]")
    found = decoded(with_picture(inverted)).astype(int)
    assert np.abs(found - (255 - picture)).mean() < 4
    # Readers of PDF ignore the orientation that a camera wrote; readers of JPEG do not.
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(picture, exif=exif)
    draft = with_picture(jpeg_object(data, (70, 100)))
    assert draft.media[0].read() != data
    assert np.abs(decoded(draft).astype(int) - picture).mean() < 4
    file = BytesIO()
    Image.fromarray(picture).convert("CMYK").save(file, "JPEG", quality=95)
    draft = with_picture(jpeg_object(file.getvalue(), (70, 100), "DeviceCMYK"))
    assert Image.open(BytesIO(draft.media[0].read())).mode == "RGB"


def test_transparency_is_laid_over_white() -> None:
    picture = smooth(70, 100)
    alpha = np.zeros((70, 100), dtype=np.uint8)
    alpha[:, 30:] = 255
    alpha[:, 60:] = 128
    found = decoded(with_picture(image_object(picture), image_object(alpha))).astype(int)
    share = alpha[..., None] / 255
    wanted = picture * share + 255 * (1 - share)
    assert np.abs(found - wanted).max() <= 2


def test_decoration_is_left_out() -> None:
    page = Page()
    page.image(image_object(noise(100, 80, 1)), "400 0 0 500 0 0")  # the background
    page.image(image_object(noise(63, 200, 2)), "200 0 0 63 40 40")  # too few pixels
    page.image(image_object(noise(200, 200, 3)), "30 0 0 30 40 110")  # shown too small
    page.image(image_object(np.full((80, 80, 3), 200, np.uint8)), "80 0 0 80 200 110")  # a panel
    page.image(image_object(noise(80, 80, 5)), "80 0 0 80 500 110")  # off the page
    page.image(image_object(noise(64, 64, 4)), "80 0 0 80 300 110")
    page.paragraph(40, 470, prose(1, 20))
    draft = one(pdf(page))
    assert len(draft.media) == 1
    np.testing.assert_array_equal(decoded(draft), noise(64, 64, 4))
    small = PdfSettings(min_picture_side=63, min_picture_points=20)
    assert len(one(pdf(page), small).media) == 3


def test_a_picture_on_every_page_is_given_once() -> None:
    pages = []
    for number in range(3):
        page = Page()
        page.image(image_object(noise(64, 64)), "60 0 0 60 300 400")
        page.paragraph(40, 350, f"Page {number}: {prose(number, 20)}")
        pages.append(page)
    assert len(one(pdf(*pages)).media) == 1
    alike = noise(100, 100)
    alike[0, 0] ^= 1
    pages[-1] = Page()
    pages[-1].paragraph(40, 300, prose(9, 20))
    pages[-1].image(image_object(alike), "100 0 0 100 50 400")
    assert len(one(pdf(*pages)).media) == 2


def test_a_picture_that_was_left_out_is_given_where_it_comes_again() -> None:
    """Alone under a running head, on a page that makes no draft; then beside text."""
    pages = []
    for number in range(6):
        page = Page()
        page.paragraph(40, 480, "Journal of things")
        if number != 2:
            page.paragraph(40, 300, prose(number, 20))
        if number in (2, 4):
            page.image(image_object(noise(100, 100)), "100 0 0 100 50 150")
        pages.append(page)
    drafts = interleaved_documents(pdf(*pages), "a.pdf", PdfSettings(pages_per_draft=1))
    entries = [json.loads(draft.entry) for draft in drafts]
    assert [entry["first_page"] for entry in entries] == [1, 2, 4, 5, 6]
    assert [len(draft.media) for draft in drafts] == [0, 0, 0, 1, 0]
    alone = "pictures without text to learn on any of 1 pages (pages_per_draft)"
    assert all(entry["left_out"] == {alone: 1} for entry in entries)


def test_a_page_without_text_is_one_picture() -> None:
    scan, empty, written = Page(), Page(), Page()
    scan.content.append("0 0 1 rg 50 60 200 300 re f")
    written.paragraph(40, 470, prose(1, 20))
    draft = one(pdf(scan, empty, written))
    assert content(draft) == [0, f"\n\n{prose(1, 20)}"]
    np.testing.assert_array_equal(decoded(draft), render(pdf(scan)))
    with pytest.raises(DataError, match=r"^a\.pdf: pictures without text to learn"):
        interleaved_documents(pdf(scan, empty), "a.pdf")
    with pytest.raises(DataError, match=r"^a\.pdf: none of its 1 pages can be used \(all empty\)"):
        interleaved_documents(pdf(empty), "a.pdf")


def test_a_page_whose_text_is_garbage_is_left_out() -> None:
    page = Page()
    page.paragraph(40, 470, prose(1, 20))
    codes = "".join(f"/g{number}" for number in range(26))
    garbage = f"/Encoding<</Type/Encoding/Differences[97{codes}]>>"
    with pytest.raises(DataError, match="1: text without a meaning"):
        interleaved_documents(pdf(page, font_extra=garbage), "a.pdf")
    lenient = PdfSettings(max_unmapped=1.0)
    assert len(interleaved_documents(pdf(page, font_extra=garbage), "a.pdf", lenient)) == 1


def numbered(pages: int) -> list[Page]:
    """Pages with a head, a foot and a paragraph that goes on to the next page."""
    made = []
    for number in range(pages):
        page = Page()
        page.text(150, 480, "A running head", "Times-Italic", 9)
        page.text(190, 15, f"{number + 1}", "Times-Roman", 9)
        page.paragraph(40, 420, f"Chapter. {prose(number, 30)}")
        page.text(40, 70, "This paragraph goes on and on until the page is")
        page.text(40, 58, "full, since the harbour")
        made.append(page)
        last = Page()
        last.text(150, 480, "A running head", "Times-Italic", 9)
        last.text(190, 15, f"{number + 2}", "Times-Roman", 9)
        last.text(40, 420, "was so quiet.")
        made.append(last)
    return made


def test_heads_and_feet_go_and_paragraphs_go_on() -> None:
    said = "This paragraph goes on and on until the page is full, since the harbour was so quiet."
    wanted = "\n\n".join(f"Chapter. {prose(number, 30)}\n\n{said}" for number in range(3))
    assert text(pdf(*numbered(3))) == wanted


def test_long_documents_become_several_drafts_and_are_cut() -> None:
    pages = []
    for number in range(7):
        page = Page()
        page.paragraph(40, 350, f"Page {number}. {prose(number, 20)}")
        pages.append(page)
    settings = PdfSettings(pages_per_draft=2, max_pages=5)
    drafts = interleaved_documents(pdf(*pages), "a.pdf", settings)
    entries = [json.loads(draft.entry) for draft in drafts]
    assert [(e["first_page"], e["last_page"]) for e in entries] == [(1, 2), (3, 4), (5, 5)]
    assert entries[0]["pages"] == 7
    assert entries[0]["left_out"] == {"after the first 5 (max_pages)": 2}
    assert all(draft.parts[-1] == Special("eos", True) for draft in drafts)
    assert content(drafts[1]) == [
        "\n\n".join(f"Page {number}. {prose(number, 20)}" for number in (2, 3))
    ]


def test_bytes_of_pictures_are_bounded() -> None:
    pages = []
    for number in range(4):
        page = Page()
        page.paragraph(40, 470, f"Page {number}. {prose(number, 20)}")
        page.image(image_object(noise(100, 100, number)), "100 0 0 100 40 100")
        pages.append(page)
    one_page = len(zlib.compress(noise(100, 100).tobytes()))
    draft = one(pdf(*pages), PdfSettings(max_bytes=int(2.5 * one_page)))
    assert len(draft.media) == 2
    (reason,) = json.loads(draft.entry)["left_out"].items()
    assert reason == (f"pictures before it reach max_bytes {int(2.5 * one_page)}", 2)
