"""Runs to release from, and their releases: made once, never changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.release.commands import released
from tests.training_case import recipe, train_case

# Every step is saved and one is kept, besides every second.
_STEPS = (
    "training.train_iters=6",
    "training.eval_interval=3",
    "checkpoint.save_interval=1",
    "checkpoint.keep_last=1",
    "checkpoint.keep_every=2",
)


@pytest.fixture(scope="session")
def vlm_run(nano_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in bf16 with pictures; checkpoints of iterations 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("released") / "vlm_run"
    words = ("training.precision=bf16", "training.stage=first light")
    train_case(recipe(nano_data, run_dir, *_STEPS, *words))
    return run_dir


@pytest.fixture(scope="session")
def text_run(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of text alone in fp32, without a held-out set."""
    run_dir = tmp_path_factory.mktemp("released") / "text_run"
    words = ("training.precision=fp32", "model.vision=null", "data.validation={}")
    train_case(recipe(text_data, run_dir, *_STEPS, *words))
    return run_dir


@pytest.fixture(scope="session")
def vlm_releases(vlm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All three, verified, by tokens: `folder`, `out`, `err` and `code` of the command."""
    folder = tmp_path_factory.mktemp("published") / "out"
    words = ("--every-tokens", "400", "--licence", "apache-2.0", "--name", "nano", "--json")
    code, out, err = released(vlm_run, folder, *words)
    return {"folder": folder, "code": code, "out": out, "err": err}
