"""The data that training tests run on: noise pictures of many shapes, none, one or several each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.data.build import build_dataset

_SIZES = ((28, 28), (28, 84), (56, 56), (84, 28), (30, 61), (112, 56))


def build_nano_data(folder: Path) -> Path:
    """Write `train` and `held_out` sets below `folder` and return it."""
    _build(folder, "train", count=96, seed=1)
    _build(folder, "held_out", count=24, seed=2)
    return folder


def build_text_data(folder: Path) -> Path:
    """The same without a single picture."""
    _build(folder, "train", count=96, seed=3, pictures=(0,))
    _build(folder, "held_out", count=24, seed=4, pictures=(0,))
    return folder


def build_sparse_data(folder: Path) -> Path:
    """Pictures in one sample of thirty: steps, ranks and micro-batches without any."""
    _build(folder, "train", count=150, seed=5, pictures=(0,) * 10 + (1,) + (0,) * 19)
    _build(folder, "held_out", count=10, seed=6, pictures=(0,))
    return folder


def _build(
    folder: Path, name: str, count: int, seed: int, pictures: tuple[int, ...] = (0, 1, 1, 2, 0, 3)
) -> None:
    rng = np.random.default_rng(seed)
    source = folder / f"{name}_source"
    source.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number in range(count):
        names = []
        for ordinal in range(pictures[number % len(pictures)]):
            height, width = _SIZES[int(rng.integers(len(_SIZES)))]
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            names.append(f"{number}_{ordinal}.png")
            Image.fromarray(pixels).save(source / names[-1])
        # Lengths that leave padding in segments and filler in rows.
        letters = "".join(chr(97 + int(c)) for c in rng.integers(0, 26, int(rng.integers(1, 40))))
        question = "<image>" * len(names) + f"{letters[: len(letters) // 2]}?"
        entry = {
            "id": f"{name}-{number}",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": letters},
            ],
        }
        if names:
            entry["images"] = names
        entries.append(entry)
    file = source / "samples.json"
    file.write_text(json.dumps(entries))
    build_dataset(file, folder / name, workers=1)
