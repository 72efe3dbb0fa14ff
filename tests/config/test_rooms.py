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


def _installs(path: Path) -> bool:
    """Whether a module calls `install()` before its first import of the engine."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and ast.unparse(node.value) == "install()":
            return True
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}."}
        if any(name.startswith("megatron.") for name in names):
            return False
    return False


def test_the_engine_is_imported_after_the_platform_is_installed() -> None:
    """Whichever module a program imports first: what the engine has taken from torch by then stays
    as it was."""
    users = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        text = " ".join(ast.unparse(node) for node in imports)
        if "from megatron." not in text and "import megatron." not in text:
            continue
        users += 1
        rooms = [parent / "__init__.py" for parent in path.parents if PACKAGE in parent.parents]
        assert any(_installs(file) for file in (path, *rooms)), path
    assert users > 10


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys, megatron_vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
