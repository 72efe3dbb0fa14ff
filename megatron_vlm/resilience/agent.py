"""The agent of a node: starts the node's ranks when it is told to, and tells how they are.

It holds its ranks on a lease. An agent that has not heard from its supervisor for so long kills
them, since others may by then have been started in their place, and asks to be taken back.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_vlm.resilience import heartbeat, slurm
from megatron_vlm.resilience.protocol import ADDRESS, SECRET, Line, Refused, open_line
from megatron_vlm.resilience.template import STACKS_SIGNAL

_RETRY_SECONDS = 0.5
_FIRST_BEAT_SECONDS = 0.1
_RESCUE_SECONDS = 2.0
_LAST_LINES, _LAST_BYTES = 20, 1 << 14


class Agent:
    """One node's agent, over all its connections to the supervisor."""

    def __init__(self, node: str, folder: Path) -> None:
        """Known as `node`; pages of the ranks lie in `folder`, which is this node's own."""
        self.node, self._folder = node, folder
        self._line: Line | None = None
        self._heard = 0.0
        self._beat_s, self._lease_s = _FIRST_BEAT_SECONDS, 1.0
        self._template: _TemplateProcess | None = None
        self._running: dict[int, dict[str, Any]] = {}
        self._dismissed = self._asked = False
        self._next_rescue = 0.0

    async def run(self, host: str, port: int, secret: str, patience: float) -> int:
        """Serve until dismissed, or until nobody has answered for `patience` seconds."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        deadline = time.monotonic() + patience
        try:
            while not self._dismissed and time.monotonic() < deadline:
                if self._asked:
                    # Nobody is left to decide, and Slurm wants the node back.
                    break
                try:
                    line = await asyncio.wait_for(open_line(host, port, secret), 5.0)
                except (OSError, Refused, TimeoutError):
                    await asyncio.gather(asyncio.sleep(_RETRY_SECONDS), self._rescue(host))
                    continue
                await self._serve(line)
                await self._clear()
                deadline = time.monotonic() + patience
        finally:
            if self._template is not None:
                await self._template.close()
        return 0 if self._dismissed else 1

    async def _rescue(self, host: str) -> None:
        """Have the job started again when the supervisor's node is down.

        Slurm lets a job with --no-kill run on without its batch script, to the time limit.
        """
        job, now = slurm.own_job(), time.monotonic()
        if job is None or self._asked or now < self._next_rescue:
            return
        self._next_rescue = now + _RESCUE_SECONDS
        try:
            if await asyncio.to_thread(slurm.is_down, host):
                await asyncio.to_thread(slurm.requeue, job)
                print(f"{self.node}: {host} is down; job {job} requeued", flush=True)
                self._asked = True
        except slurm.SlurmError as error:
            print(f"{self.node}: no supervisor, and {error}", flush=True)

    async def _serve(self, line: Line) -> None:
        """One connection, until it breaks, the lease runs out or the supervisor says goodbye."""
        self._line, self._heard = line, time.monotonic()
        loops = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
        try:
            await line.send("hello", node=self.node, pid=os.getpid())
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for task in loops:
                task.cancel()
            for ended in await asyncio.gather(*loops, return_exceptions=True):
                expected = (OSError, EOFError, Refused, asyncio.CancelledError)
                if isinstance(ended, BaseException) and not isinstance(ended, expected):
                    raise ended
            self._line = None
            line.close()

    async def _listen(self) -> None:
        assert self._line is not None
        while not self._dismissed:
            message = await self._line.receive()
            self._heard = time.monotonic()
            kind = message.pop("kind")
            if kind != "ack":
                await getattr(self, f"_on_{kind}")(**message)

    async def _on_welcome(
        self,
        beat: float,
        lease: float,
        modules: list[str],
        entry: str,
        environment: dict[str, str],
    ) -> None:
        self._beat_s, self._lease_s = beat, lease
        if self._template is None or not self._template.alive:
            self._template = await _TemplateProcess.start(
                modules, entry, environment, self._on_template
            )
        elif self._template.ready:
            await self._tell("ready")

    async def _on_port(self) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            await self._tell("port", port=probe.getsockname()[1])

    async def _on_start(
        self, attempt: int, ranks: list[dict[str, Any]], arguments: list[str]
    ) -> None:
        assert self._template is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        interface = self._interface()
        for rank in ranks:
            page = self._folder / f"rank_{rank['rank']:05d}"
            heartbeat.make_page(page)
            rank["environment"][heartbeat.VARIABLE] = str(page)
            if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
                # Otherwise gloo takes the first address of the host's name, if it has one.
                rank["environment"]["GLOO_SOCKET_IFNAME"] = interface
            for name in ("output", "stacks"):
                Path(rank[name]).parent.mkdir(parents=True, exist_ok=True)
            output = Path(rank["output"])
            start = output.stat().st_size if output.exists() else 0
            self._running[rank["rank"]] = {"attempt": attempt, "page": page, "output": output}
            self._running[rank["rank"]]["start"] = start
        await self._template.send("start", ranks=ranks, arguments=arguments)

    async def _on_signal(self, number: int) -> None:
        if self._template is not None and self._running:
            await self._template.send("signal", number=number)

    async def _on_dump(self) -> None:
        await self._on_signal(STACKS_SIGNAL)

    async def _on_clear(self) -> None:
        await self._clear()
        await self._tell("cleared")

    async def _on_dismiss(self) -> None:
        self._dismissed = True

    async def _clear(self) -> None:
        """Kill this node's ranks."""
        self._running = {}
        if self._template is not None and self._template.alive:
            await self._template.clear()

    async def _on_template(self, message: dict[str, Any]) -> None:
        """What the template says, or that it has ended."""
        kind = message["kind"]
        if kind == "ready":
            await self._tell("ready")
        elif kind == "ended":
            await self._ended(message["rank"], message["status"])
        elif kind == "gone":
            for rank in list(self._running):
                await self._ended(rank, message["status"])
            if self._line is not None:
                # A fresh start: the next welcome brings another template.
                self._line.close()

    async def _ended(self, rank: int, status: int) -> None:
        running = self._running.pop(rank, None)
        if running is None:
            return
        pulse = heartbeat.read_page(running["page"])
        lines = _last_lines(running["output"], running["start"])
        await self._tell(
            "ended", attempt=running["attempt"], rank=rank, status=status, step=pulse.step,
            phase=pulse.phase, lines=lines,
        )  # fmt: skip

    async def _beat(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._heard > self._lease_s:
                return
            pulses = {}
            for rank, running in self._running.items():
                p = heartbeat.read_page(running["page"])
                age, look_age = now - p.since, now - p.looked
                pulses[rank] = [p.step, p.entered, age, p.phase, look_age, p.waits, p.place]
            assert self._line is not None
            await self._line.send("beat", ranks=pulses)
            await asyncio.sleep(self._beat_s)

    async def _tell(self, kind: str, **content: Any) -> None:
        if self._line is not None:
            try:
                await self._line.send(kind, **content)
            except OSError:
                pass  # The connection's own loops notice.

    def _signalled(self, number: int) -> None:
        # Sent to the whole step by Slurm: the supervisor decides what it means, if there is one.
        self._asked = True
        asyncio.get_running_loop().create_task(self._tell("signalled", number=number))

    def _interface(self) -> str | None:
        """The network interface that leads to the supervisor."""
        assert self._line is not None
        own = self._line.own_address
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                return name
        return None


class _TemplateProcess:
    """The template, as its agent sees it."""

    def __init__(self, process: asyncio.subprocess.Process, link: socket.socket) -> None:
        self._process, self._link = process, link
        self.ready = False
        self._cleared = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, modules: list[str], entry: str, environment: dict[str, str], tell: Any
    ) -> _TemplateProcess:
        """Start it; `tell` is awaited with each of its messages."""
        own, theirs = socket.socketpair()
        package = Path(__file__).resolve().parents[2]
        # A file of the working directory, say rich.py, must not stand in for a package.
        safe_path = [] if package == Path.cwd() else ["-P"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *safe_path, "-m", "megatron_vlm.resilience.template",
            str(theirs.fileno()), ",".join(modules), entry,
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env={**environment, **os.environ},
        )  # fmt: skip
        theirs.close()
        own.setblocking(False)
        template = cls(process, own)
        template._reading = asyncio.create_task(template._read(tell))
        return template

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def send(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        try:
            await asyncio.get_running_loop().sock_sendall(self._link, line)
        except OSError:
            pass  # Its end is told by the reader.

    async def clear(self) -> None:
        """Have all ranks killed, and wait for it."""
        self._cleared.clear()
        await self.send("clear")
        waited = asyncio.create_task(self._cleared.wait())
        assert self._reading is not None
        await asyncio.wait([waited, self._reading], return_when=asyncio.FIRST_COMPLETED)
        waited.cancel()

    async def close(self) -> None:
        """End it; its ranks go with it."""
        self._link.close()
        if self._reading is not None:
            self._reading.cancel()
        try:
            await asyncio.wait_for(self._process.wait(), 5.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _read(self, tell: Any) -> None:
        unread, loop = b"", asyncio.get_running_loop()
        while True:
            try:
                received = await loop.sock_recv(self._link, 1 << 20)
            except OSError:
                received = b""
            if not received:
                break
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["kind"] == "cleared":
                    self._cleared.set()
                    continue
                self.ready = self.ready or message["kind"] == "ready"
                await tell(message)
        status = await self._process.wait()
        await tell({"kind": "gone", "status": status or 1})


def _last_lines(output: Path, start: int) -> list[str]:
    with open(output, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(start, end - _LAST_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-_LAST_LINES:]


def main(patience: float) -> int:
    """Run this node's agent as the environment tells it to."""
    host, _, port = os.environ[ADDRESS].rpartition(":")
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="mvlm-agent-", dir=place) as folder:
        agent = Agent(os.environ.get("MVLM_NODE", node), Path(folder))
        return asyncio.run(agent.run(host, int(port), os.environ[SECRET], patience))
