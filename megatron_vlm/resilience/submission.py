"""The batch script of a run: the shipped one with this run's options and words filled in."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config.shipped import batch_script
from megatron_vlm.errors import ConfigError
from megatron_vlm.resilience import events, slurm

_OPTIONS, _SETTINGS = "# mvlm submit: options\n", "# mvlm submit: settings\n"


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm."""

    nodes: int
    """That train."""
    spares: int
    ranks_per_node: int
    gpus_per_node: int | None = None
    """None: nodes without GPUs."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    job_name: str = "mvlm"
    warning_seconds: int | None = None
    """Before the time limit, to save; null: as the script has it."""
    container: str | None = None
    container_mounts: str | None = None
    options: tuple[str, ...] = ()
    """More options of sbatch, such as `--constraint=h100`."""


def write_script(request: Request, recipe: str, overrides: Sequence[str], logs: Path) -> str:
    """The text of the batch script.

    Args:
        request: what is asked of Slurm.
        recipe: the recipe, as on the command line.
        overrides: its overrides.
        logs: folder of the job's own output.

    Raises:
        ConfigError: an option that would break out of its line.
    """
    options = {
        "--nodes": str(request.nodes + request.spares),
        "--job-name": request.job_name,
        "--output": str(logs / "slurm-%j.out"),
        "--chdir": os.getcwd(),
    }
    if request.gpus_per_node is not None:
        options["--gpus-per-node"] = str(request.gpus_per_node)
    if request.warning_seconds is not None:
        options["--signal"] = f"B:USR1@{request.warning_seconds}"
    for name, value in (
        ("--time", request.time),
        ("--partition", request.partition),
        ("--account", request.account),
    ):
        if value is not None:
            options[name] = value
    if request.nodes + request.spares == 1:
        # Nobody would be left to requeue it.
        options["--no-kill"] = "off"
    lines = [_directive(f"{name}={value}") for name, value in options.items()]
    lines += [_directive(option) for option in request.options]
    settings = [
        f"MVLM_SPARES={request.spares}",
        f"MVLM_RANKS_PER_NODE={request.ranks_per_node}",
        f"MVLM={shlex.quote(_program())}",
        f"set -- {shlex.join([recipe, *overrides])}",
    ]
    if request.container is not None:
        # Words of one variable: spaces in them would part them.
        words = [f"--container-image={request.container}"]
        if request.container_mounts is not None:
            words.append(f"--container-mounts={request.container_mounts}")
        for word in words:
            if re.search(r"\s", word):
                raise ConfigError(f"{word!r} has a space, which srun's options cannot have here")
        settings += [
            f"export MVLM_SRUN_OPTIONS={shlex.quote(' '.join(words))}",
            # Inside the image there is another Python.
            "export MVLM_AGENT=mvlm",
        ]
    text = batch_script().read_text()
    for mark, filled in ((_OPTIONS, lines), (_SETTINGS, settings)):
        assert text.count(mark) == 1
        text = text.replace(mark, "".join(f"{line}\n" for line in filled))
    return text


def send(script: str, run_dir: Path) -> str:
    """Keep the script in the run folder and send it; the job's number.

    Raises:
        SlurmError: Slurm does not take it.
    """
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.sbatch"
    path.write_text(script)
    job = slurm.ask("sbatch", "--parsable", str(path)).strip().split(";")[0]
    events.tell(run_dir, "submitted", job=job, script=str(path))
    return job


def _directive(option: str) -> str:
    if not option.startswith("--") or not option.isprintable():
        raise ConfigError(f"{option!r} is no option of sbatch; expected --NAME=VALUE on one line")
    name, equals, value = option.partition("=")
    return f"#SBATCH {name}{equals}{shlex.quote(value) if value else ''}"


def _program() -> str:
    """`mvlm` of this very installation."""
    beside = Path(sys.executable).parent / "mvlm"
    return str(beside) if beside.exists() else "mvlm"
