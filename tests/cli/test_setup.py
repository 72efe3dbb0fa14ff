"""`make setup` finds a Python that has venv; declared versions fit the pinned ones."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def requirements() -> list[Requirement]:
    """All that setup.py declares."""
    found = []
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("REQUIRES", "EXTRAS"):
            for leaf in ast.walk(node.value):
                if isinstance(leaf, ast.List):
                    texts = (item.value for item in leaf.elts if isinstance(item, ast.Constant))
                    found += [Requirement(str(text)) for text in texts]
    return found


def test_pinned_versions_are_among_those_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name.lower(): version for name, version in pairs}
    declared = requirements()
    assert len(declared) > 15
    for each in declared:
        if each.name.lower() in pinned:
            assert each.specifier.contains(pinned[each.name.lower()]), each
    bounded = {each.name for each in declared if each.specifier}
    assert {"torch", "pillow", "tokenizers"} <= bounded


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"python3.11": "without venv", "python3.12": "whole"}, "python3.12 makes .venv"),
        ({"python3.11": "whole", "python3.12": "whole"}, "python3.11 makes .venv"),
        ({"python3.11": "without venv"}, "no venv module in python3.11;"),
        ({"python3": "too old"}, "no Python 3.11 or 3.12 on PATH"),
    ],
)
def test_setup_takes_a_python_that_has_venv(
    kinds: dict[str, str], said: str, tmp_path: Path
) -> None:
    make = shutil.which("make")
    assert make, "no make on PATH"
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3.11", "python3.12", "python3"):
        kind = kinds.get(name, "too old")
        lines = ["#!/bin/bash"]
        if kind == "too old":
            lines.append("exit 1")
        if kind == "without venv":
            lines.append('case "$*" in *ensurepip*) exit 1;; esac')
        # Ends the recipe there: nothing is installed in this test.
        lines.append(f'case "$*" in "-m venv"*) echo {name} makes .venv; exit 3;; esac')
        (tools / name).write_text("\n".join(lines) + "\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [make, "-C", str(tmp_path), "setup"],
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and said in done.stdout + done.stderr
