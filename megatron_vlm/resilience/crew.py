"""The agents of a run, as its supervisor sees them: who is there, what they tell, what they do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_vlm.config.schema import ResilienceConfig
from megatron_vlm.resilience.hangs import Beat
from megatron_vlm.resilience.protocol import Line

_LEASE_SHARE = 0.75
"""Of `node_timeout_s`: a node's ranks are gone before the node is given up here."""


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
    """Whether ranks can be forked there."""
    beats: dict[int, Beat] = field(default_factory=dict)
    beats_at: float = 0.0
    cleared: asyncio.Event = field(default_factory=asyncio.Event)
    port: asyncio.Future[int] | None = None


class Crew:
    """All agents that are connected; `accept` serves each of them for as long as it is."""

    def __init__(
        self,
        settings: ResilienceConfig,
        program: Program,
        tell: Callable[..., None],
        hear: Callable[[Node, str, dict[str, Any]], None],
        changed: Callable[[], None],
    ) -> None:
        """Nobody is there yet.

        Args:
            settings: how often agents tell, and when one is given up.
            program: what their templates import.
            tell: called with an event and what it is about.
            hear: called with what concerns a rank or the job: node, kind, content.
            changed: called after anything has changed.
        """
        self._settings, self._program = settings, program
        self._tell, self._hear, self._changed = tell, hear, changed
        self.nodes: dict[str, Node] = {}
        self.dismissed = False

    async def accept(self, line: Line) -> None:
        """One agent's connection, for as long as it lasts."""
        message = await line.receive()
        name = str(message["node"])
        node = Node(name, line, time.monotonic())
        old = self.nodes.pop(name, None)
        if old is not None:
            old.line.close()
        self.nodes[name] = node
        self._tell("node joined", node=name)
        try:
            await line.send(
                "welcome",
                beat=self._settings.beat_s,
                lease=_LEASE_SHARE * self._settings.node_timeout_s,
                modules=list(self._program.modules),
                entry=self._program.entry,
                environment=dict(self._program.environment),
            )
            while True:
                limit = self._settings.node_timeout_s
                message = await asyncio.wait_for(line.receive(), limit)
                node.heard = time.monotonic()
                await self._take(node, message)
        except (OSError, EOFError, TimeoutError):
            pass
        finally:
            if self.nodes.get(name) is node:
                del self.nodes[name]
                if not self.dismissed:
                    self._tell("node lost", node=name)
            self._changed()

    async def _take(self, node: Node, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
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
        else:
            self._hear(node, kind, message)
        self._changed()

    def beats(self, names: Iterable[str]) -> dict[int, Beat]:
        """Of the ranks of some nodes, as of now."""
        now, found = time.monotonic(), {}
        for node in filter(None, map(self.nodes.get, names)):
            old = now - node.beats_at
            for rank, beat in node.beats.items():
                found[rank] = beat._replace(age=beat.age + old, look_age=beat.look_age + old)
        return found

    async def free_port(self, node: Node) -> int:
        """A port that nothing listens on there.

        Raises:
            OSError: the node does not answer.
        """
        node.port = asyncio.get_running_loop().create_future()
        await node.line.send("port")
        try:
            return await asyncio.wait_for(node.port, self._settings.node_timeout_s)
        except TimeoutError:
            raise OSError(f"{node.name} does not answer") from None

    async def send(self, names: Iterable[str], kind: str, **content: Any) -> None:
        """Send a message to those of some nodes that are there."""
        for node in filter(None, map(self.nodes.get, list(names))):
            try:
                await node.line.send(kind, **content)
            except OSError:
                pass  # The connection's own loop notices.

    async def clear(self, nodes: Sequence[Node]) -> None:
        """Have all ranks killed; those of nodes that do not answer end with their lease."""
        there = [node for node in nodes if self.nodes.get(node.name) is node]
        for node in there:
            node.cleared.clear()
            node.beats = {}
        await self.send([node.name for node in there], "clear")
        waiting = [asyncio.create_task(node.cleared.wait()) for node in there]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=self._settings.node_timeout_s)
            for task in late:
                task.cancel()
        if len(there) < len(nodes):
            # Until then ranks that we cannot reach may still run.
            heard = max(node.heard for node in nodes if node not in there)
            await asyncio.sleep(heard + self._settings.node_timeout_s - time.monotonic())

    async def dismiss(self) -> None:
        """Let all agents go."""
        self.dismissed = True
        await self.send(self.nodes, "dismiss")
