"""The demo's data set: real questions on real pictures, written as LLaVA JSON with PNGs.

What a split holds depends on the seed and its size alone. Beside the questions each split
carries `provenance.jsonl`: which digits, which crop, which line a picture was made of, so
that anyone can check that nothing held out was trained on.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_vlm.demo import pictures
from megatron_vlm.demo.sources import Material, Sources, Split, load
from megatron_vlm.errors import ConfigError, DataError

Draw = Callable[[Material, np.random.Generator], pictures.Drawn]

READ_QUESTION = "Which digits, left to right?"
COUNT_QUESTION = "How many digits?"
SUM_QUESTION = "What is their sum?"
PHOTOGRAPH_QUESTION = "What is shown?"
TEXT_QUESTION = "What does it say?"

_MARKER = "summary.json"
_FORMAT = "megatron-vlm demo data 1"


@dataclass(frozen=True)
class Kind:
    """One kind of question: its name, its share of every split, its words, how it is drawn."""

    name: str
    share: float
    question: str
    draw: Draw


def _read_grid(material: Material, rng: np.random.Generator) -> pictures.Drawn:
    return pictures.digits_on_grid(material, rng)[0]


def _count_grid(material: Material, rng: np.random.Generator) -> pictures.Drawn:
    drawn, values = pictures.digits_on_grid(material, rng)
    return pictures.Drawn(drawn.picture, str(len(values)), drawn.provenance)


def _sum_grid(material: Material, rng: np.random.Generator) -> pictures.Drawn:
    drawn, values = pictures.digits_on_grid(material, rng)
    return pictures.Drawn(drawn.picture, str(sum(values)), drawn.provenance)


# Shares are our choice. The demo promises one thing, digits read in place, so most of its few
# minutes go there. The rest shows that the same model takes pictures of any size and any
# question, and keeps each kind just frequent enough to move.
KINDS = (
    Kind("digits_read_grid", 0.74, READ_QUESTION, _read_grid),
    Kind("digits_count_grid", 0.04, COUNT_QUESTION, _count_grid),
    Kind("digits_sum_grid", 0.04, SUM_QUESTION, _sum_grid),
    Kind("digits_read_off_grid", 0.04, READ_QUESTION, pictures.digits_off_grid),
    Kind("photograph", 0.07, PHOTOGRAPH_QUESTION, pictures.photograph),
    Kind("text_line", 0.07, TEXT_QUESTION, pictures.text_line),
)


@dataclass(frozen=True)
class Summary:
    """What was built: samples of each kind, what they were drawn from, and the seconds it took."""

    out_dir: str
    seed: int
    train: dict[str, int]
    heldout: dict[str, int]
    digit_instances: dict[str, int]
    photographs: int
    text_source: str
    seconds: float

    def __str__(self) -> str:
        """One paragraph for people."""
        counts = "; ".join(
            f"{split}: "
            + ", ".join(f"{number} {name}" for name, number in getattr(self, split).items())
            for split in get_args(Split)
        )
        return (
            f"{counts}. Drawn from {self.digit_instances['train']} handwritten digits "
            f"({self.digit_instances['heldout']} others held out), {self.photographs} photographs, "
            f"text from {self.text_source}. {self.seconds:.1f} s."
        )


def build(out_dir: Path, seed: int, train_samples: int, heldout_samples: int) -> Summary:
    """Write both splits under `out_dir`; what the demo wrote there before is replaced.

    Writes `train.json` and `heldout.json` (lists of samples: `id`, `image` relative to
    `out_dir`, `conversations`, `kind`), their pictures `train/000001.png` and so on,
    `train/provenance.jsonl` and `heldout/provenance.jsonl` (one object per sample), and
    `summary.json`. The same arguments on the same machine write the same bytes, but for the
    seconds in `summary.json`.

    Raises ConfigError for a count below 1 or a negative seed, UserError if a package of the
    `demo` extra is missing, DataError if `out_dir` holds something else.
    """
    started = time.perf_counter()
    for name, value, least in (
        ("seed", seed, 0),
        ("train_samples", train_samples, 1),
        ("heldout_samples", heldout_samples, 1),
    ):
        if value < least:
            raise ConfigError(f"demo {name}: {value} given, expected {least} or more")
    _claim(out_dir)
    sources = load(seed)
    counts: dict[Split, dict[str, int]] = {
        "train": _write_split(out_dir, "train", sources, seed, train_samples),
        "heldout": _write_split(out_dir, "heldout", sources, seed, heldout_samples),
    }
    summary = Summary(
        out_dir=str(out_dir),
        seed=seed,
        train=counts["train"],
        heldout=counts["heldout"],
        digit_instances={split: len(sources.of(split).digits.values) for split in get_args(Split)},
        photographs=len(sources.train.photographs),
        text_source=sources.text_source,
        seconds=round(time.perf_counter() - started, 3),
    )
    _write_marker(out_dir, asdict(summary))
    return summary


def _claim(out_dir: Path) -> None:
    """Make `out_dir` ours and empty of an earlier build, or refuse to touch what is not ours."""
    ours = [out_dir / split for split in get_args(Split)]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        marker = out_dir / _MARKER
        if not (marker.is_file() and _FORMAT in marker.read_text(encoding="utf-8")):
            for path in (*ours, *(folder.with_suffix(".json") for folder in ours), marker):
                if path.exists():
                    raise DataError(
                        f"{path}: exists and was not written by the demo; expected an empty "
                        "folder or an earlier build, so name another one"
                    )
        # Marked first, so that an interrupted build can be repeated in place.
        _write_marker(out_dir, {})
        for folder in ours:
            folder.with_suffix(".json").unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            for stale in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].png"):
                stale.unlink()
    except OSError as error:
        raise DataError(
            f"{out_dir}: cannot be written ({error.strerror or error}); expected a folder "
            "you may write to, so name another one"
        ) from error


def _write_marker(out_dir: Path, facts: dict[str, Any]) -> None:
    text = json.dumps({"format": _FORMAT, **facts}, indent=2)
    (out_dir / _MARKER).write_text(text + "\n", encoding="utf-8")


def _write_split(
    out_dir: Path, split: Split, sources: Sources, seed: int, samples: int
) -> dict[str, int]:
    """Draw and write one split; returns its samples by kind."""
    material = sources.of(split)
    salt = zlib.crc32(split.encode())
    order = _order(samples, np.random.default_rng([seed, salt]))
    rows: list[dict[str, Any]] = []
    with (out_dir / split / "provenance.jsonl").open("w", encoding="utf-8") as provenance:
        for number, kind_index in enumerate(order, start=1):
            kind = KINDS[kind_index]
            drawn = kind.draw(material, np.random.default_rng([seed, salt, number]))
            name = f"{split}/{number:06d}.png"
            # The fastest compression: as quick as none here, and a third of the bytes.
            drawn.picture.save(out_dir / name, compress_level=1)
            identity = f"{split}-{number:06d}"
            rows.append(
                {
                    "id": identity,
                    "image": name,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{kind.question}"},
                        {"from": "gpt", "value": drawn.answer},
                    ],
                    "kind": kind.name,
                }
            )
            facts = {"id": identity, "kind": kind.name, **drawn.provenance}
            provenance.write(json.dumps(facts, ensure_ascii=False) + "\n")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (out_dir / f"{split}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return {kind.name: order.count(index) for index, kind in enumerate(KINDS)}


def _order(samples: int, rng: np.random.Generator) -> list[int]:
    """The kind of every sample, shuffled: shares are kept to within one sample of each kind."""
    exact = np.array([kind.share for kind in KINDS]) * samples
    counts = np.floor(exact + 1e-9).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: samples - int(counts.sum())]] += 1
    order: list[int] = rng.permutation(np.repeat(np.arange(len(KINDS)), counts)).tolist()
    return order
