"""The page of rows, read back and compared with what the loader gives for the same rows."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from base64 import b64decode, b64encode
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.data.decoders import CpuDecoder
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.look.entries import entry_id, read_entry
from megatron_vlm.data.pictures import cut
from megatron_vlm.data.row_table import untied_layout
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.data.untie import Slice
from megatron_vlm.training.datasets import OpenData, open_training_data
from tests.data.look.pages import HOSTILE, Page, PageRow, write_sets

pytestmark = pytest.mark.unit

PAD = 256


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def show(recipe: Path, out: Path, *options: str) -> Page:
    assert main(["data", "show", str(recipe), "--out", str(out), *options]) == 0
    return Page(out.read_text(encoding="utf-8"))


def load(recipe: Path, rows: int, start: int = 0) -> tuple[LoadedStep, OpenData, RunConfig]:
    """The same rows as one batch of one micro-batch."""
    config = load_recipe(recipe)
    data = open_training_data(config)
    cursor = data.stream.take(data.stream.start(), start)[1]
    loader = StepLoader(
        data.stream, data.readers, RankView.alone(), cursor, global_batch_size=rows,
        micro_batch_size=rows, vision=config.model.vision, decoder=CpuDecoder(), prefetch_steps=0,
    )  # fmt: skip
    with loader:
        return next(loader), data, config


def plain_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Bytes as UTF-8, special tokens spelled; what has no shape as its code point."""
    text = b"".join(
        bytes([i]) if i < 256 else tokenizer.decode([i], False).encode() for i in ids
    ).decode()
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "".join(
        f"[U+{ord(c):04X}]" if unicodedata.category(c) in hidden and c not in "\n\t" else c
        for c in text
    )


def check_row(row: PageRow, step: LoadedStep, number: int, tokenizer: Tokenizer) -> None:
    """Ids, learned tokens, positions, their order and their text, token by token."""
    text = step.texts[0]
    assert text is not None
    length = len(text.tokens) // len(step.plan.micro_batches[0][0].rows)
    part = slice(number * length, (number + 1) * length)
    ids, learned, positions = row.layout(length, PAD)
    assert ids.tolist() == text.tokens[part].tolist()
    expected = torch.zeros(length, dtype=torch.bool)
    expected[1:] = text.loss_mask[part][:-1] > 0
    assert learned.tolist() == expected.tolist()
    real = positions >= 0
    assert positions[real].tolist() == text.position_ids[part].numpy()[real].tolist()
    assert (ids[~real] == PAD).all()
    for line in row.lines:
        at = 0
        for token in line.tokens:
            own = line.ids[at : at + token.tokens]
            at += token.tokens
            if token.kind.startswith("pic"):
                assert set(own) == {258}
            elif token.kind == "pad":
                assert set(own) == {PAD}
            else:
                assert token.text == plain_text(tokenizer, own)
                assert (token.kind == "s") == (own[0] > 255)


@pytest.mark.parametrize(("recipe", "rows", "start"), [("mix", 2, 0), ("untied", 4, 1)])
def test_the_page_tells_what_the_loader_gives(
    sets: Path, tmp_path: Path, recipe: str, rows: int, start: int
) -> None:
    options = ["--rows", str(rows), "--start", str(start)]
    page = show(sets / f"{recipe}.yaml", tmp_path / "rows.html", *options)
    step, data, _ = load(sets / f"{recipe}.yaml", rows, start)
    tokenizer = Tokenizer.load(data.readers[0].index.tokenizer_path)
    assert [row.number for row in page.rows] == list(range(start, start + rows))
    for number, row in enumerate(page.rows):
        check_row(row, step, number, tokenizer)
    kinds = {token.kind for row in page.rows for line in row.lines for token in line.tokens}
    assert {"", "s"} <= kinds
    assert ("pic frame tiny" in kinds) == (recipe == "mix")


