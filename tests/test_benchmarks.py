"""Each benchmark runs, small, and tells what it promises. No time is judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    """The result that a benchmark wrote, with what each has to say of itself."""
    file = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / name), "--json", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["command"].split()[:2] == ["python", str(BENCHMARKS / name)]
    assert "cores" in result["hardware"]
    assert result["versions"]["python"].startswith("3.")
    assert result["data"]
    return result


@pytest.mark.unit
def test_data_plan(tmp_path: Path) -> None:
    options = ("--samples", "2e4", "--repetitions", "1", "--folder", str(tmp_path))
    result = run(tmp_path, "data_plan.py", *options)
    assert result["samples"] == 20_000
    assert 0.9 < result["fill"] <= 1
    assert result["planned_samples_per_second"][0] > 0


@pytest.mark.unit
@pytest.mark.slow
def test_hf_export_import(tmp_path: Path) -> None:
    options = ("--parameters", "1e7", "--folder", str(tmp_path))
    result = run(tmp_path, "hf_export_import.py", *options)
    # The vocabulary alone is more than was asked for.
    assert result["parameters"] >= 1e7
    assert result["ratio"] > 0


@pytest.mark.unit
@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    options = ("--size", "small", "--repetitions", "1", "--warm-up", "1")
    result = run(tmp_path, "train_step_vs_transformers.py", *options)
    assert result["routing"] == "natural"
    first = result["first_loss"]
    assert math.isclose(first["ours"], first["peer"], rel_tol=1e-5)


@pytest.mark.unit
def test_data_images_tells_its_options(tmp_path: Path) -> None:
    """Its peers are not installed with the tests; the command line is read all the same."""
    command = [sys.executable, str(BENCHMARKS / "data_images.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--photographs" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_vision_balance(tmp_path: Path) -> None:
    result = run(tmp_path, "vision_balance.py", "--size", "small", "--threads", "1")
    for mixture in result["balance"].values():
        for ranks, bound in (("8", 1.02), ("256", 1.05), ("1024", 1.05)):
            assert 1 <= mixture[ranks]["ours"] <= bound
            assert mixture[ranks]["ours"] <= mixture[ranks]["whole_pictures"]
            assert mixture[ranks]["in_turn"] > 1.05 * mixture[ranks]["ours"]
    # Where every FLOP is as dear, only what is planned counts, and nothing is measured.
    assert all(use > 0.97 for use in result["mfu_of_text_only"]["every_flop_as_dear"].values())
    executed = result["real_processes"]["executed_on_8"]
    assert executed["products_off_by"] < 1e-9
    assert executed["shared_pictures"] > 0
    assert result["real_processes"]["wall_clock_on_4"]["ratio"] > 0
