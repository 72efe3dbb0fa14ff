"""Every kind of sample: trained on with the others, held out with a loss of its own, and shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.config import load_recipe
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.format import STILL
from megatron_vlm.data.index import open_dataset
from megatron_vlm.platform import World
from tests.data.kinds import KINDS, build_kinds
from tests.data.look.pages import Page, PageLine
from tests.data.pdf_files import prose
from tests.ranks import run_ranks
from tests.training.driver import with_run

if TYPE_CHECKING:
    from megatron_vlm.evaluation.generate import Answerer

RECIPE = """
model: dots-vlm-nano
training:
  train_iters: 2
  seq_length: 1024
  global_batch_size: 4
  precision: fp64
optimizer: {lr: 1.0e-3, lr_warmup_iters: 0}
data:
  pad_multiple: 16
  shuffle: false
  mixture_unit: samples
"""
FRAMES = "".join(f"[{second}.0 second](frame 4)" for second in range(4))
SHOWN = {
    "text": "A{ document of plain text.<|eos|>}",
    "megatron": "t{okens of a document<|eos|>}",
    "conversation": "<|user|>(6)\nWhat?<|end|><|assistant|>{Noise.<|end|><|eos|>}",
    "several_pictures": "<|user|>(6) or (8)?<|end|><|assistant|>{Both.<|end|><|eos|>}",
    "video": f"<|user|>{FRAMES} What?<|end|><|assistant|>{{Frames.<|end|><|eos|>}}",
    "video_twice": f"<|user|>{FRAMES} {FRAMES} Same?<|end|><|assistant|>{{Yes.<|end|><|eos|>}}",
    "sessions": (
        "<|user|>first?<|end|><|assistant|>{one<|end|><|eos|>}"
        "<|user|>second?<|end|><|assistant|>{two<|end|><|eos|>}"
    ),
    "thinking": ("<|user|>2+2?<|end|><|assistant|>{<think>\nsum\n</think>\n\n4<|end|><|eos|>}"),
    # Stored 60 x 90 pixels; in thousandths, and in pixels of what the model sees (56 x 84).
    "relative_boxes": (
        "<|user|>(6) at <point>888 832</point>?<|end|><|assistant|>"
        "{<bbox>111 83 444 500</bbox><|end|><|eos|>}"
    ),
    "absolute_boxes": (
        "<|user|>(6) at <point>75 47</point>?<|end|><|assistant|>"
        "{<bbox>9 5 37 28</bbox><|end|><|eos|>}"
    ),
    "counting": (
        "<|user|>(6) Cats?<|end|><|assistant|>"
        "{<point>222 166</point> <point>666 500</point> 2<|end|><|eos|>}"
    ),
    "depth": (
        "<|user|>(6) How far is <point>222 166</point>?<|end|><|assistant|>"
        "{<depth>3.50</depth><|end|><|eos|>}"
    ),
    "box3d": (
        "<|user|>(6) Where?<|end|><|assistant|>"
        "{<bbox3d>0.50 1.00 2.00 1.00 1.00 2.00 0.00 0.00 0.25</bbox3d><|end|><|eos|>}"
    ),
    "interleaved": "B{efore.}(8){After.<|eos|>}",
    "pdf_masked": (
        "<|user|>(56)\nParts of this page are covered. Write the text under each cover, in reading "
        f"order.<|end|><|assistant|>{{{prose(3, 25)}<|end|><|eos|>}}"
    ),
    "pdf_interleaved": (
        f"Y{{{''.join(prose(n, 25) + chr(10) * 2 for n in range(4))[1:]}}}(6){{<|eos|>}}"
    ),
    "preference": "<|user|>(6)\nq<|end|><|assistant|>{good<|end|><|eos|>}",
    "trajectory": (
        "<|user|>do it\n(6)<|end|><|assistant|>Thought: look\n{Action: click(3)<|end|>}"
        "<|user|>(8)<|end|><|assistant|>{Action: done()<|end|><|eos|>}"
    ),
    "webdataset": "(2){a caption<|eos|>}",
    "energon": "(2){energon 0<|eos|>}",
}
"""The first sample of each kind as the page has it: pictures as their tokens in parentheses, what
is learned in braces."""
MARKS = {
    "relative_boxes": ["M888 832h0", "111 83 333 417"],
    "absolute_boxes": ["M75 47h0", "9 5 28 23"],
    "counting": ["M222 166h0", "M666 500h0"],
    "depth": ["M222 166h0"],
}
"""What is drawn on the first picture: points, and boxes as x, y, width and height."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_kinds(tmp_path_factory.mktemp("kinds"))


def _recipe(folder: Path, train: dict[str, Path], held_out: dict[str, Path]) -> Path:
    lines = [RECIPE.rstrip(), "  train:"]
    for name, path in train.items():
        untie = ", untie: {probability: 1.0}" if name == "knots" else ""
        lines.append(f"    {name}: {{path: {path}{untie}}}")
    lines.append("  validation:" if held_out else "  validation: {}")
    lines += [f"    {name}: {path}" for name, path in held_out.items()]
    path = folder / "recipe.yaml"
    path.write_text("\n".join([*lines, f"run_dir: {folder / 'run'}"]) + "\n")
    return path