def test_pictures_are_the_pixels_of_the_batch(sets: Path, tmp_path: Path) -> None:
    page = show(sets / "mix.yaml", tmp_path / "rows.html")
    step, _, config = load(sets / "mix.yaml", 2)
    vision = config.model.vision
    assert vision is not None
    shown = [
        (row.number * 4096 + place, token)
        for row in page.rows
        for line in row.lines
        for place, token in zip(
            line.first + np.cumsum([0, *(t.tokens for t in line.tokens[:-1]) ]), line.tokens,
            strict=True,
        )
        if token.image is not None
    ]  # fmt: skip
    parts = step.pictures.pixel_values.split(step.pictures.grid_hw.prod(1).tolist())
    assert len(shown) == len(parts) == 1 + 3 + 3 + 1 + 4 + 1
    seconds = []
    for (place, token), planned, part in zip(shown, step.plan.pictures, parts, strict=True):
        assert (place, token.tokens) == (planned.start, planned.tokens)
        head, content = str(token.image).split(",")
        assert head == "data:image/png;base64"
        image = np.asarray(Image.open(io.BytesIO(b64decode(content))))
        assert image.shape == (planned.grid_h * 14, planned.grid_w * 14, 3)
        assert torch.equal(torch.from_numpy(cut(image, vision)), part)
        facts = token.caption.split("|")
        assert f"{planned.grid_w} x {planned.grid_h} patches" in facts
        assert f"{planned.grid_w * 14} x {planned.grid_h * 14} pixels" in facts
        seconds += [fact for fact in facts if fact.endswith(" s")]
    assert seconds == ["0.0 s", "1.0 s", "2.0 s", "3.0 s"]


def test_boxes_and_points_are_drawn(sets: Path, tmp_path: Path) -> None:
    page = show(sets / "mix.yaml", tmp_path / "rows.html")
    marked = [t for r in page.rows for li in r.lines for t in li.tokens if t.marks]
    second, third, token = marked
    # Of several pictures, the one before the text: a box on the second, a point on the third.
    assert [m.get("width") for m in second.marks] == ["500"]
    assert [(m["class"], m["d"]) for m in third.marks] == [("learned", "M250 500h0")]
    assert second.caption.startswith("picture 2|") and third.caption.startswith("picture 3|")
    # Of a picture of 90 x 60 pixels: [10, 5, 40, 30], [0, 0, 90, 60] and (80, 50), in thousandths.
    boxes = [m for m in token.marks if "width" in m]
    assert [[int(m[k]) for k in ("x", "y", "width", "height")] for m in boxes] == [
        [111, 83, 444 - 111, 500 - 83],
        [0, 0, 999, 999],
    ]
    assert {m["class"] for m in boxes} == {"learned"}
    (point,) = [m for m in token.marks if "width" not in m]
    assert (point["class"], point["d"]) == ("context", "M888 832h0")


