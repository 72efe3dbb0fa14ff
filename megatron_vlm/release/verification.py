"""A release is what was trained: its logits in transformers against our engine's, in float32.

Ours come from the checkpoint, loaded as any run loads it; theirs from the folder as written, in a
process that has neither this package nor the engine. Where a router's choice of experts is closer
than float32 tells, two right programs may choose differently; such tokens, and what follows them in
their prompt, are left out.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from PIL import Image
from safetensors import safe_open

from megatron_vlm.errors import ConfigError, TaskFailed
from megatron_vlm.release import transformers_logits
from megatron_vlm.release.card import LEAST_TRANSFORMERS
from megatron_vlm.release.trainer_logits import Scored, trainer_logits

TOLERANCE = 2e-5
"""Largest difference of a position's logits over its largest logit. Our choice: some ten times what
was measured on models of four layers, a hundredth of a percent."""

LEAST_COMPARED = 0.1
"""Share of the positions that must not have been left out. Our choice."""

_ROWS, _ROW_TOKENS = 8, 16
_QUESTION = "What is shown here, and where?"
_PICTURE = (61, 90)
"""Height and width in pixels; neither a multiple of a patch."""


class VerificationError(TaskFailed):
    """A release that does not compute what the checkpoint computes."""


@dataclass(frozen=True)
class Verification:
    """How near a release is to its checkpoint."""

    max_relative_difference: float
    """Over positions: largest difference over largest logit of the trainer."""
    tolerance: float
    positions: int
    """Tokens of all prompts."""
    compared: int
    """Of these, not left out."""
    prompts: int
    pictures: int
    transformers: str
    """Its version."""


def check_installed() -> None:
    """Whether transformers is here at all.

    Raises:
        ConfigError: it is not, or is too old.
    """
    found = importlib.util.find_spec("transformers") is not None
    version = importlib.metadata.version("transformers") if found else None
    if version is None or Version(version) < Version(LEAST_TRANSFORMERS):
        said = "is not installed" if version is None else f"is {version}"
        raise ConfigError(
            f"transformers {said}; verifying a release needs {LEAST_TRANSFORMERS} or newer: "
            "install the extra `release` (pip install -e '.[release]' in a clone), or give "
            "--no-verify"
        )


def verify(folder: Path, checkpoint: Path, dtype: str, name: str) -> Verification:
    """Compare a written folder with its checkpoint.

    Args:
        folder: what was exported.
        checkpoint: from what.
        dtype: as what (`DTYPE_CHOICES`).
        name: what errors call the release.

    Raises:
        VerificationError: they differ by more than `TOLERANCE`, or transformers cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix="mvlm-release-") as scratch:
        sees = "vision_config" in json.loads((folder / "config.json").read_text())
        picture = synthetic_picture() if sees else None
        ours = trainer_logits(checkpoint, dtype, _rows, _QUESTION, picture)
        # The other program needs the room, and modules refer to each other in circles.
        gc.collect()
        theirs, version = _their_logits(folder, Path(scratch), ours, picture, name)
        worst, compared, positions = 0.0, 0, 0
        for mine, other in zip(ours, theirs, strict=True):
            differences = _differences(mine, other, name)
            positions += len(mine.ids)
            compared += len(differences)
            worst = max([worst, *differences])
    if compared < LEAST_COMPARED * positions:
        raise VerificationError(
            f"{name}: cannot be verified: at all but {compared} of {positions} positions the "
            "choice of experts is closer than float32 tells; give --no-verify"
        )
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{name}: its logits in transformers differ from the trainer's by {worst:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; nothing was released"
        )
    return Verification(worst, TOLERANCE, positions, compared, len(ours), int(sees), version)


def synthetic_picture() -> bytes:
    """A PNG of gradients and a square, the same on every machine."""
    height, width = _PICTURE
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [rows * 255 // height, columns * 255 // width, (rows * 7 + columns * 13) % 256], axis=-1
    ).astype(np.uint8)
    pixels[15:40, 20:55] = (240, 30, 60)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def _rows(usable: list[int], longest: int) -> list[list[int]]:
    """Rows of token ids spread over the vocabulary.

    Args:
        usable: ids that are no special tokens.
        longest: tokens that a row may have at most.
    """
    length = min(_ROW_TOKENS, longest)
    return [
        [usable[(row * 7919 + place * 104729 + 13) % len(usable)] for place in range(length)]
        for row in range(_ROWS)
    ]


def _differences(mine: Scored, other: tuple[list[int], torch.Tensor], name: str) -> list[float]:
    ids, logits = other
    if ids != mine.ids:
        raise VerificationError(
            f"{name}: its tokenizer or processor makes other tokens of a question than the "
            "trainer; nothing was released"
        )
    usable = mine.sure
    scale = mine.logits.abs().amax(dim=-1).clamp(min=1e-30)
    # The tokenizer may have fewer tokens than the embedding has rows.
    other_logits = logits[:, : mine.logits.shape[1]].to(mine.logits)
    relative = (other_logits - mine.logits).abs().amax(dim=-1) / scale
    # A NaN is no small difference.
    return torch.nan_to_num(relative[usable], nan=float("inf")).tolist()


def _their_logits(
    folder: Path, scratch: Path, ours: list[Scored], picture: bytes | None, name: str
) -> tuple[Iterator[tuple[list[int], torch.Tensor]], str]:
    request: dict[str, Any] = {
        "folder": str(folder.absolute()),
        "rows": [scored.ids for scored in ours[:-1]],
        "question": _QUESTION,
        "picture": None,
    }
    if picture is not None:
        (scratch / "picture.png").write_bytes(picture)
        request["picture"] = str(scratch / "picture.png")
    (scratch / "request.json").write_text(json.dumps(request))
    result = scratch / "result.safetensors"
    # -P: not the script's folder, whose files have names that others may import.
    words = [sys.executable, "-P", transformers_logits.__file__, scratch / "request.json", result]
    # The folder's code is copied into that home, and nothing is looked up elsewhere.
    private = {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, words)), env=os.environ | private, cwd=scratch, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise VerificationError(
            f"{name}: transformers cannot load and run it ({lines[-1]}); nothing was released; "
            "--no-verify releases models that do not fit on this machine"
        )
    with _opened(result) as found:
        rows, question = found.get_tensor("rows"), found.get_tensor("question")
        ids = found.get_tensor("question_ids").tolist()
        version = found.metadata()["transformers"]
    pairs = [(mine.ids, logits) for mine, logits in zip(ours[:-1], rows, strict=True)]
    return iter([*pairs, (ids, question)]), version


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with safe_open(path, framework="pt") as found:
        yield found
