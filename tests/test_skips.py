"""The hooks of skips.py, on small suites run by a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]


def outcome(folder: Path, body: str, ci: str) -> tuple[int, str]:
    """Exit code and output of pytest on one file, with this project's hooks and settings."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(f"import pytest\n{body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        + ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(folder)],
        cwd=ROOT,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


SKIPS = """
pytestmark = pytest.mark.unit
def test_a(): pytest.skip("no network")
@pytest.mark.skipif(True, reason="needs a GPU with 2 ranks")
def test_b(): pass
@pytest.mark.xfail(strict=True)
def test_c(): assert False
def test_d(): pass
"""


def test_skip_fails_in_ci_alone(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, SKIPS, ci="true")
    assert code == 1
    assert "skipped in CI: 'no network'" in said
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed" in said
    code, said = outcome(tmp_path, SKIPS, ci="")
    assert code == 0 and "1 passed, 2 skipped, 1 xfailed" in said


def test_skip_of_a_whole_file_fails_in_ci(tmp_path: Path) -> None:
    body = "pytest.importorskip('no_such_package')"
    assert outcome(tmp_path, body, ci="true")[0] == 2
    body = "pytest.skip('needs DALI', allow_module_level=True)"
    assert outcome(tmp_path, body, ci="true")[0] == 5, "allowed, and nothing else to run"


def test_unknown_and_absent_markers_are_refused(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, "@pytest.mark.untold\ndef test_a(): pass", ci="")
    assert code == 2 and "'untold' not found" in said
    code, said = outcome(tmp_path, "@pytest.mark.slow\ndef test_a(): pass", ci="")
    assert code == 4 and "mark these tests as one of unit, distributed, gpu" in said
