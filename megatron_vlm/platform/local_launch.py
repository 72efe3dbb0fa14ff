"""The ranks of a run as processes of this machine: started together, ended together.

Rank 0 speaks to the terminal; the others write to files. A rank that fails leaves its peers waiting
in a collective for ever, so they get a few seconds to fail too and are then killed. Nothing is left
behind, however the launcher itself ends: every rank dies with it (Linux tells it so), and a warden
process, which holds nothing but a pipe from the launcher, then ends what the ranks had forked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform.distributed import free_port

FAILED = 1
USER_ERROR = 2
"""What a rank exits with on a `UserError`, having told the person why."""
INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM
OWN_OUTPUT = "MVLM_OWN_OUTPUT"
"""Set for ranks whose output goes to a file of their own, or is rank 0's: they may say all."""

_PEER_SECONDS = 5.0
_POLL_SECONDS = 0.02
_LAST_LINES, _LAST_BYTES = 20, 1 << 16

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SET_PARENT_DEATH_SIGNAL = 1
_WARDEN = """
import os, signal, sys
sys.stdin.buffer.read()
for group in sys.argv[1:]:
    try:
        os.killpg(int(group), signal.SIGKILL)
    except OSError:
        pass
"""


@dataclass
class Rank:
    """One started rank, leader of a process group of its own."""

    number: int
    process: subprocess.Popen[bytes]
    output: Path | None
    """File of its stdout and stderr; None where they are the launcher's own."""
    output_start: int = 0
    """Bytes that earlier runs had left in that file."""

    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs.

        The ended process is not reaped: until the run is over its number must stay taken, since
        its whole process group is killed by that number.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self.process.pid, options)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the rank alone: it needs its helpers, which write what it saves."""
        # Never reaped before the run is over, so this number is still the rank's.
        os.kill(self.process.pid, signal.SIGTERM)

    def kill_group(self) -> None:
        """Kill the rank and all that it has forked."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # Gone already, or nothing but zombies.
            pass

    def last_lines(self) -> list[str]:
        """The end of its output file."""
        if self.output is None:
            return []
        with open(self.output, "rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(self.output_start, end - _LAST_BYTES))
            text = stream.read().decode(errors="replace")
        return text.splitlines()[-_LAST_LINES:]


def run_local_ranks(command: Sequence[str], count: int, logs: Path) -> int:
    """Run `command` as `count` ranks of one run and wait for all of them.

    SIGTERM, SIGUSR1 and a first SIGINT ask every rank to save and leave; a second SIGINT kills
    them. Must be called from the main thread.

    Args:
        command: program and arguments, alike for every rank; ranks learn their place from the
            environment, as under torchrun.
        count: ranks.
        logs: folder for the output of ranks above 0: `rank_NNNNN.out`.

    Returns:
        0 when every rank ended well, 2 when any rank met a user error, 130 after SIGINT, 143 when
        ranks were terminated before they could save, else 1.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    with _StopSignals() as signals:
        try:
            places = rank_environments(count, os.environ)
            for number, environment in enumerate(places):
                ranks.append(_start(command, number, environment, logs))
            with _warden(ranks):
                first = _wait(ranks, signals)
                return _verdict(ranks, first, signals)
        finally:
            _end(ranks)


def local_processes(asked: int | None, on_cpu: int = 1) -> int:
    """How many ranks to start here: as many as asked, else one for each GPU, else `on_cpu`.

    Imports torch.

    Raises:
        ConfigError: less than one, or more than there are GPUs.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"--nproc {asked}: expected a number of processes above 0")
    import torch

    if not torch.cuda.is_available():
        return asked or on_cpu
    devices = torch.cuda.device_count()
    if asked is not None and asked > devices:
        raise ConfigError(
            f"--nproc {asked}: this machine has {devices} GPU{'s' * (devices > 1)} and each "
            f"process needs its own; start at most {devices}, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    return asked or devices


def train_command(recipe: str, overrides: Sequence[str], debug: bool = False) -> list[str]:
    """What each rank of a run is: `mvlm train RECIPE key=value ...` in this interpreter."""
    found_in = Path(__file__).resolve().parents[2]
    # A file of the working directory, say rich.py, must not stand in for a package; but there
    # the package itself may lie, not installed.
    safe_path = [] if found_in == Path.cwd() else ["-P"]
    words = ["train", recipe, *overrides, *(["--debug"] if debug else [])]
    return [sys.executable, *safe_path, "-m", "megatron_vlm", *words]


def rank_environments(count: int, base: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank: `base` and its place in the run.

    Threads are shared out evenly unless OMP_NUM_THREADS says otherwise.
    """
    cores = len(os.sched_getaffinity(0))
    common = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        # What a killed rank had said must be in its file.
        "PYTHONUNBUFFERED": "1",
        **base,
        OWN_OUTPUT: "1",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def _start(command: Sequence[str], number: int, environment: dict[str, str], logs: Path) -> Rank:
    output = logs / f"rank_{number:05d}.out" if number > 0 else None
    stream: IO[bytes] | None = open(output, "ab") if output is not None else None
    try:
        start = stream.tell() if stream is not None else 0
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            # Out of the terminal's reach: Ctrl-C must go to the launcher alone, which asks ranks
            # to save.
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )
    finally:
        if stream is not None:
            stream.close()
    return Rank(number, process, output, start)


def _die_with(launcher: int) -> Any:
    """What a child does between fork and exec: ask Linux to kill it when `launcher` dies."""
    if sys.platform != "linux":
        return None
    # Loaded here, since a fork should do as little as it can.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(FAILED)

    return ask


@contextmanager
def _warden(ranks: Sequence[Rank]) -> Iterator[None]:
    """A process that outlives the launcher by a moment, to kill the ranks' process groups."""
    groups = [str(rank.process.pid) for rank in ranks]
    warden = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WARDEN, *groups],
        stdin=subprocess.PIPE,
        process_group=0,
    )
    try:
        yield
    finally:
        # Killed, not released: by then the numbers of the groups may be others'.
        warden.kill()
        warden.wait()
        assert warden.stdin is not None
        warden.stdin.close()


