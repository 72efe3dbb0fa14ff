"""PDF files as a source, and files that are damaged, hostile, or too much."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_vlm.data.draft import Draft, Source, Text
from megatron_vlm.data.pdf import pool
from megatron_vlm.data.pdf.interleaved import interleaved_documents
from megatron_vlm.data.pdf.masked import masked_pages
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.data.pdf.source import PdfSource
from megatron_vlm.errors import DataError
from tests.data.pdf_files import (
    Page,
    assemble,
    encrypted_pdf,
    image_object,
    jpeg_object,
    pdf,
    prose,
    stream,
)

pytestmark = pytest.mark.unit

SMALL = PdfSettings(dpi=72, covered_share=0.5)


def page(seed: int) -> Page:
    made = Page()
    y = 470.0
    for number in range(4):
        y = made.paragraph(40, y, prose(10 * seed + number, 20)) - 8
    return made


def learned(draft: Draft) -> str:
    return "".join(p.text for p in draft.parts if isinstance(p, Text) and p.learned)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for seed, name in enumerate(("c.pdf", "a.PDF", "b/x.pdf", "b/deep/y.pdf")):
        (tmp_path / name).write_bytes(pdf(page(seed), page(seed + 50)))
    (tmp_path / "notes.txt").write_text("not a PDF")
    return tmp_path


def test_files_come_sorted_and_from_any_entry_on(folder: Path) -> None:
    source: Source = PdfSource(folder, "masked", SMALL)
    names = ["a.PDF", "b/deep/y.pdf", "b/x.pdf", "c.pdf"]
    assert source.kind == "conversation"
    assert source.total == 4
    # Not where they lie: the same files elsewhere give the same bytes.
    assert list(source.origins) == names
    entries = list(source.entries())
    assert [(e.number, e.origin, e.id) for e in entries] == [
        (number, number, name) for number, name in enumerate(names)
    ]
    whole = [[draft.entry for draft in entry.drafts()] for entry in entries]
    assert [len(drafts) for drafts in whole] == [2] * 4
    assert json.loads(whole[1][1])["file"] == "b/deep/y.pdf"
    for start in range(5):
        later = list(source.entries(start))
        assert [entry.number for entry in later] == list(range(start, 4))
        assert [[d.entry for d in entry.drafts()] for entry in later] == whole[start:]


def test_a_moved_folder_draws_the_same(folder: Path) -> None:
    first = [d.entry for e in PdfSource(folder, "masked", SMALL).entries() for d in e.drafts()]
    moved = folder.rename(folder.parent / "moved")
    again = [d.entry for e in PdfSource(moved, "masked", SMALL).entries() for d in e.drafts()]
    assert first == again


def test_a_file_or_a_list(folder: Path) -> None:
    source = PdfSource(folder / "c.pdf", "interleaved")
    assert (source.kind, source.total) == ("document", 1)
    (entry,) = source.entries()
    (draft,) = entry.drafts()
    assert prose(0, 20) in learned(draft)
    listed = PdfSource([folder / "c.pdf", folder / "b"], "interleaved")
    assert [entry.id for entry in listed.entries()] == ["c.pdf", "deep/y.pdf", "x.pdf"]


def test_what_cannot_be_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no such file or folder"):
        PdfSource(tmp_path / "none.pdf", "masked")
    with pytest.raises(DataError, match=r"holds no file whose name ends in \.pdf"):
        PdfSource(tmp_path, "masked")
    with pytest.raises(DataError, match="empty list"):
        PdfSource([], "masked")
    with pytest.raises(DataError, match="PDF mode 'ocr': expected one of masked, interleaved"):
        PdfSource(tmp_path, "ocr")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'megatron-vlm\[pdf\]'"):
        PdfSource(tmp_path, "masked")


def test_a_bad_file_is_a_bad_entry(folder: Path) -> None:
    os.mkfifo(folder / "pipe.pdf")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "text.pdf").write_text("not a PDF")
    source = PdfSource(folder, "interleaved")
    (folder / "c.pdf").unlink()
    reasons = {}
    for entry in source.entries():
        try:
            entry.drafts()
        except DataError as error:
            reasons[entry.id] = str(error)
    assert set(reasons) == {"pipe.pdf", "empty.pdf", "text.pdf", "c.pdf"}
    assert "not a regular file" in reasons["pipe.pdf"]
    assert "cannot be read" in reasons["c.pdf"]
    for name in ("empty.pdf", "text.pdf"):
        assert reasons[name] == f"{name}: not a PDF, or damaged"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_pages", 0), ("dpi", float("nan")), ("covered_share", 1.5), ("cover_gray", 256),
     ("longest_side", 1), ("seconds", 0), ("max_page_pixels", 10**9)],
)  # fmt: skip
def test_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(DataError, match=f"PDF setting {field}: "):
        PdfSettings(**{field: value})


def test_encrypted_files() -> None:
    text = "The meadow was quiet"
    (draft,) = interleaved_documents(encrypted_pdf(text, b""), "a.pdf")
    assert learned(draft) == text
    with pytest.raises(DataError, match=r"^a\.pdf: PDF needs a password"):
        interleaved_documents(encrypted_pdf(text, b"secret"), "a.pdf")


def test_files_without_pages_and_with_too_many() -> None:
    empty = assemble([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"])
    with pytest.raises(DataError, match=r"^a\.pdf: "):
        masked_pages(empty, "a.pdf")
    kids = " ".join(f"{3 + number} 0 R" for number in range(10_000))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count 10000>>".encode(),
        *[
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 200]/Contents 10003 0 R"
            b"/Resources<</Font<</F0 10004 0 R>>>>>>"
        ]
        * 10_000,
        stream(b"BT /F0 12 Tf 20 100 Td (The meadow was quiet.) Tj ET"),
        b"<</Type/Font/Subtype/Type1/BaseFont/Courier>>",
    ]
    drafts = interleaved_documents(assemble(objects), "a.pdf", PdfSettings(max_pages=40))
    assert len(drafts) == 2
    assert json.loads(drafts[0].entry)["left_out"] == {"after the first 40 (max_pages)": 9960}
    claimed = assemble([objects[0], b"<</Type/Pages/Kids[]/Count 100000000>>"])
    with pytest.raises(DataError, match=r"^a\.pdf: "):
        masked_pages(claimed, "a.pdf", PdfSettings(max_pages=50))


@pytest.mark.parametrize(
    "box",
    ["0 0 0 0", "0 0 1e30 1e30", "0 0 1e-9 400", "0 0 14400 14400", "400 500 0 0", "0 0 5 14400"],
)
@pytest.mark.parametrize("mode", [masked_pages, interleaved_documents])
def test_strange_page_boxes(box: str, mode: type) -> None:
    file = pdf(page(1)).replace(b"0 0 400 500", box.encode())
    try:
        drafts = mode(file, "a.pdf", PdfSettings(max_page_pixels=1_000_000))
    except DataError as error:
        assert str(error).startswith("a.pdf: ")
    else:
        assert drafts


def busy() -> bytes:
    """A page that takes long to paint: many large, transparent, shaded squares."""
    made = page(1)
    made.content.insert(0, "0 0 1 rg " + "0 0 m 400 500 l 400 0 l 0 500 l f* " * 60_000)
    return pdf(made)


def test_a_document_that_takes_too_long_is_given_up() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"^a\.pdf: PDF took longer than 0\.5 s"):
        masked_pages(busy(), "a.pdf", PdfSettings(seconds=0.5, dpi=288))
    assert time.monotonic() - start < 20
    assert not children(busy_for=0.4), "nobody works on it any more"
    assert masked_pages(pdf(page(1)), "b.pdf", SMALL), "the next document is read"


def children(busy_for: float = 0.0) -> list[psutil.Process]:
    """This process's children for PDF files that have used so many seconds of a core."""
    found = []
    for child in psutil.Process().children():
        try:
            if pool._MODULE in child.cmdline() and child.cpu_times().user >= busy_for:
                found.append(child)
        except psutil.NoSuchProcess:  # or a zombie
            continue
    return found


