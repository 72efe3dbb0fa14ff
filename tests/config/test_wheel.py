"""A wheel carries the shipped recipes and models, and needs nothing of the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import megatron_vlm

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, since a build leaves folders in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("megatron_vlm", "configs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    recipe = source / "configs" / "recipes" / "wheel-test.yaml"
    recipe.write_text(
        "model: wheel-test\ntraining: {train_iters: 1, seq_length: 128, global_batch_size: 1}\n"
    )
    (source / "configs" / "models" / "wheel-test.yaml").write_text(
        "language: {num_layers: 1, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 64,"
        " vocab_size: 384}\n"
    )
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", target, source],
        check=True,
    )
    (path,) = target.glob("*.whl")
    return path


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        fields = email.message_from_bytes(archive.read(metadata))
        assert "mvlm = megatron_vlm.cli.main:main" in archive.read(scripts).decode()
    shipped = {f"megatron_vlm/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*/*.yaml")}
    assert shipped <= names and "megatron_vlm/configs/recipes/wheel-test.yaml" in names
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_vlm").rglob("*.py")
        if (path.parent / "__init__.py").is_file()
    }
    assert modules <= names
    hub = {str(path.relative_to(ROOT)) for path in ROOT.glob("megatron_vlm/release/hub/*.*")}
    assert len(hub) == 5 and hub <= names
    assert not [name for name in names if name.startswith(("tests", "configs", "benchmarks"))]
    assert (fields["Name"], fields["Version"]) == ("megatron-vlm", megatron_vlm.__version__)
    assert set(fields["Requires-Python"].split(",")) == {">=3.11", "<3.13"}
    assert any("licenses/LICENSE" in name for name in names)


def test_command_line_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    assert "commands:" in _mvlm(tmp_path, "--help")
    printed = _mvlm(tmp_path, "config", "wheel-test", "training.train_iters=5")
    assert "train_iters: 5" in printed and "hidden_size: 64" in printed


def test_training_from_the_wheel_alone(wheel: Path, nano_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shutil.copy(ROOT / "tests" / "nano.yaml", tmp_path)
    words = (f"data.train={nano_data / 'train'}", "training.train_iters=2", "run_dir=run")
    _mvlm(tmp_path, "train", "nano.yaml", *words)
    assert (tmp_path / "run" / "checkpoints" / "iter_0000002" / "manifest.json").is_file()


def _mvlm(folder: Path, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "megatron_vlm", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