def _wait(ranks: Sequence[Rank], signals: _StopSignals) -> Rank | None:
    """Until all have ended, or one has failed and its peers had their time; the first to fail."""
    forwarded = False
    first: Rank | None = None
    deadline = 0.0
    while True:
        if signals.kill:
            return first
        if signals.stop and not forwarded:
            forwarded = True
            for rank in ranks:
                rank.ask_to_stop()
        ended = {rank.number: rank.status() for rank in ranks}
        failed = [rank for rank in ranks if ended[rank.number] not in (None, 0)]
        if failed and first is None:
            # Of those that ended within one poll, one killed by a signal made the others fail.
            first = min(failed, key=lambda rank: (ended[rank.number] or 0) > 0)
            deadline = time.monotonic() + _PEER_SECONDS
        if None not in ended.values() or (first is not None and time.monotonic() > deadline):
            return first
        time.sleep(_POLL_SECONDS)


def _verdict(ranks: Sequence[Rank], first: Rank | None, signals: _StopSignals) -> int:
    """The launcher's exit code; tells the person what went wrong."""
    if signals.kill:
        _say("killed")
        return INTERRUPTED
    if first is None:
        return INTERRUPTED if signals.interrupted else 0
    status = first.status()
    assert status is not None
    if status == -signal.SIGTERM and signals.stop:
        _say("stopped before the run could save: it had not reached its first step")
        return INTERRUPTED if signals.interrupted else TERMINATED
    # Wrong input on one rank breaks the connections of the others, which may end before it does.
    misled = [rank for rank in ranks if rank.status() == USER_ERROR]
    if misled:
        if misled[0].number > 0:
            _tell(misled[0], "met wrong input")
        # Else rank 0 has said it, in one line.
        return USER_ERROR
    how = f"was killed by {_signal_name(-status)}" if status < 0 else f"exited with {status}"
    _tell(first, f"failed first: it {how}")
    return FAILED


def _tell(rank: Rank, what: str) -> None:
    lines = rank.last_lines()
    where = f"; its last lines, from {rank.output}:" if lines else ""
    _say(f"rank {rank.number} {what}{where}")
    for line in lines:
        print(f"  {line}", file=sys.stderr)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    print(f"mvlm launch: {text}", file=sys.stderr, flush=True)


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.kill_group()
    for rank in ranks:
        rank.process.wait()


@dataclass
class _StopSignals:
    """Remembers the signals that ask to stop; a context manager around the run."""

    stop: bool = False
    interrupted: bool = False
    kill: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _StopSignals:
        for number in _STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.kill = self.interrupted
            self.interrupted = True
            if not self.kill:
                _say("asking the ranks to save and leave; Ctrl-C again kills the run")
        self.stop = True
