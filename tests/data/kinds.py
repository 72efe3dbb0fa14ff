"""One small data set of every kind of sample, each through the builder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.load import load_model
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.tokenizer import byte_tokenizer
from tests.data.pdf_files import Page, image_object, pdf, prose
from tests.data.samples import encoded, entry, picture
from tests.data.videos import video

RULE = load_model("dots-vlm-nano").vision


BOXES = [{"box": [10, 5, 40, 30]}, {"point": [80, 50]}]
COUNTED = [{"label": "cat", "point": [20, 10]}, {"label": "cat", "box": [40, 10, 80, 50]}]


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    roles = {"user": "human", "assistant": "gpt"}
    return [{"from": roles[role], "value": text} for role, text in pairs]


def _lines(folder: Path, name: str, *entries: Any) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in entries))
    return path


def _tars(folder: Path, name: str, members: list[tuple[str, bytes]]) -> Path:
    from tests.data.sources.reading import write_tar

    return write_tar(folder / f"{name}.tar", members)


def _energon(folder: Path, name: str) -> Path:
    from tests.data.sources.test_energon import CAPTIONS, prepare

    shown = [encoded(picture(40, 60, seed), "JPEG") for seed in range(4)]
    samples = [{"jpg": jpeg, "txt": b"energon %d" % n} for n, jpeg in enumerate(shown)]
    return prepare(folder / name, samples, "CaptioningSample", CAPTIONS)


def _tokens(folder: Path, name: str) -> Path:
    from tests.data.sources.test_text import write_tokens

    documents = [[list(b"tokens of a document")], [list(b"and of another one")]]
    write_tokens(folder / name, documents)
    return folder / name


def _pdf(folder: Path, name: str) -> Path:
    page = Page()
    y = 460.0
    for number in range(4):
        y = page.paragraph(50, y, prose(number, 25)) - 20
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    page.image(image_object(pixels), "90 0 0 70 50 60")
    path = folder / f"{name}.pdf"
    path.write_bytes(pdf(page))
    return path


def _trajectory(folder: Path, name: str) -> Path:
    steps = [
        {"image": "a.png", "thought": "look", "action": "click(3)"},
        {"image": "b.png", "action": "done()"},
    ]
    return _lines(folder, name, {"instruction": "do it", "steps": steps})


def _think(folder: Path, name: str) -> Path:
    turns = _turns(("user", "2+2?"), ("assistant", "<think>\nsum\n</think>\n\n4"))
    return _lines(folder, name, {"conversations": turns})


def _sessions(folder: Path, name: str) -> Path:
    sessions = [
        _turns(("user", "first?"), ("assistant", "one")),
        _turns(("user", "second?"), ("assistant", "two")),
    ]
    return _lines(folder, name, {"sessions": sessions})


Maker = Callable[[Path, str], Path]

KINDS: dict[str, tuple[str, Maker, dict[str, Any]]] = {
    "text": ("text", lambda f, n: _lines(f, n, {"text": "A document of plain text."}), {}),
    "megatron": ("megatron", _tokens, {}),
    "conversation": (
        "conversations",
        lambda f, n: _lines(f, n, entry("<image>\nWhat?", "Noise.", ["a.png"])),
        {},
    ),
    "several_pictures": (
        "conversations",
        lambda f, n: _lines(f, n, entry("<image> or <image>?", "Both.", ["a.png", "b.png"])),
        {},
    ),
    # One sample: where it is drawn again for the same step, so is its video.
    "video": (
        "conversations",
        lambda f, n: _lines(f, n, entry("<video> What?", "Frames.", videos=["v.mp4"])),
        {},
    ),
    "video_twice": (
        "conversations",
        lambda f, n: _lines(f, n, entry("<video> <video> Same?", "Yes.", videos=["v.mp4"] * 2)),
        {"video_max_tokens": 512},
    ),
    "sessions": ("conversations", _sessions, {}),
    "thinking": ("conversations", _think, {}),
    "relative_boxes": (
        "conversations",
        lambda f, n: _lines(
            f, n, entry("<image> at <point:1>?", "<box:0>", ["a.png"], objects=BOXES)
        ),
        {},
    ),
    "absolute_boxes": (
        "conversations",
        lambda f, n: _lines(
            f, n, entry("<image> at <point:1>?", "<box:0>", ["a.png"], objects=BOXES)
        ),
        {"seen": RULE},
    ),
    "counting": (
        "conversations",
        lambda f, n: _lines(
            f, n, entry("<image> Cats?", "<count:cat>", ["a.png"], objects=COUNTED)
        ),
        {"count_points": True},
    ),
    "depth": (
        "conversations",
        lambda f, n: _lines(
            f,
            n,
            entry(
                "<image> How far is <point:0>?",
                "<depth:0>",
                ["a.png"],
                objects=[{"point": [20, 10], "depth": 3.5}],
            ),
        ),
        {},
    ),
    "box3d": (
        "conversations",
        lambda f, n: _lines(
            f,
            n,
            entry(
                "<image> Where?",
                "<box3d:0>",
                ["a.png"],
                objects=[{"box3d": [0.5, 1, 2, 1, 1, 2, 0, 0, 0.25]}],
            ),
        ),
        {},
    ),
    "interleaved": (
        "interleaved",
        lambda f, n: _lines(
            f, n, {"texts": ["Before.", None, "After."], "images": [None, "b.png", None]}
        ),
        {},
    ),
    "pdf_masked": ("pdf", _pdf, {"options": SourceOptions(pdf_mode="masked")}),
    "pdf_interleaved": ("pdf", _pdf, {}),
    "preference": (
        "preference",
        lambda f, n: _lines(
            f, n, {"images": ["a.png"], "prompt": "q", "chosen": "good", "rejected": "bad"}
        ),
        {},
    ),
    "trajectory": ("trajectories", _trajectory, {}),
    "webdataset": (
        "webdataset",
        lambda f, n: _tars(
            f, n, [("0.jpg", encoded(picture(50, 40), "JPEG")), ("0.txt", b"a caption")]
        ),
        {},
    ),
    "energon": ("energon", _energon, {}),
}


def build_kinds(folder: Path) -> dict[str, Path]:
    """Build a set of each kind below `folder`, and `knots`, documents for Untie the Knots."""
    for name, size in {"a": (60, 90), "b": (120, 64)}.items():
        picture(*size).save(folder / f"{name}.png")
    (folder / "v.mp4").write_bytes(video(frames=40, size=(48, 64)))
    found = {}
    # One tokenizer for all, with what Untie the Knots needs.
    tokenizer = byte_tokenizer().with_knots()
    for name, (form, make, options) in KINDS.items():
        found[name] = folder / f"built_{name}"
        source = make(folder, name)
        build_dataset(source, found[name], form=form, workers=1, tokenizer=tokenizer, **options)
    words = [{"text": f"{number} " * 60} for number in range(12)]
    found["knots"] = folder / "built_knots"
    build_dataset(
        _lines(folder, "knots", *words), found["knots"], form="text", workers=1, tokenizer=tokenizer
    )
    return found
