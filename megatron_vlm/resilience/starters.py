"""Ways to bring an agent up on every node of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_STOP_SECONDS = 10.0


def _agent_command() -> list[str]:
    if "MVLM_AGENT" in os.environ:  # In a container, whose paths are others.
        return [os.environ["MVLM_AGENT"], "agent"]
    package = Path(__file__).resolve().parents[2]
    # A file of the working directory, say rich.py, must not stand in for a package.
    safe_path = [] if package == Path.cwd() else ["-P"]
    return [sys.executable, *safe_path, "-m", "megatron_vlm", "agent"]


class _Processes:
    """Agents that end when the processes do that have started them."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def running(self) -> bool:
        """Whether any may still come or is there."""
        return any(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """Wait for them, which have been told to go, and end those that stay."""
        for process in self._processes:
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number is not None:
                    process.send_signal(number)
                try:
                    process.wait(_STOP_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue


class SrunStarter(_Processes):
    """One agent on every node of this process's Slurm job, in one step."""

    def __init__(self, nodes: int) -> None:
        """For a job of so many nodes, spares counted."""
        super().__init__()
        self._nodes = nodes

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the step; a node that fails does not end it."""
        options = [
            f"--nodes={self._nodes}",
            f"--ntasks={self._nodes}",
            "--ntasks-per-node=1",
            # The loss of a node, or of an agent, is for the supervisor to deal with.
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--wait=0",
            # Other steps, such as a person's look, may run beside it.
            "--overlap",
            "--mpi=none",
            "--cpu-bind=none",
            "--export=ALL",
        ]
        cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
        if cpus.isdigit():
            # Else a task would get one.
            options.append(f"--cpus-per-task={cpus}")
        options += os.environ.get("MVLM_SRUN_OPTIONS", "").split()
        self._processes.append(
            subprocess.Popen(
                ["srun", *options, *_agent_command()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                # Signals to the batch script are for the supervisor.
                start_new_session=True,
            )
        )


class LocalStarter(_Processes):
    """Agents on this machine, which pose as nodes."""

    def __init__(self, nodes: int) -> None:
        """Start so many."""
        super().__init__()
        self._nodes = nodes

    def start(self, environment: Mapping[str, str]) -> None:
        """Start them."""
        for number in range(self._nodes):
            named = {"MVLM_NODE": f"local{number}"}
            self._processes.append(
                subprocess.Popen(
                    _agent_command(),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **environment, **named},
                    start_new_session=True,
                )
            )
