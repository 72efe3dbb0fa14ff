"""What import-linter cannot see: it knows foreign packages as a whole, so `torch.distributed` is
`torch` to it, and which room itself imports them is not told from what its neighbours import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vlm

pytestmark = pytest.mark.unit

PACKAGE = Path(megatron_vlm.__file__).parent
DISTRIBUTED = ("torch.distributed", "megatron.")


def imported_names(path: Path) -> set[str]:
    """Every dotted name a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize("room", ["data", "planning", "config"])
def test_nothing_distributed_in(room: str) -> None:
    for path in sorted((PACKAGE / room).rglob("*.py")):
        used = {name for name in imported_names(path) if name.startswith(DISTRIBUTED)}
        assert not used, f"{path} uses {sorted(used)}"


def test_the_check_above_sees_every_way_to_say_it(tmp_path: Path) -> None:
    for text in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import init_process_group",
        "import torch\ndef f(): return torch.distributed.get_rank()",
        "def f():\n    from megatron.core import parallel_state",
    ):
        path = tmp_path / "probe.py"
        path.write_text(text)
        assert any(name.startswith(DISTRIBUTED) for name in imported_names(path)), text


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys, megatron_vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
