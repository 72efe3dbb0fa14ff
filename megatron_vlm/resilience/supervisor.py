"""The supervisor of a run: starts it on healthy nodes, watches it, and starts it again.

It runs beside the first node's agent, under Slurm as the job's batch process. Agents connect to it
and stay; a restart is a message to them. Spares are agents that wait, with all imports done.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_vlm.config.schema import ResilienceConfig
from megatron_vlm.resilience import attempts, events, slurm
from megatron_vlm.resilience.hangs import Beat, Hang, find_hang
from megatron_vlm.resilience.policy import Failure, RestartPolicy, signature
from megatron_vlm.resilience.protocol import ADDRESS, SECRET, Line, listen

USER_ERROR = 2
STATUS = "status.json"
_LEASE_SHARE = 0.75
_POLL_SECONDS = 0.1
_STATUS_SECONDS = 1.0
_FOLLOW_SECONDS = 0.5
_STACKS_SECONDS = 1.0
_SPARES_SECONDS = 5.0
_PEER_SECONDS = 2.0
"""After a rank has failed, for others to say why; the first error is often not the first seen."""


class Starter(Protocol):
    """Brings an agent up on every node."""

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the agents, with these variables on top of this process's."""

    def running(self) -> bool:
        """Whether agents may still come."""

    def stop(self) -> None:
        """End them."""


class Program(NamedTuple):
    """What ranks run."""

    modules: tuple[str, ...]
    """Imported once on every node."""
    entry: str
    """`module:function`, called with `arguments` in each rank."""
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = {}
    """Defaults of variables that must be there before the imports."""


@dataclass
class Node:
    """An agent that is connected."""

    name: str
    line: Line
    heard: float
    ready: bool = False
    beats: dict[int, Beat] = field(default_factory=dict)
    beats_at: float = 0.0
    cleared: asyncio.Event = field(default_factory=asyncio.Event)
    port: asyncio.Future[int] | None = None


@dataclass
class Ended:
    """A rank that has ended."""

    rank: int
    node: str
    status: int
    step: int
    phase: str
    lines: list[str]


@dataclass
class _Attempt:
    number: int
    nodes: list[str]
    """In the order of ranks."""
    ended: dict[int, Ended] = field(default_factory=dict)
    first_failed_at: float | None = None
    furthest: int = 0


class Outcome(NamedTuple):
    """How a supervisor's work ended."""

    kind: str
    """`finished`, `stopped` (saved, when asked to), `refused` (wrong input), `gave up` or
    `no nodes`."""
    why: str = ""
    avoid: tuple[str, ...] = ()
    """Nodes that the next job should keep off."""