def test_untied_rows_tell_their_chunks(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.html"
    page = show(sets / "untied.yaml", out, "--rows", "4")
    step, data, _ = load(sets / "untied.yaml", 4)
    headings = re.findall(r"<h4>(.*?)</h4>", out.read_text())
    expected, knots = [], 0
    for row in step.plan.micro_batches[0][0].rows:
        assert row.untied
        for piece in untied_layout(data.stream, row).pieces:
            if isinstance(piece, Slice):
                total = int(row.length[piece.document])
                expected.append((piece.document + 1, piece.start, piece.stop - 1, total))
            else:
                knots += piece.__class__.__name__ == "Knot"
    found = [re.findall(r"\d+", heading) for heading in headings]
    assert [tuple(map(int, numbers)) for numbers in found] == expected
    special = [t.text for r in page.rows for li in r.lines for t in li.tokens if t.kind == "s"]
    assert sum("knot" in text or "id_" in text for text in special) == knots > 0


def test_nothing_of_the_data_is_more_than_text(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.html"
    page = show(sets / "mix.yaml", out)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "iframe", "object", "embed", "form", "base", "foreignobject"}
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = attributes.get(name, "")
            assert not value or value.startswith(
                "data:image/png;base64," if tag == "img" else "#row-"
            )
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    digests = {
        name: b64encode(sha256(page.inline[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digests['style']}'",
        f"script-src 'sha256-{digests['script']}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    content = out.read_text(encoding="utf-8")
    left = {c for c in content if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left <= {"\n", "\t"}
    labels = [a["aria-label"] for tag, a in page.tags if tag == "a"]
    assert 'm"><s>ix 0' in labels
    # The sample's id, in its title and in its entry, and its text are all there.
    assert page.text.count("document.title='owned'") >= 4
    assert "</script></style></title><script>" in page.text
    assert json.loads(read_first_entry(sets))["id"] == "text"


def read_first_entry(sets: Path) -> bytes:
    _, data, _ = load(sets / "mix.yaml", 1)
    index = data.readers[1].index
    found = read_entry(index, 0)
    assert found is not None
    return found


def test_entries_are_those_of_the_source(sets: Path) -> None:
    _, data, _ = load(sets / "mix.yaml", 1)
    for reader, name in zip(data.readers, ("docs", "mix"), strict=True):
        lines = (sets / f"{name}.jsonl").read_text().splitlines()
        for number, line in enumerate(lines):
            entry = read_entry(reader.index, number)
            assert entry is not None and json.loads(entry) == json.loads(line)
            given = json.loads(line).get("id")
            assert entry_id(entry) == (None if given is None else str(given))
    assert entry_id(b"[1]") is None and entry_id(b"{") is None and entry_id(None) is None
    assert HOSTILE.format(port=9) == entry_id(read_entry(data.readers[1].index, 1))


def test_long_entries_are_found_and_very_long_ones_let_be(tmp_path: Path) -> None:
    from tests.data.samples import build, entry

    sizes = (0, 7_000, 8_192, 70_000, 600_000, 5_000_000)
    entries = [entry("q", "a", note="\u00e9" * (size // 2)) for size in sizes]
    index = build(tmp_path, entries)
    found = [read_entry(index, number) for number in range(len(sizes))]
    assert [None if e is None else json.loads(e) for e in found[:-1]] == entries[:-1]
    assert found[-1] is None


def test_what_cannot_be_read_is_blank_and_said(tmp_path: Path) -> None:
    sets = write_sets(tmp_path)
    _, data, _ = load(sets / "mix.yaml", 1)
    index = data.readers[1].index
    columns = index.columns
    shard = index.folder / index.shard_names[0]
    content = bytearray(shard.read_bytes())
    place = int(columns.picture_offset[int(columns.sample_picture_start[2])])
    content[place : place + 60] = bytes(60)
    place = int(columns.sample_offset[0])
    content[place : place + int(columns.sample_size[0])] = bytes(int(columns.sample_size[0]))
    shard.write_bytes(content)
    page = show(sets / "mix.yaml", tmp_path / "rows.html", "--rows", "1", "data.retry_seconds=0")
    (row,) = page.rows
    assert len(row.failures) == 2
    assert "sample 0" in row.failures[0] and "tokens are damaged" in row.failures[0]
    assert "sample 2" in row.failures[1] and "picture 0" in row.failures[1]
    ids, learned, _ = row.layout(4096, PAD)
    step, _, _ = load(sets / "mix.yaml", 1)
    failed = np.zeros(len(step.plan.document_tokens), bool)
    failed[[failure.document for failure in step.failures]] = True
    step = step.without(failed, PAD)
    assert step.texts[0] is not None
    assert ids.tolist() == step.texts[0].tokens.tolist()
    assert learned.sum() == step.plan.loss_tokens == int(step.texts[0].loss_mask.sum())


def test_long_samples_stay_usable(sets: Path, tmp_path: Path) -> None:
    """Lines tell where they begin, none is long, and the middle of a long sample is folded."""
    out = tmp_path / "rows.html"
    page = show(sets / "mix.yaml", out)
    lines = [line for row in page.rows for line in row.lines]
    assert max(len(line.tokens) for line in lines) <= 240
    long = [a for t, a in page.tags if t == "div" and a.get("class") == "line"]
    assert all("data-position" in a for a in long)
    folded = re.findall(r"<summary>(\d+) lines more</summary>", out.read_text())
    assert len(folded) == 1 and int(folded[0]) > 5


def test_split_samples_and_jpeg(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.html"
    folder = str(sets / "text")
    options = ["--seq-length", "64", "--rows", "3", "data.long_samples=split"]
    assert main(["data", "show", folder, *options, "--out", str(out)]) == 0
    assert re.search(r"its tokens 64-127 of \d+", out.read_text())
    page = show(sets / "mix.yaml", out, "--jpeg", "80")
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    assert images and all(src.startswith("data:image/jpeg;base64,") for src in images)


def test_rows_of_a_folder(sets: Path, tmp_path: Path) -> None:
    """A folder is a recipe with one source: the same rows."""
    model = ["--model", "dots-vlm-demo", "--seq-length", "4096", "--seed", "5"]
    found = show(sets / "mix", tmp_path / "a.html", *model)
    config = tmp_path / "same.yaml"
    config.write_text(
        "model: dots-vlm-demo\n"
        "training: {train_iters: 1, seq_length: 4096, global_batch_size: 1, seed: 5}\n"
        f"data: {{train: {{set: {{path: {sets / 'mix'}, max_epochs: 1}}}}}}\n"
    )
    same = show(config, tmp_path / "b.html")
    assert [(r.number, r.lines) for r in found.rows] == [(r.number, r.lines) for r in same.rows]
    step, _, _ = load(config, len(found.rows))
    tokenizer = Tokenizer.load(
        open_training_data(load_recipe(config)).readers[0].index.tokenizer_path
    )
    for number, row in enumerate(islice(found.rows, 2)):
        check_row(row, step, number, tokenizer)
