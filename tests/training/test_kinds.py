"""Every kind of sample: trained on with the others, held out with a loss of its own, and shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F

from megatron_vlm.cli.main import main
from megatron_vlm.config import load_recipe
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import open_dataset
from megatron_vlm.platform import World
from tests.data.kinds import KINDS, build_kinds
from tests.data.look.pages import Page
from tests.ranks import run_ranks
from tests.training.driver import with_run

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
SAID = {
    "text": "A document of plain text.",
    "megatron": "tokens of a document",
    "conversation": "Noise.",
    "several_pictures": "Both.",
    "video": "Frames.",
    "sessions": "second?",
    "thinking": "<think>\nsum\n</think>",
    # Stored 60 x 90 pixels; in thousandths, and in pixels of what the model sees (56 x 84).
    "relative_boxes": "<bbox>111 83 444 500</bbox>",
    "absolute_boxes": "<bbox>9 5 37 28</bbox>",
    "counting": "2",
    "depth": "<depth>3.50</depth>",
    "box3d": "<bbox3d>",
    "interleaved": "After.",
    "pdf_masked": "Parts of this page are covered.",
    "pdf_interleaved": "Yellow kettle letter",
    "preference": "good",
    "trajectory": "Action: click(3)",
    "webdataset": "a caption",
    "energon": "energon 0",
}
"""What a sample of each kind says."""


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


def _metrics(run: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    run.run(on_step=lambda metrics: seen.append(dict(metrics)))
    return seen


@pytest.mark.distributed
def test_each_has_its_own_held_out_loss(sets: dict[str, Path], tmp_path: Path) -> None:
    held_out = {name: sets[name] for name in KINDS}
    config = load_recipe(_recipe(tmp_path, sets, held_out))
    metrics = with_run(config, _metrics, 2)[0]
    assert len(metrics) == 2 and metrics[-1]["images"] > 10
    found = {
        name.removeprefix("validation_loss_"): value
        for name, value in metrics[-1].items()
        if name.startswith("validation_loss_")
    }
    assert found.keys() == KINDS.keys()
    assert np.isfinite(list(found.values())).all() and len(set(found.values())) > len(KINDS) - 2
    texts = ("text", "megatron", "sessions", "thinking")
    (expected,) = run_ranks(1, _alone, tmp_path / "run", [sets[name] for name in texts])
    for name, loss in zip(texts, expected, strict=True):
        assert found[name] == pytest.approx(loss, rel=1e-9), name


def _alone(world: World, run_dir: Path, paths: list[Path]) -> list[float]:
    """The mean over target tokens, every sample in a forward pass of its own."""
    import torch

    from megatron_vlm.evaluation.generate import Answerer

    losses = []
    with Answerer.from_checkpoint(run_dir) as answerer:
        # Answers never are rows of the embedding that no token has; the loss counts them.
        rows = answerer.config.model.language.vocab_size
        answerer.tokenizer = SimpleNamespace(vocab_size=rows)  # type: ignore[assignment]
        for path in paths:
            reader, total, count = SampleReader(open_dataset(path)), 0.0, 0
            for sample in range(reader.index.num_samples):
                ids, flags = reader.read_tokens(sample)
                ((_, logits),) = answerer.logits([ids.tolist()])
                each = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]).long(), reduction="none")
                learned = torch.tensor(flags[1:]) == 1
                total, count = total + float(each[learned].sum()), count + int(learned.sum())
            losses.append(total / count)
    return losses


@pytest.mark.unit
@pytest.mark.parametrize("kind", [*KINDS, "knots"])
def test_each_is_shown(kind: str, sets: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, {kind: sets[kind]}, {})
    out = tmp_path / "rows.html"
    assert main(["data", "show", str(recipe), "--out", str(out), "--rows", "1"]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert not page.rows[0].failures
    tokens = [token for row in page.rows for line in row.lines for token in line.tokens]
    said = "".join(token.text for token in tokens)
    index = open_dataset(sets[kind])
    pictures = [token for token in tokens if token.image is not None]
    if index.num_pictures:
        first = index.picture_range(0)
        assert len(pictures) >= first.stop - first.start > 0
        assert all(str(token.image).startswith("data:image/png;base64,") for token in pictures)
    else:
        assert not pictures
    # Some of it is learned, and nothing of a conversation's questions.
    learned = "".join(token.text for token in tokens if token.tag == "b")
    assert learned
    if kind == "knots":
        assert "<|knot_head|>4 4 4" in said and "4 <|knot_tail|><|knot_head|>6" in said
        return
    assert SAID[kind] in said
    if index.kind in ("conversation", "trajectory", "preference"):
        assert learned != said and "<|user|>" in said and "<|user|>" not in learned
    if kind == "video":
        assert any("frame" in token.kind for token in pictures) and "second" in said
    if kind in ("relative_boxes", "absolute_boxes"):
        assert any(token.marks for token in pictures)