class Supervisor:
    """One job's care for one run."""

    def __init__(
        self,
        run_dir: Path,
        settings: ResilienceConfig,
        program: Program,
        starter: Starter,
        nodes: int,
        spares: int,
        ranks_per_node: int,
        job: str | None,
    ) -> None:
        """Of a run that needs `nodes` nodes with `ranks_per_node` ranks each."""
        self.run_dir, self._settings, self._program = run_dir, settings, program
        self._starter, self._needed, self._per_node = starter, nodes, ranks_per_node
        self._job, self._spares = job, spares
        self._nodes: dict[str, Node] = {}
        self._avoided: set[str] = set()
        self._policy = RestartPolicy(settings.max_restarts, settings.crash_loop)
        self._attempt: _Attempt | None = None
        self._changed = asyncio.Event()
        self._stop_signal: int | None = None
        self._told_stop = False
        self._restarts = 0
        self._server: asyncio.Server | None = None
        self._state = "starting"
        self._remember()

    def _remember(self) -> None:
        """What this job did before it was requeued counts on."""
        for entry in events.read(self.run_dir):
            if self._job is not None and entry.get("job") == self._job:
                if entry["event"] == "failed":
                    told = (entry[name] for name in ("cause", "step", "error", "ranks", "nodes"))
                    cause, step, error, ranks, nodes = told
                    failure = Failure(cause, step, error, tuple(ranks), tuple(nodes))
                    self._avoided.update(self._policy.decide(failure).avoid)
                    self._restarts += 1

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked this job to end, if any has."""
        return self._stop_signal

    async def run(self) -> Outcome:
        """To the end of the run, or as far as this job gets."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_to_stop, number)
        secret = secrets.token_hex(32)
        self._server, port = await listen(secret, self._accept)
        environment = {SECRET: secret, ADDRESS: f"{_own_name()}:{port}"}
        background = [
            asyncio.create_task(self._write_status()),
            asyncio.create_task(self._follow(self.run_dir / "logs" / "rank_00000.out")),
        ]
        try:
            self._starter.start(environment)
            outcome = await self._attempts()
            self._tell("ended", outcome=outcome.kind, why=outcome.why)
            self._state = outcome.kind
            await self._dismiss()
        finally:
            for task in background:
                task.cancel()
            self._save_status()
            self._server.close()
            # Agents that are cut off end by themselves when nobody answers.
            await loop.run_in_executor(None, self._starter.stop)
        return outcome

    def ask_to_stop(self, number: int) -> None:
        """Have the ranks save and leave."""
        if self._stop_signal is None:
            self._stop_signal = number
            self._tell("asked to stop", signal=signal.Signals(number).name)
            self._changed.set()

    # Attempts

    async def _attempts(self) -> Outcome:
        while True:
            chosen = await self._choose()
            if isinstance(chosen, Outcome):
                return chosen
            outcome = await self._try(chosen)
            if isinstance(outcome, Outcome):
                return outcome
            decision = self._policy.decide(outcome)
            if decision.give_up is not None:
                return Outcome("gave up", decision.give_up)
            for node in set(decision.avoid) - self._avoided:
                await self._avoid(node, f"mvlm: repeated faults, the last: {outcome.cause}")
            self._restarts += 1
            self._tell("restart", number=self._restarts, wait=decision.wait)
            waited_until = time.monotonic() + decision.wait
            while time.monotonic() < waited_until and self._stop_signal is None:
                await self._sleep(waited_until - time.monotonic())

    async def _avoid(self, node: str, reason: str) -> None:
        """Keep off a node, and have Slurm give it no more work where this user may ask for that."""
        self._avoided.add(node)
        drained = self._job is not None and await asyncio.to_thread(slurm.drain, node, reason)
        self._tell("node avoided", node=node, reason=reason, drained=drained)

    async def _choose(self) -> list[Node] | Outcome:
        """Nodes for the next attempt; those of the last one that are still good come first."""
        self._state = "waiting for nodes"
        deadline = time.monotonic() + self._settings.start_timeout_s
        patience = time.monotonic() + self._settings.node_timeout_s
        enough_at: float | None = None
        while True:
            if self._stop_signal is not None:
                return Outcome("stopped", "before the ranks were started")
            now = time.monotonic()
            good = [n for n in self._nodes.values() if n.ready and n.name not in self._avoided]
            if len(good) < self._needed and now > patience:
                # An avoided node is better than none.
                good += [n for n in self._nodes.values() if n.ready and n.name in self._avoided]
            last = self._attempt.nodes if self._attempt is not None else []
            if len(good) >= self._needed and enough_at is None:
                enough_at = now
            # At first a moment more, so that ranks lie in the order of nodes if they can.
            early = self._attempt is None and len(good) < self._needed + self._spares
            if enough_at is not None and not (early and now < enough_at + _SPARES_SECONDS):
                order = {name: number for number, name in enumerate(last)}
                good.sort(key=lambda n: (order.get(n.name, len(order)), _natural(n.name)))
                return good[: self._needed]
            connected = len(self._nodes)
            lost = self._attempt is not None and connected < self._needed and now > patience
            if lost or now > deadline or not self._starter.running():
                return Outcome(
                    "no nodes",
                    f"{len(good)} of {self._needed} nodes are ready",
                    tuple(sorted(self._avoided)),
                )
            await self._sleep(1.0)

    async def _try(self, nodes: list[Node]) -> Outcome | Failure:
        """One attempt, from its start until all its ranks are gone."""
        names = [node.name for node in nodes]
        attempts.forget_finished(self.run_dir)
        number = attempts.take_next(self.run_dir, job=self._job, nodes=names)
        attempt = self._attempt = _Attempt(number, names)
        self._told_stop = False
        self._state = "running"
        started = time.time()
        self._tell("attempt", attempt=number, nodes=names, ranks=len(names) * self._per_node)
        try:
            await self._start(attempt, nodes)
            result = await self._watch(attempt)
        except OSError as error:
            result = Failure("could not start", 0, str(error))
        self._state = "stopping ranks"
        await self._clear(nodes)
        if isinstance(result, Failure):
            self._tell(
                "failed", attempt=number, cause=result.cause, step=result.step,
                ranks=list(result.ranks), nodes=list(result.nodes), error=result.signature,
                ran_s=round(time.time() - started, 1),
            )  # fmt: skip
        return result

    async def _start(self, attempt: _Attempt, nodes: list[Node]) -> None:
        loop, first = asyncio.get_running_loop(), nodes[0]
        first.port = loop.create_future()
        await first.line.send("port", attempt=attempt.number)
        try:
            port = await asyncio.wait_for(first.port, self._settings.node_timeout_s)
        except TimeoutError:
            raise OSError(f"{first.name} does not answer") from None
        logs = self.run_dir / "logs"
        world = len(nodes) * self._per_node
        for place, node in enumerate(nodes):
            node.beats = {}
            ranks = []
            for local in range(self._per_node):
                rank = place * self._per_node + local
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(local),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(self._per_node),
                    "MASTER_ADDR": first.line.other_address,
                    "MASTER_PORT": str(port),
                    "MVLM_OWN_OUTPUT": "1",
                    attempts.VARIABLE: str(attempt.number),
                }
                ranks.append({
                    "rank": rank,
                    "environment": environment,
                    "output": str(logs / f"rank_{rank:05d}.out"),
                    "stacks": str(self._stacks(attempt, rank)),
                })  # fmt: skip
            await node.line.send(
                "start", attempt=attempt.number, ranks=ranks, arguments=self._program.arguments
            )

    async def _watch(self, attempt: _Attempt) -> Outcome | Failure:
        world, started = len(attempt.nodes) * self._per_node, time.monotonic()
        while True:
            await self._sleep(_POLL_SECONDS)
            now = time.monotonic()
            if self._stop_signal is not None and not self._told_stop:
                self._told_stop = True
                await self._to_ranks(attempt, "signal", number=int(signal.SIGTERM))
            ended = self._verdict(attempt, world, now)
            if ended is not None:
                return ended
            lost = [name for name in attempt.nodes if name not in self._nodes]
            if lost:
                told = tuple(lost)
                return Failure("node lost", attempt.furthest, "", self._ranks_of(told), told)
            beats = self._beats(attempt)
            self._note_progress(attempt, beats)
            if len(beats) + len(attempt.ended) < world:
                if now - started > self._settings.start_timeout_s:
                    return Failure("could not start", attempt.furthest, "no sign of all ranks")
                continue
            hang = find_hang(beats, self._settings.hang_timeout_s, self._settings.start_timeout_s)
            if hang is not None and attempt.ended:
                gone = tuple(sorted(attempt.ended))
                names = tuple(sorted({attempt.ended[rank].node for rank in gone}))
                said = "left as if the run had ended, others wait"
                return Failure("rank died", self._furthest(attempt), said, gone, names)
            if hang is not None:
                return await self._hung(attempt, hang, beats)

    def _verdict(self, attempt: _Attempt, world: int, now: float) -> Outcome | Failure | None:
        """What the ranks that have ended mean, once that can be told."""
        ended = attempt.ended
        failed = [rank for rank in ended.values() if rank.status != 0]
        if not failed:
            if len(ended) < world:
                return None
            if (self.run_dir / attempts.FINISHED).exists():
                return Outcome("finished")
            if self._told_stop:
                return Outcome("stopped", f"saved at step {self._furthest(attempt)}")
            return Failure("rank died", self._furthest(attempt), "ended before the last step")
        if attempt.first_failed_at is None:
            attempt.first_failed_at = now
        if len(ended) < world and now - attempt.first_failed_at < _PEER_SECONDS:
            return None
        # Wrong input on one rank breaks the connections of the others, which may end before it.
        misled = [rank for rank in failed if rank.status == USER_ERROR]
        if misled:
            said = [line for line in misled[0].lines if "error" in line]
            return Outcome("refused", said[-1] if said else "wrong input")
        # One killed by a signal made the others fail; so did the one that ended first.
        first = min(failed, key=lambda rank: rank.status > 0)
        if first.status in (-signal.SIGTERM, -signal.SIGUSR1) and self._told_stop:
            return Outcome("stopped", "before the run could save")
        text = signature(first.lines, first.status)
        self._tell(
            "rank died", attempt=attempt.number, rank=first.rank, node=first.node,
            status=_status(first.status), step=first.step, phase=first.phase,
            last_lines=first.lines[-5:],
        )  # fmt: skip
        step = self._furthest(attempt)
        return Failure("rank died", step, text, (first.rank,), (first.node,))

    async def _hung(self, attempt: _Attempt, hang: Hang, beats: Mapping[int, Beat]) -> Failure:
        await self._to_ranks(attempt, "dump")
        await asyncio.sleep(_STACKS_SECONDS)
        nodes = tuple(sorted({self._node_of(attempt, rank) for rank in hang.culprits}))
        told = [
            {
                "rank": rank,
                "node": self._node_of(attempt, rank),
                "step": beats[rank].step,
                "phase": beats[rank].phase,
                "place": beats[rank].place,
                "stack": self._read_stack(attempt, rank),
            }
            for rank in hang.culprits
        ]
        where: dict[str, list[int]] = {}
        for rank, beat in sorted(beats.items()):
            waits = ", waits" if beat.waits else ""
            where.setdefault(f"step {beat.step} {beat.phase}{waits}: {beat.place}", []).append(rank)
        self._tell(
            "hang", attempt=attempt.number, still_s=round(hang.seconds, 1), culprits=told,
            why=hang.why, where=where, stacks=str(self._stacks(attempt, 0).parent),
        )  # fmt: skip
        places = sorted(f"{beats[rank].phase} {beats[rank].place}" for rank in hang.culprits)
        step = self._furthest(attempt)
        return Failure("hang", step, places[0] if places else "", hang.culprits, nodes)

    # What is known of ranks

    def _beats(self, attempt: _Attempt) -> dict[int, Beat]:
        """Of the ranks that run, as of now."""
        now, found = time.monotonic(), {}
        for name in attempt.nodes:
            node = self._nodes.get(name)
            for rank, beat in (node.beats if node is not None else {}).items():
                if rank not in attempt.ended:
                    assert node is not None
                    old = now - node.beats_at
                    aged = beat._replace(age=beat.age + old, look_age=beat.look_age + old)
                    found[rank] = aged
        return found

    def _note_progress(self, attempt: _Attempt, beats: Mapping[int, Beat]) -> None:
        furthest = max((beat.step for beat in beats.values()), default=0)
        if furthest > 0 and attempt.furthest == 0:
            self._tell("training", attempt=attempt.number, step=furthest)
        attempt.furthest = max(attempt.furthest, furthest)

    def _furthest(self, attempt: _Attempt) -> int:
        ended = [rank.step for rank in attempt.ended.values()]
        return max([attempt.furthest, *ended])

    def _node_of(self, attempt: _Attempt, rank: int) -> str:
        return attempt.nodes[rank // self._per_node]

    def _ranks_of(self, nodes: Sequence[str]) -> tuple[int, ...]:
        assert self._attempt is not None
        world = range(len(self._attempt.nodes) * self._per_node)
        return tuple(r for r in world if self._node_of(self._attempt, r) in nodes)

    def _stacks(self, attempt: _Attempt, rank: int) -> Path:
        return self.run_dir / "logs" / f"stacks_{attempt.number:06d}" / f"rank_{rank:05d}.txt"

    def _read_stack(self, attempt: _Attempt, rank: int) -> list[str]:
        """The innermost calls of a rank's main thread."""
        try:
            text = self._stacks(attempt, rank).read_text(errors="replace")
        except OSError:
            return []
        # The main thread is the one whose stack begins in the template.
        threads = [part.splitlines() for part in text.split("\n\n")]
        main = [lines for lines in threads if any("template.py" in line for line in lines)]
        calls = [line.strip() for line in (main or threads)[-1] if line.startswith("  File")]
        return calls[:8]

    # Agents

    async def _accept(self, line: Line) -> None:
        """One agent's connection, for as long as it lasts."""
        message = await line.receive()
        name = str(message["node"])
        node = Node(name, line, time.monotonic())
        old = self._nodes.pop(name, None)
        if old is not None:
            old.line.close()
        self._nodes[name] = node
        self._tell("node joined", node=name)
        try:
            await line.send(
                "welcome",
                beat=self._settings.beat_s,
                # Its ranks are gone before the node is given up here.
                lease=_LEASE_SHARE * self._settings.node_timeout_s,
                modules=list(self._program.modules),
                entry=self._program.entry,
                environment=dict(self._program.environment),
            )
            while True:
                limit = self._settings.node_timeout_s
                message = await asyncio.wait_for(line.receive(), limit)
                node.heard = time.monotonic()
                await self._hear(node, message)
        except (OSError, EOFError, TimeoutError):
            pass
        finally:
            if self._nodes.get(name) is node:
                del self._nodes[name]
                if self._state not in ("finished", "stopped", "refused", "gave up", "no nodes"):
                    self._tell("node lost", node=name)
            self._changed.set()

    async def _hear(self, node: Node, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat":
            node.beats = {int(rank): Beat(*told) for rank, told in message["ranks"].items()}
            node.beats_at = time.monotonic()
            await node.line.send("ack")
            return
        if kind == "ready":
            node.ready = True
        elif kind == "port" and node.port is not None and not node.port.done():
            node.port.set_result(int(message["port"]))
        elif kind == "cleared":
            node.cleared.set()
        elif kind == "signalled":
            self.ask_to_stop(int(message["number"]))
        elif kind == "ended":
            attempt = self._attempt
            if attempt is not None and attempt.number == message.pop("attempt"):
                message.pop("kind")
                ended = Ended(node=node.name, **message)
                attempt.ended[ended.rank] = ended
        self._changed.set()

    async def _to_ranks(self, attempt: _Attempt, kind: str, **content: Any) -> None:
        for name in attempt.nodes:
            node = self._nodes.get(name)
            if node is not None:
                try:
                    await node.line.send(kind, **content)
                except OSError:
                    pass  # The connection's own loop notices.

    async def _clear(self, nodes: Sequence[Node]) -> None:
        """Have all ranks killed; those of nodes that do not answer end with their lease."""
        there = [node for node in nodes if self._nodes.get(node.name) is node]
        for node in there:
            node.cleared.clear()
            node.beats = {}
            try:
                await node.line.send("clear")
            except OSError:
                pass
        waiting = [asyncio.create_task(node.cleared.wait()) for node in there]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=self._settings.node_timeout_s)
            for task in late:
                task.cancel()
        if len(there) < len(nodes):
            # Until then ranks that we cannot reach may still run.
            heard = max(node.heard for node in nodes if node not in there)
            await self._sleep(heard + self._settings.node_timeout_s - time.monotonic())

    async def _dismiss(self) -> None:
        for node in list(self._nodes.values()):
            try:
                await node.line.send("dismiss")
            except OSError:
                pass

    # Telling

    def _tell(self, event: str, **about: Any) -> None:
        events.tell(self.run_dir, event, job=self._job, **about)
        shown = " ".join(f"{k}={v}" for k, v in about.items() if v not in (None, [], ""))
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {event} {shown}", flush=True)

    async def _follow(self, output: Path) -> None:
        """Pass on what rank 0 says from now on."""
        position = output.stat().st_size if output.exists() else 0
        while True:
            if output.exists():
                with open(output, "rb") as stream:
                    stream.seek(position)
                    said = stream.read(1 << 20)
                position += len(said)
                print(said.decode(errors="replace"), end="", flush=True)
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _write_status(self) -> None:
        while True:
            self._save_status()
            await asyncio.sleep(_STATUS_SECONDS)

    def _save_status(self) -> None:
        attempt = self._attempt
        beats = self._beats(attempt) if attempt is not None else {}
        status = {
            "time": time.time(),
            "state": self._state,
            "job": self._job,
            "host": _own_name(),
            "attempt": attempt.number if attempt is not None else 0,
            "restarts": self._restarts,
            "nodes": {
                name: {
                    "ready": node.ready,
                    "ranks": {
                        rank: {"step": beats[rank].step, "phase": beats[rank].phase}
                        for rank in node.beats if rank in beats
                    },
                }
                for name, node in self._nodes.items()
            },
            "avoided": sorted(self._avoided),
        }  # fmt: skip
        part = self.run_dir / f"{STATUS}.part"
        try:
            part.write_text(json.dumps(status))
            os.replace(part, self.run_dir / STATUS)
        except OSError:
            pass  # A full disk must not end the run.

    async def _sleep(self, seconds: float) -> None:
        """Wait, or less when something changes."""
        self._changed.clear()
        if seconds > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                pass


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts node9 before node10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _own_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or "127.0.0.1"


def _status(status: int) -> str:
    if status >= 0:
        return f"exit {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
