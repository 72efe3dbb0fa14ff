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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_vlm.config.schema import ResilienceConfig
from megatron_vlm.resilience import attempts, events, slurm
from megatron_vlm.resilience.attempt import Attempt, Ended, Outcome, told_status
from megatron_vlm.resilience.crew import Crew, Node, Program
from megatron_vlm.resilience.hangs import Beat, Hang, find_hang
from megatron_vlm.resilience.policy import Failure, RestartPolicy
from megatron_vlm.resilience.protocol import ADDRESS, SECRET, listen

STATUS = "status.json"
_POLL_SECONDS = 0.1
_STATUS_SECONDS = 1.0
_FOLLOW_SECONDS = 0.5
_STACKS_SECONDS = 1.0
_SPARES_SECONDS = 5.0


class Starter(Protocol):
    """Brings an agent up on every node."""

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the agents, with these variables on top of this process's."""

    def running(self) -> bool:
        """Whether agents may still come."""

    def stop(self) -> None:
        """End them."""


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
        self._changed = asyncio.Event()
        self._crew = Crew(settings, program, self._tell, self._hear, self._changed.set)
        self._avoided: set[str] = set()
        self._policy = RestartPolicy(settings.max_restarts, settings.crash_loop)
        self._attempt: Attempt | None = None
        self._stop_signal: int | None = None
        self._restarts = 0
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
        server, port = await listen(secret, self._crew.accept)
        environment = {SECRET: secret, ADDRESS: f"{_own_name()}:{port}"}
        background = [
            asyncio.create_task(self._write_status()),
            asyncio.create_task(_follow(self.run_dir / "logs" / "rank_00000.out")),
        ]
        try:
            self._starter.start(environment)
            outcome = await self._attempts()
            self._tell("ended", outcome=outcome.kind, why=outcome.why)
            self._state = outcome.kind
            await self._crew.dismiss()
        finally:
            for task in background:
                task.cancel()
            self._save_status()
            server.close()
            # Agents that are cut off end by themselves when nobody answers.
            await loop.run_in_executor(None, self._starter.stop)
        return outcome

    def ask_to_stop(self, number: int) -> None:
        """Have the ranks save and leave."""
        if self._stop_signal is None:
            self._stop_signal = number
            self._tell("asked to stop", signal=signal.Signals(number).name)
            self._changed.set()

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
            ready = [node for node in self._crew.nodes.values() if node.ready]
            good = [node for node in ready if node.name not in self._avoided]
            if len(good) < self._needed and now > patience:
                # An avoided node is better than none.
                good += [node for node in ready if node.name in self._avoided]
            if len(good) >= self._needed and enough_at is None:
                enough_at = now
            # At first a moment more, so that ranks lie in the order of nodes if they can.
            early = self._attempt is None and len(good) < self._needed + self._spares
            if enough_at is not None and not (early and now < enough_at + _SPARES_SECONDS):
                if len(good) >= self._needed:
                    return self._in_order(good)[: self._needed]
                enough_at = None
            too_few = len(self._crew.nodes) < self._needed
            lost = self._attempt is not None and too_few and now > patience
            if lost or now > deadline or not self._starter.running():
                return Outcome(
                    "no nodes",
                    f"{len(good)} of {self._needed} nodes are ready",
                    tuple(sorted(self._avoided)),
                )
            await self._sleep(1.0)

    def _in_order(self, nodes: list[Node]) -> list[Node]:
        """Those of the last attempt as they were, then the others by name."""
        last = self._attempt.nodes if self._attempt is not None else []
        order = {name: number for number, name in enumerate(last)}
        return sorted(nodes, key=lambda n: (order.get(n.name, len(order)), _natural(n.name)))

    async def _try(self, nodes: list[Node]) -> Outcome | Failure:
        """One attempt, from its start until all its ranks are gone."""
        names = [node.name for node in nodes]
        attempts.forget_finished(self.run_dir)
        number = attempts.take_next(self.run_dir, job=self._job, nodes=names)
        attempt = self._attempt = Attempt(number, names, self._per_node, self.run_dir)
        self._state = "running"
        started = time.time()
        self._tell("attempt", attempt=number, nodes=names, ranks=attempt.world_size)
        try:
            port = await self._crew.free_port(nodes[0])
            for place, node in enumerate(nodes):
                node.beats = {}
                ranks = attempt.ranks_on(place, nodes[0].line.other_address, port)
                words = self._program.arguments
                await node.line.send("start", attempt=number, ranks=ranks, arguments=words)
            result = await self._watch(attempt)
        except OSError as error:
            result = Failure("could not start", 0, str(error))
        self._state = "stopping ranks"
        await self._crew.clear(nodes)
        if isinstance(result, Failure):
            self._tell(
                "failed", attempt=number, cause=result.cause, step=result.step,
                ranks=list(result.ranks), nodes=list(result.nodes), error=result.signature,
                ran_s=round(time.time() - started, 1),
            )  # fmt: skip
        return result

    async def _watch(self, attempt: Attempt) -> Outcome | Failure:
        started = time.monotonic()
        while True:
            await self._sleep(_POLL_SECONDS)
            now = time.monotonic()
            if self._stop_signal is not None and not attempt.asked_to_stop:
                attempt.asked_to_stop = True
                await self._crew.send(attempt.nodes, "signal", number=int(signal.SIGTERM))
            ended = attempt.verdict(now)
            if ended is not None:
                self._tell_death(attempt, ended)
                return ended
            lost = tuple(name for name in attempt.nodes if name not in self._crew.nodes)
            if lost:
                return Failure("node lost", attempt.furthest, "", attempt.ranks_of(lost), lost)
            beats = self._beats(attempt)
            self._note_progress(attempt, beats)
            if len(beats) + len(attempt.ended) < attempt.world_size:
                if now - started > self._settings.start_timeout_s:
                    return Failure("could not start", attempt.furthest, "no sign of all ranks")
                continue
            hang = find_hang(beats, self._settings.hang_timeout_s, self._settings.start_timeout_s)
            if hang is not None:
                return attempt.left_alone() if attempt.ended else await self._hung(attempt, hang)

    def _tell_death(self, attempt: Attempt, ended: Outcome | Failure) -> None:
        if isinstance(ended, Failure) and ended.ranks:
            first = attempt.first_failed()
            self._tell(
                "rank died", attempt=attempt.number, rank=first.rank, node=first.node,
                status=told_status(first.status), step=first.step, phase=first.phase,
                last_lines=first.lines[-5:],
            )  # fmt: skip

    async def _hung(self, attempt: Attempt, hang: Hang) -> Failure:
        beats = self._beats(attempt)
        await self._crew.send(attempt.nodes, "dump")
        await asyncio.sleep(_STACKS_SECONDS)
        failure, told = attempt.hung(hang, beats)
        self._tell("hang", attempt=attempt.number, **told)
        return failure

    def _beats(self, attempt: Attempt) -> dict[int, Beat]:
        """Of the ranks that run."""
        found = self._crew.beats(attempt.nodes)
        return {rank: beat for rank, beat in found.items() if rank not in attempt.ended}

    def _note_progress(self, attempt: Attempt, beats: Mapping[int, Beat]) -> None:
        reached = max((beat.step for beat in beats.values()), default=0)
        if reached > 0 and attempt.reached == 0:
            self._tell("training", attempt=attempt.number, step=reached)
        attempt.reached = max(attempt.reached, reached)

    def _hear(self, node: Node, kind: str, content: dict[str, Any]) -> None:
        """What an agent tells of its ranks or of the job."""
        attempt = self._attempt
        if kind == "signalled":
            self.ask_to_stop(int(content["number"]))
        elif kind == "ended" and attempt is not None and attempt.number == content.pop("attempt"):
            ended = Ended(node=node.name, **content)
            attempt.ended[ended.rank] = ended

    # Telling

    def _tell(self, event: str, **about: Any) -> None:
        events.tell(self.run_dir, event, job=self._job, **about)
        shown = " ".join(f"{k}={v}" for k, v in about.items() if v not in (None, [], ""))
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {event} {shown}", flush=True)

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
                for name, node in self._crew.nodes.items()
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


async def _follow(output: Path) -> None:
    """Pass on what a file is given from now on."""
    position = output.stat().st_size if output.exists() else 0
    while True:
        if output.exists():
            with open(output, "rb") as stream:
                stream.seek(position)
                said = stream.read(1 << 20)
            position += len(said)
            print(said.decode(errors="replace"), end="", flush=True)
        await asyncio.sleep(_FOLLOW_SECONDS)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts node9 before node10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _own_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or "127.0.0.1"