def test_a_child_that_dies_is_replaced_and_a_document_that_kills_two_is_bad() -> None:
    wanted = [draft.entry for draft in masked_pages(pdf(page(1)), "a.pdf", SMALL)]
    for child in children():
        child.kill()
    assert [draft.entry for draft in masked_pages(pdf(page(1)), "a.pdf", SMALL)] == wanted

    # What a crash looks like: whoever works on this document is killed.
    done = threading.Event()

    def kill() -> None:
        while not done.is_set():
            for child in children(busy_for=0.6):
                child.kill()
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(
            DataError, match=r"^a\.pdf: PDF makes the PDF library crash \(SIGKILL\)"
        ):
            masked_pages(busy(), "a.pdf", PdfSettings(dpi=288))
    finally:
        done.set()
        killer.join()
    assert [draft.entry for draft in masked_pages(pdf(page(1)), "a.pdf", SMALL)] == wanted


def test_memory_is_bounded() -> None:
    """An embedded picture of 25 GB costs an answer, and neither this process nor the machine."""
    made = page(1)
    item = image_object(np.zeros((1, 1, 3), dtype=np.uint8))
    item = item.replace(b"/Width 1/Height 1", b"/Width 90000/Height 90000")
    made.image(item, "300 0 0 300 40 40")
    for read in (masked_pages, interleaved_documents):
        try:
            assert read(pdf(made), "a.pdf", PdfSettings(memory_bytes=2**30))
        except DataError as error:
            assert str(error).startswith("a.pdf: ")
    assert masked_pages(pdf(page(1)), "b.pdf", SMALL)


