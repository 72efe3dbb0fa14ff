"""A process that has imported what a rank imports, and forks the ranks of its node.

A restart then costs a fork and not the imports, which on a cluster are thousands of processes
reading the same files; spares have them ready too. It speaks with its agent in lines of JSON over
a socket that it inherits. Ranks are killed when it goes, and it goes when its agent does.

Run as `python -m megatron_vlm.resilience.template FD MODULES ENTRY`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

_POLL_SECONDS = 0.05
_SET_PARENT_DEATH_SIGNAL = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STACKS_SIGNAL = signal.SIGUSR2
"""A rank that gets it writes the stacks of all its threads, even one that is stuck in C."""


class Template:
    """Forks ranks, tells how they end, and ends them."""

    def __init__(self, link: socket.socket, entry: Callable[[Sequence[str]], int]) -> None:
        """Ranks call `entry` with their arguments; `link` leads to the agent."""
        self._link, self._entry = link, entry
        self._unread = b""
        self._ranks: dict[int, int] = {}
        """Processes by rank, ended ones too: until `clear` their numbers must stay taken."""
        self._ended: set[int] = set()

    def serve(self) -> None:
        """Until the agent is gone."""
        # Slurm signals every process of a step; what a signal means to ranks is theirs to say.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        selector = selectors.DefaultSelector()
        selector.register(self._link, selectors.EVENT_READ)
        try:
            while True:
                if selector.select(_POLL_SECONDS if self._ranks else None) and not self._read():
                    return
                self._tell_ended()
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            self._clear()

    def _read(self) -> bool:
        received = self._link.recv(1 << 20)
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            kind = message.pop("kind")
            if kind == "start":
                self._start(**message)
            elif kind == "signal":
                self._signal(**message)
            elif kind == "clear":
                self._clear()
                self._tell("cleared")
        return bool(received)

    def _start(self, ranks: list[dict[str, Any]], arguments: list[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in ranks:
            pid = os.fork()
            if pid == 0:
                self._be(rank, arguments)
            self._ranks[rank["rank"]] = pid
        self._tell("started", pids=self._ranks)

    def _be(self, rank: dict[str, Any], arguments: list[str]) -> None:
        """Become a rank; does not return."""
        code = 1
        try:
            template = os.getppid()
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() != template:
                os._exit(code)
            os.setpgid(0, 0)
            self._link.close()
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(rank["environment"])
            output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            stacks = open(rank["stacks"], "w")
            faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
            from megatron_vlm.resilience import heartbeat

            heartbeat.begin()
            code = self._entry(arguments)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Not the template's own end, with its handlers of exit.
            os._exit(code)

    def _signal(self, number: int) -> None:
        for rank, pid in self._ranks.items():
            if rank not in self._ended:
                os.kill(pid, number)

    def _tell_ended(self) -> None:
        for rank, pid in self._ranks.items():
            if rank in self._ended:
                continue
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self._ended.add(rank)
                by_signal = ended.si_code != os.CLD_EXITED
                status = -ended.si_status if by_signal else ended.si_status
                self._tell("ended", rank=rank, status=status)

    def _clear(self) -> None:
        """Kill all ranks with what they have forked, and forget them."""
        for pid in self._ranks.values():
            for end in (os.killpg, os.kill):
                try:
                    end(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
        for pid in self._ranks.values():
            os.waitpid(pid, 0)
        self._ranks, self._ended = {}, set()

    def _tell(self, kind: str, **content: Any) -> None:
        self._link.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")


def main() -> None:
    """Import, then serve."""
    started = time.monotonic()
    link = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for name in filter(None, sys.argv[2].split(",")):
        importlib.import_module(name)
    module, _, name = sys.argv[3].partition(":")
    entry = getattr(importlib.import_module(module), name)
    # A collection would write to every object, and each rank then get its own copy.
    gc.collect()
    gc.freeze()
    template = Template(link, entry)
    template._tell("ready", seconds=time.monotonic() - started)
    template.serve()


if __name__ == "__main__":
    main()
