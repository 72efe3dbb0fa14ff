"""`mvlm release` as tests call it, in a process of its own, with what it said."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from megatron_vlm.cli.main import main
from megatron_vlm.platform import World
from tests.ranks import run_ranks


def _command(_: World | None, words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def released(run_dir: Path, folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in a fork."""
    (found,) = run_ranks(1, _command, ["release", str(run_dir), str(folder), *words])
    return found


def plainly(run_dir: Path, folder: Path, *words: str) -> tuple[int, str, str]:
    """The same without verification, which needs no process group: in this process."""
    return _command(None, ["release", str(run_dir), str(folder), "--no-verify", *words])


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Lines of metrics.jsonl by iteration, the last of each."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line for line in lines}


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_state.json").read_text())


def checked_by_coreutils(folder: Path) -> int:
    """Number of files that `sha256sum -c` finds right; none may be wrong or unlisted."""
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = done.stdout.splitlines()
    assert all(line.endswith(": OK") for line in listed)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {line.removesuffix(": OK") for line in listed} == there - {"SHA256SUMS"}
    return len(listed)
