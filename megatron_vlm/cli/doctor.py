"""`mvlm doctor`: what this machine has, what each missing part costs, and can training run here.

Every part is looked at on its own and whatever goes wrong is shown in its row: a half-broken
machine is what this command is for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

HELP = """Show what this machine has, and whether training can run on it.

Exits with 0 when it can, with 1 when a required part is missing or unsupported.

example:
  mvlm doctor
  mvlm doctor --json > machine.json
"""

SUPPORTED_PYTHON = ((3, 11), (3, 12))
"""What `setup.py` accepts; megatron-core 0.17 and later, which need 3.12, are not supported."""
OLDEST_TORCH = (2, 11)
MEGATRON_CORE = "0.16.1"
"""The one supported release: the engine's private parts change between releases."""
PACKAGES = (
    "numpy",
    "pydantic",
    "omegaconf",
    "PyYAML",
    "tensorboard",
    "safetensors",
    "pillow",
    "tokenizers",
    "rich",
    "simplejpeg",
    "packaging",
    "jinja2",
)
"""The ordinary Python dependencies, shown as one part."""

Status = Literal["ok", "missing", "unsupported", "broken"]


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the report."""

    name: str
    required: bool
    """Training cannot run on this machine without it."""
    status: Status
    found: str
    """The version, or what is wrong."""
    without: str
    """What its absence means, in one sentence."""


class _Problem(Exception):
    """Raised by a probe: the part is there but not as needed, or not there."""

    def __init__(self, status: Status, found: str) -> None:
        super().__init__(found)
        self.status: Status = status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when training can run here, else 1."""
    parts = list(examine())
    device = "cuda" if _cuda_available() else "cpu"
    lacking = [part for part in parts if part.required and part.status != "ok"]
    if args.json:
        report = {
            "can_train": not lacking,
            "device": device,
            "parts": [asdict(part) for part in parts],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_table(parts)
        if lacking:
            names = ", ".join(part.name for part in lacking)
            print(f"Training cannot run on this machine. Mend first: {names}.")
        else:
            where = "its GPUs" if device == "cuda" else "its CPU (gloo): for tests and tiny models"
            print(f"Training can run on this machine, on {where}.")
    return 1 if lacking else 0


def examine() -> Iterator[Part]:
    """Look at every part, one after the other. Never raises."""
    gpu = _cuda_available()
    checks: list[tuple[str, bool, Callable[[], str], str]] = [
        ("Python", True, _python, "nothing runs; install Python 3.11 or 3.12"),
        ("torch", True, _torch, f"nothing runs; install torch {_dotted(OLDEST_TORCH)} or newer"),
        ("gloo", True, _gloo, "ranks on CPU cannot talk and GPU runs cannot agree on host data"),
        ("GPUs", False, _gpus, "training runs on the CPU, which is for tests and tiny models"),
        ("NCCL", gpu, _nccl, "ranks on GPUs cannot talk; CPU runs do not need it"),
        (
            "megatron-core",
            True,
            _megatron_core,
            f"nothing trains; pip install megatron-core=={MEGATRON_CORE}",
        ),
        ("psutil", True, lambda: _import("psutil"), "the engine's checkpoint save hangs for ever"),
        (
            "einops",
            True,
            lambda: _import("einops"),
            "parts of the engine fail when they are reached",
        ),
        ("Python packages", True, _packages, "pip install -e . brings those that are missing"),
        (
            "Transformer Engine",
            False,
            lambda: _import("transformer_engine.pytorch", "transformer-engine"),
            "layers run on plain torch (slower on GPUs) and fp8 is refused",
        ),
        (
            "Apex",
            False,
            lambda: _import("fused_weight_gradient_mlp_cuda", "apex"),
            "no fused_weight_gradient_mlp_cuda: weight gradients are added up in a separate step "
            "(slower on GPUs without Transformer Engine)",
        ),
        (
            "DALI",
            False,
            lambda: _import("nvidia.dali", "nvidia-dali-cuda130"),
            "pictures are decoded on the CPU, or by nvJPEG where torchvision is",
        ),
        ("MPI (mpi4py)", False, _mpi4py, "ranks cannot be started by mpirun; torchrun still works"),
        ("MPI launcher", False, _mpi_launcher, "mpirun is not available; torchrun still works"),
        ("Slurm", False, _slurm, "jobs cannot be submitted from here; torchrun still works"),
    ]
    for name, required, probe, without in checks:
        status, found = _probe(probe)
        yield Part(name, required, status, found, without)


def _probe(probe: Callable[[], str]) -> tuple[Status, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "ok", probe()
    except _Problem as problem:
        return problem.status, str(problem)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        return "broken", f"{type(error).__name__}: {said}"[:300]


def _python() -> str:
    version = platform.python_version()
    if sys.version_info[:2] not in SUPPORTED_PYTHON:
        supported = " or ".join(map(_dotted, SUPPORTED_PYTHON))
        raise _Problem("unsupported", f"{version}; supported: {supported}")
    return version


def _torch() -> str:
    torch = _module("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build})"
    if _release(torch.__version__) < OLDEST_TORCH:
        raise _Problem("unsupported", f"{found}; supported: {_dotted(OLDEST_TORCH)} or newer")
    return found


def _gloo() -> str:
    distributed = _module("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise _Problem("missing", "this torch was built without it")
    return "part of torch"


def _gpus() -> str:
    torch = _module("torch")
    driver_rows = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    rows = driver_rows.splitlines() if driver_rows else []
    with warnings.catch_warnings(record=True) as caught:
        # torch tells why it cannot use a GPU (a driver too old) only by a warning.
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if rows and not torch.version.cuda:
            reason = f"{len(rows)} present, but torch is a CPU build: install a CUDA build"
            raise _Problem("broken", reason)
        if rows or caught:
            reason = str(caught[0].message) if caught else f"{len(rows)} present, unusable"
            raise _Problem("broken", " ".join(reason.split())[:300])
        raise _Problem("missing", "none")
    kinds: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        kind = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        kinds[kind] = kinds.get(kind, 0) + 1
    listing = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{listing}; driver {rows[0].strip() if rows else 'unknown'}"


def _nccl() -> str:
    if not _module("torch.distributed").is_nccl_available():
        raise _Problem("missing", "this torch was built without it")
    return _dotted(_module("torch").cuda.nccl.version())


def _megatron_core() -> str:
    found = _import("megatron.core", "megatron-core")
    if found != MEGATRON_CORE:
        raise _Problem("unsupported", f"{found}; supported: {MEGATRON_CORE} alone")
    return found


def _packages() -> str:
    absent = [name for name in PACKAGES if _installed_version(name) is None]
    if absent:
        raise _Problem("missing", ", ".join(absent))
    return f"{len(PACKAGES)} of {len(PACKAGES)}"


def _mpi4py() -> str:
    mpi4py = _module("mpi4py")
    # Importing mpi4py.MPI would start MPI, which can end this process outside of a launcher.
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    library = importlib.import_module("mpi4py.MPI").Get_library_version()
    return f"{mpi4py.__version__} with {library.split(',')[0].splitlines()[0].strip()}"


def _mpi_launcher() -> str:
    for name in ("mpirun", "mpiexec"):
        if shutil.which(name):
            said = _command(name, "--version")
            return f"{shutil.which(name)}: {said.splitlines()[0] if said else 'no version'}"
    raise _Problem("missing", "neither mpirun nor mpiexec on PATH")


def _slurm() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    where = f"inside job {job}" if job else "outside a job"
    absent = [name for name in ("srun", "sbatch") if shutil.which(name) is None]
    if absent:
        raise _Problem("missing", f"{' and '.join(absent)} not on PATH; {where}")
    return f"{_command('srun', '--version') or 'srun gives no version'}; {where}"


def _import(module: str, distribution: str | None = None) -> str:
    """Import `module` and give the version of the distribution it comes from."""
    found = _module(module)
    version = _installed_version(distribution or module) or getattr(found, "__version__", None)
    return str(version or "version unknown")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            top = error.name == name.partition(".")[0]
            reason = "not installed" if top else f"no module {error.name}"
            raise _Problem("missing", reason) from error
        raise


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_available() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(importlib.import_module("torch").cuda.is_available())
    except (Exception, SystemExit):
        return False


def _command(*words: str) -> str | None:
    """What a program prints, or None when it is absent, fails or takes 10 seconds."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or done.stderr.strip()


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _print_table(parts: list[Part]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        # rich is itself a dependency that may be missing.
        for part in parts:
            star = " *" if part.required else ""
            print(f"{part.name}{star}: {part.status}, {part.found}; without it: {part.without}")
        print("* required on this machine")
        return
    colors = {"ok": "green", "missing": "yellow", "unsupported": "red", "broken": "red"}
    table = Table(show_lines=False, caption="* required on this machine")
    for heading in ("Part", "", "Found", "Without it"):
        table.add_column(heading, overflow="fold")
    for part in parts:
        color = "red" if part.required and part.status != "ok" else colors[part.status]
        table.add_row(
            escape(f"{part.name}{' *' if part.required else ''}"),
            f"[{color}]{part.status}[/]",
            escape(part.found),
            escape(part.without),
        )
    Console().print(table)
