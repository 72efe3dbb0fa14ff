"""What every benchmark's result says of itself: the machine, the versions, the command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A command line that tells `doc`'s first line and takes `--json FILE`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser


def record(*packages: str, gpu: bool = False) -> dict[str, Any]:
    """`hardware`, `versions` (Python's and the packages') and `command`."""
    return {
        "hardware": hardware(gpu),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "command": shlex.join(["python", *sys.argv]),
    }


def tell(result: dict[str, Any], file: Path | None) -> None:
    """Print a result and, where a file is named, write it there."""
    text = json.dumps(result, indent=2)
    print(text)
    if file is not None:
        file.write_text(text + "\n")


def hardware(gpu: bool = False) -> str:
    """The processor's name and what there is of it; with `gpu`, the GPU's too."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    found = f"{name}, {os.cpu_count()} cores"
    if gpu:
        # Only where the caller loads torch anyway: it would be most of a small process's memory.
        import torch

        found += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return found