@pytest.mark.distributed
def test_each_has_its_own_held_out_loss(sets: dict[str, Path], tmp_path: Path) -> None:
    """That of its samples one by one, each picture and frame read by other means."""
    held_out = {name: sets[name] for name in KINDS}
    config = load_recipe(_recipe(tmp_path, sets, held_out))
    sources = with_run(config, _run, 2)[0]
    assert sources == set(sets)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in lines)
    assert first["images"] and last["images"] and last["failed_samples"] == 0
    assert not any(name.startswith("validation") for name in first)
    found = {
        name.removeprefix("validation_loss_"): value
        for name, value in last.items()
        if name.startswith("validation_loss_")
    }
    assert found.keys() == KINDS.keys()
    assert all(map(math.isfinite, found.values()))
    (expected,) = run_ranks(1, _alone, tmp_path / "run", held_out)
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, rel=1e-9), name
    assert len(set(found.values())) == len(KINDS)


def _run(run: Any) -> set[str]:
    """Train to the end; names of the sources that were trained on."""
    wanted = run.config.training.train_iters * run.config.training.global_batch_size
    rows, _ = run.data.stream.take(run.data.stream.start(), wanted)
    run.run()
    names = [source.name for source in run.data.stream.sources]
    return {names[source] for row in rows for source in row.source.tolist()}


def _alone(world: World, run_dir: Path, paths: dict[str, Path]) -> dict[str, float]:
    """The mean over target tokens, every sample in a forward pass of its own."""
    from megatron_vlm.evaluation.generate import Answerer

    losses = {}
    with Answerer.from_checkpoint(run_dir) as answerer:
        for name, path in paths.items():
            reader, total, count = SampleReader(open_dataset(path)), 0.0, 0
            # A pair's rejected answer comes behind its chosen one, which alone is learned.
            every = 2 if reader.index.kind == "preference" else 1
            for sample in range(0, reader.index.num_samples, every):
                ids, flags = reader.read_tokens(sample)
                each, learned = _losses(answerer, ids, flags, _shown(reader, sample))
                total, count = total + float(each[learned].sum()), count + int(learned.sum())
            losses[name] = total / count
    return losses


@torch.no_grad()
def _losses(
    answerer: Answerer, ids: np.ndarray, flags: np.ndarray, pictures: tuple[bytes, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token but the first: its loss, and whether it is learned."""
    from megatron_vlm.evaluation.generate import Question, _expand

    prompt = answerer._prompt(Question("", pictures))
    image = answerer.tokenizer.image_id
    expanded, places = _expand(ids.tolist(), prompt.counts, image)
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == image] = prompt.counts
    hidden, _ = answerer._hidden([replace(prompt, ids=expanded, places=places)], [[]])
    # Rows of the embedding that no token has are never answered, but the loss counts them.
    logits = hidden @ answerer._decoder.output_layer.weight.T
    learned = torch.from_numpy(np.repeat(flags, repeats)[1:] == 1)
    targets = torch.tensor(expanded[1:])
    return F.cross_entropy(logits[:-1], targets, reduction="none"), learned


def _shown(reader: SampleReader, sample: int) -> tuple[bytes, ...]:
    """A sample's pictures as files, frames of videos taken out by their time stamps."""
    shown = []
    for ordinal, number in enumerate(reader.index.picture_range(sample)):
        encoded = reader.read_encoded(sample, ordinal)
        pts = int(reader.index.columns.picture_pts[number])
        if pts != STILL:
            with av.open(BytesIO(encoded)) as file:
                frame = next(frame for frame in file.decode(video=0) if frame.pts == pts)
            buffer = BytesIO()
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(buffer, "PNG")
            encoded = buffer.getvalue()
        shown.append(encoded)
    return tuple(shown)


@pytest.mark.unit
@pytest.mark.parametrize("kind", [*KINDS, "knots"])
def test_each_is_shown(kind: str, sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, {kind: sets[kind]}, {})
    out = tmp_path / "rows.html"
    assert main(["data", "show", str(recipe), "--out", str(out), "--rows", "1"]) == 0
    (row,) = Page(out.read_text(encoding="utf-8")).rows
    assert not row.failures
    starts = [number for number, line in enumerate(row.lines) if line.position == 0]
    if kind == "knots":
        assert len(starts) == 1
        said = _written(row.lines)
        # Heads of chunks are not learned: nothing before them tells what they are.
        assert "<|knot_head|>4{ 4 4 4" in said and "4 }<|knot_tail|><|knot_head|>6{" in said
        return
    end = starts[1] if len(starts) > 1 else len(row.lines)
    first = row.lines[:end]
    assert _written(first) == SHOWN[kind]
    tokens = [token for line in first for token in line.tokens]
    pictures = [token for token in tokens if token.image is not None]
    assert all(str(token.image).startswith("data:image/png;base64,") for token in pictures)
    marks = [
        mark.get("d") or " ".join(mark[key] for key in ("x", "y", "width", "height"))
        for token in pictures[:1]
        for mark in token.marks
    ]
    assert marks == MARKS.get(kind, [])
    if "video" in kind:
        # As often as it was drawn: none is blank.
        shown = [token.image for line in row.lines for token in line.tokens if token.image]
        assert len(shown) > 4 and shown == shown[:4] * (len(shown) // 4)
        assert len(set(shown)) == 4
    # The next sample begins behind the padding, at position 0.
    length = sum(token.tokens for token in tokens if token.kind != "pad")
    if end < len(row.lines):
        assert row.lines[end].first == -(-length // 16) * 16


def _written(lines: list[PageLine]) -> str:
    """Tokens as in `SHOWN`."""
    text, learned = "", False
    for token in (token for line in lines for token in line.tokens):
        if token.kind == "pad":
            continue
        if (token.tag == "b") != learned:
            learned = not learned
            text += "{" if learned else "}"
        frame = "frame " if "frame" in token.kind else ""
        text += token.text if token.image is None else f"({frame}{token.tokens})"
    return text + "}" * learned
