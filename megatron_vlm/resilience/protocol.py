"""How the supervisor and the nodes' agents speak: lines of JSON over TCP, after a proof.

Each side proves that it knows the run's secret before anything else is read from it: a stranger
who finds the port can neither start a process nor pose as a node. Afterwards the connection is as
trusted as those of the ranks themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from typing import Any

SECRET, ADDRESS = "MVLM_SUPERVISOR_SECRET", "MVLM_SUPERVISOR"
"""Environment variables of an agent: the run's secret; `host:port` of the supervisor."""

_LONGEST = 4 << 20
_PROOF_SECONDS = 10.0


class Refused(Exception):
    """The other side does not know the secret, or does not speak this way."""


class Line:
    """One connection, once both sides have proved themselves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Over an open TCP connection; `prove` comes first."""
        self._reader, self._writer = reader, writer

    async def prove(self, secret: str, called: bool) -> None:
        """Prove to each other that both know the secret.

        Args:
            secret: the run's.
            called: whether this side accepted the connection.

        Raises:
            Refused: the other side does not, in time.
        """
        mine = secrets.token_hex(16)
        try:
            async with asyncio.timeout(_PROOF_SECONDS):
                await self._send_text(mine)
                theirs = await self._read_text()
                # Which side says it is part of the proof: it cannot be sent back as an answer.
                await self._send_text(_proof(secret, theirs, mine, called))
                answer = await self._read_text()
        except (OSError, ValueError, EOFError, TimeoutError) as error:
            raise Refused(f"no proof from the other side: {error}") from None
        if not hmac.compare_digest(answer, _proof(secret, mine, theirs, not called)):
            raise Refused("the other side does not know the run's secret")

    async def send(self, kind: str, **content: Any) -> None:
        """Send one message.

        Raises:
            OSError: the connection is gone.
        """
        await self._send_text(json.dumps({"kind": kind, **content}))

    async def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            EOFError: the connection has ended.
            OSError: it broke.
            Refused: what came is no message.
        """
        try:
            message: dict[str, Any] = json.loads(await self._read_text())
            if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
                raise ValueError
        except ValueError:
            raise Refused("the other side sent what is no message") from None
        return message

    @property
    def own_address(self) -> str:
        """The IP address of this side."""
        return str(self._writer.get_extra_info("sockname")[0])

    @property
    def other_address(self) -> str:
        """The IP address of the other side."""
        return str(self._writer.get_extra_info("peername")[0])

    def close(self) -> None:
        """End the connection."""
        self._writer.close()

    async def _send_text(self, text: str) -> None:
        self._writer.write(text.encode() + b"\n")
        await self._writer.drain()

    async def _read_text(self) -> str:
        text = await self._reader.readline()
        if not text.endswith(b"\n"):
            raise EOFError
        return text[:-1].decode()


async def open_line(host: str, port: int, secret: str) -> Line:
    """Connect to the supervisor.

    Raises:
        OSError: nobody is there.
        Refused: someone else is.
    """
    line = Line(*await asyncio.open_connection(host, port, limit=_LONGEST))
    try:
        await line.prove(secret, called=False)
    except BaseException:
        line.close()
        raise
    return line


async def listen(secret: str, accept: Any, host: str = "0.0.0.0") -> tuple[asyncio.Server, int]:
    """Accept agents; returns the server and its port.

    Args:
        secret: the run's.
        accept: awaited with each `Line` that has proved itself.
        host: address to listen on.
    """

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        try:
            await line.prove(secret, called=True)
            await accept(line)
        except (Refused, EOFError, OSError):
            pass
        finally:
            line.close()

    server = await asyncio.start_server(greet, host, 0, limit=_LONGEST)
    port: int = server.sockets[0].getsockname()[1]
    return server, port


def _proof(secret: str, challenge: str, own: str, called: bool) -> str:
    said = f"{'called' if called else 'caller'} {challenge} {own}"
    return hmac.new(secret.encode(), said.encode(), hashlib.sha256).hexdigest()
