"""Agents, template and supervisor for real, with processes for nodes and ranks that only pretend
to train: every cause of a failure, told and mended."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vlm.config.schema import ResilienceConfig
from megatron_vlm.resilience import events
from megatron_vlm.resilience.attempt import Outcome
from megatron_vlm.resilience.crew import Program
from megatron_vlm.resilience.protocol import Refused, listen, open_line
from megatron_vlm.resilience.starters import LocalStarter
from megatron_vlm.resilience.supervisor import Supervisor

pytestmark = pytest.mark.unit

ENTRY = "tests.resilience.pretender:main"
SETTINGS = ResilienceConfig(
    beat_s=0.1, node_timeout_s=5.0, hang_timeout_s=3.0, start_timeout_s=30.0, max_restarts=8
)


class Case:
    """One supervised run of pretenders."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.outcome: Outcome | None = None

    def run(
        self,
        *arguments: str,
        nodes: int = 2,
        spares: int = 1,
        meanwhile: Callable[[Supervisor], None] | None = None,
    ) -> Outcome:
        """Run to the end; `meanwhile` runs beside it in a thread."""
        program = Program((), ENTRY, (str(self.run_dir), *arguments))
        starter = LocalStarter(nodes + spares)
        made = Supervisor(self.run_dir, SETTINGS, program, starter, nodes, spares, 2, None)

        async def both() -> Outcome:
            work = asyncio.create_task(made.run())
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile, made)
            return await asyncio.wait_for(work, 60)

        return asyncio.run(both())

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in events.read(self.run_dir) if e["event"] == name]

    def until(self, happened: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not happened():
            assert time.monotonic() < deadline, list(events.read(self.run_dir))
            time.sleep(0.02)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    yield Case(tmp_path)
    left = [p for p in psutil.Process().children(recursive=True) if "agent" in _command(p)]
    assert not left


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _agents() -> list[psutil.Process]:
    mine = psutil.Process().children()
    return sorted((p for p in mine if _command(p).endswith("agent")), key=lambda p: p.pid)


def test_to_the_end(case: Case) -> None:
    assert case.run("--steps", "5").kind == "finished"
    (attempt,) = case.events("attempt")
    assert attempt["nodes"] == ["local0", "local1"] and attempt["ranks"] == 4
    assert len(case.events("training")) == 1
    # Ranks got their places.
    places = sorted(path.read_text() for path in case.run_dir.glob("place_*"))
    assert places == [f"{rank} of 4, {rank % 2} of 2, attempt 1" for rank in range(4)]


@pytest.mark.parametrize(
    ("fault", "status"), [("kill", "SIGKILL"), ("raise", "exit 1"), ("leave", "exit 0")]
)
def test_a_rank_ends(fault: str, status: str, case: Case) -> None:
    assert case.run("--fault", fault, "--rank", "3", "--step", "4").kind == "finished"
    (failed,) = case.events("failed")
    assert failed["cause"] == "rank died" and failed["step"] == 4
    if fault != "leave":
        (died,) = case.events("rank died")
        assert (died["rank"], died["node"], died["status"]) == (3, "local1", status)
        assert failed["error"] == {"kill": "", "raise": "ValueError: of step #"}[fault]
    assert len(case.events("attempt")) == 2


@pytest.mark.parametrize("fault", ["stuck", "frozen"])
def test_a_rank_hangs(fault: str, case: Case) -> None:
    assert case.run("--fault", fault, "--rank", "1", "--step", "4").kind == "finished"
    (hang,) = case.events("hang")
    assert [c["rank"] for c in hang["culprits"]] == [1]
    if fault == "stuck":
        assert any("in _stuck" in call for call in hang["culprits"][0]["stack"])


def test_wrong_input_is_not_tried_again(case: Case) -> None:
    outcome = case.run("--fault", "refuse", "--rank", "2", "--step", "4")
    assert outcome == Outcome("refused", "mvlm: error: no such thing")
    assert len(case.events("attempt")) == 1


def test_a_crash_loop_ends_with_a_diagnosis(case: Case) -> None:
    outcome = case.run("--fault", "raise", "--rank", "0", "--step", "4", "--always")
    assert outcome.kind == "gave up" and "3 times at step 4 (rank 0" in outcome.why
    assert "ValueError: of step #" in outcome.why


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_is_lost(how: signal.Signals, case: Case) -> None:
    """Killed, its ranks die with it; frozen, its ranks live on and must not be waited for."""

    def lose(_: Supervisor) -> None:
        case.until(lambda: case.events("training"))
        agent = next(p for p in _agents() if p.environ()["MVLM_NODE"] == "local1")
        agent.send_signal(how)
        case.until(lambda: len(case.events("training")) == 2)
        if how == signal.SIGSTOP:
            agent.send_signal(signal.SIGCONT)

    assert case.run("--steps", "100", meanwhile=lose).kind == "finished"
    first, second = case.events("attempt")
    assert first["nodes"] == ["local0", "local1"] and second["nodes"] == ["local0", "local2"]
    assert case.events("failed")[0]["cause"] == "node lost"


def test_without_a_spare_the_job_must_go(case: Case) -> None:
    def lose(_: Supervisor) -> None:
        case.until(lambda: case.events("training"))
        _agents()[0].kill()

    outcome = case.run("--steps", "40", spares=0, meanwhile=lose)
    assert outcome.kind == "no nodes" and "1 of 2 nodes are ready" in outcome.why


def test_asked_to_stop(case: Case) -> None:
    def ask(made: Supervisor) -> None:
        case.until(lambda: case.events("training"))
        os.kill(os.getpid(), signal.SIGUSR1)

    outcome = case.run("--steps", "400", meanwhile=ask)
    assert outcome.kind == "stopped" and "saved at step" in outcome.why
    assert sorted(p.name for p in case.run_dir.glob("saved_*")) == [f"saved_{r}" for r in range(4)]


def test_a_template_that_dies_is_replaced(case: Case) -> None:
    def kill(_: Supervisor) -> None:
        case.until(lambda: case.events("training"))
        agent = next(p for p in _agents() if p.environ()["MVLM_NODE"] == "local0")
        next(p for p in agent.children() if "template" in _command(p)).kill()

    assert case.run("--steps", "20", meanwhile=kill).kind == "finished"
    assert len(case.events("attempt")) == 2


def test_strangers_are_not_heard() -> None:
    async def talk() -> None:
        heard = []

        async def accept(line: Any) -> None:
            heard.append(await line.receive())

        server, port = await listen("secret", accept, "127.0.0.1")
        with pytest.raises(Refused):
            await open_line("127.0.0.1", port, "guess")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b'{"kind": "start"}\n' * 3)
        await reader.read()
        line = await open_line("127.0.0.1", port, "secret")
        await line.send("hello", node="n1")
        await asyncio.sleep(0.1)
        assert heard == [{"kind": "hello", "node": "n1"}]
        server.close()

    asyncio.run(talk())