def test_threads_read_side_by_side() -> None:
    files = [pdf(page(seed)) for seed in range(12)]
    wanted = [[d.media[0].read() for d in masked_pages(file, "a.pdf", SMALL)] for file in files]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda file: masked_pages(file, "a.pdf", SMALL), files))
    assert [[draft.media[0].read() for draft in drafts] for drafts in found] == wanted
    assert len(children()) <= 5


def test_children_belong_to_one_process_leave_with_it_and_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(page(1)))
    script = textwrap.dedent(
        """
        import json, os, sys
        import psutil
        from pathlib import Path
        from megatron_vlm.data.pdf.masked import masked_pages
        import megatron_vlm.data.pdf.child
        assert "torch" not in sys.modules
        file = Path(sys.argv[1]).read_bytes()
        masked_pages(file, "first.pdf")
        pid = os.fork()
        if pid == 0:
            masked_pages(file, "second.pdf")
            # Not that of the process it was forked from, which would mix their answers up.
            os._exit(not psutil.Process().children())
        assert os.waitpid(pid, 0)[1] == 0
        (draft,) = masked_pages(file, "third.pdf")
        assert json.loads(draft.entry)["file"] == "third.pdf"
        print(*[child.pid for child in psutil.Process().children()])
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script, str(tmp_path / "a.pdf")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (left,) = map(int, done.stdout.split())
    assert not psutil.pid_exists(left)


def test_a_child_that_does_not_start_is_no_fault_of_the_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_vlm.errors import TaskFailed

    pool._POOL.close()
    monkeypatch.setattr(pool, "_MODULE", "megatron_vlm.data.pdf.nowhere")
    with pytest.raises(TaskFailed, match="process for PDF files does not start: .*nowhere"):
        masked_pages(pdf(page(1)), "a.pdf")


def mutations(number: int) -> list[bytes]:
    rng = np.random.default_rng(2024)
    rich = page(1)
    data = _jpeg()
    rich.image(jpeg_object(data, (64, 64)), "80 0 0 80 60 30")
    rich.image(
        image_object(np.arange(64 * 64, dtype=np.uint32).astype(np.uint8).reshape(64, 64)),
        "80 0 0 80 200 30",
    )
    originals = [pdf(rich, page(2)), pdf(Page(form=True, content=rich.content, fonts=rich.fonts))]
    originals.append(_matplotlib())
    made = []
    for i in range(number):
        file = bytearray(originals[i % len(originals)])
        kind = i // len(originals) % 5
        if kind == 0:
            file = file[: rng.integers(len(file))]
        elif kind == 1:
            for place in rng.integers(len(file), size=rng.integers(1, 200)):
                file[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            start = int(rng.integers(len(file)))
            end = start + int(rng.integers(1, 2000))
            file[start:end] = bytes(len(file[start:end]))
        elif kind == 3:
            start, other = (int(x) for x in rng.integers(len(file), size=2))
            file[start:start] = file[other : other + 500]
        else:
            digits = [p for p, byte in enumerate(file) if 48 <= byte < 58]
            for place in rng.choice(digits, size=rng.integers(1, 30)):
                file[place] = 48 + int(rng.integers(10))
        made.append(bytes(file))
    return made


def _jpeg() -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    shades = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)
    Image.fromarray(shades).save(file, "JPEG")
    return file.getvalue()


def _matplotlib() -> bytes:
    from io import BytesIO

    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    for number in range(8):
        figure.text(0.1, 0.9 - 0.1 * number, prose(number, 5), size=8)
    file = BytesIO()
    FigureCanvasPdf(figure).print_pdf(file)
    return file.getvalue()


def test_no_damage_hurts(capfd: pytest.CaptureFixture[str]) -> None:
    settings = PdfSettings(dpi=60, seconds=20, max_page_pixels=500_000)
    outcomes = {"drafts": 0, "bad": 0}
    for number, file in enumerate(mutations(200)):
        read = (masked_pages, interleaved_documents)[number // 15 % 2]
        name = f"file {number}.pdf"
        try:
            drafts = read(file, name, settings)
        except DataError as error:
            assert str(error).startswith(f"{name}: ")
            assert "\n" not in str(error)
            outcomes["bad"] += 1
            continue
        assert drafts
        for draft in drafts:
            assert json.loads(draft.entry)["file"] == name
            assert all(len(medium.read()) == medium.size for medium in draft.media)
        outcomes["drafts"] += 1
    assert min(outcomes.values()) > 30, outcomes
    assert capfd.readouterr().err == ""
