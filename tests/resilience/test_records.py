"""Events, attempts and the summary: what a person and the next job read from the run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.resilience import attempts, events
from megatron_vlm.resilience.summary import summarize

pytestmark = pytest.mark.unit


def test_events_are_only_appended(tmp_path: Path) -> None:
    assert list(events.read(tmp_path)) == []
    events.tell(tmp_path, "first", rank=3)
    with open(tmp_path / events.NAME, "a") as stream:
        stream.write('{"time": 1, "event": "cut sho')
        stream.write("\n[]\n")
    events.tell(tmp_path, "second")
    assert [e["event"] for e in events.read(tmp_path)] == ["first", "second"]
    events.tell(tmp_path / "none", "third")  # no folder: nothing happens


def test_each_number_is_taken_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_vlm.resilience import attempts\n"
        "print(*[attempts.take_next(Path(sys.argv[1])) for _ in range(20)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    numbers = [int(n) for process in racing for n in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 81))
    assert attempts.newest(tmp_path) == 80


def test_the_replaced_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts.check_ours(tmp_path)  # not supervised
    mine = attempts.take_next(tmp_path, job="12")
    assert attempts.about(tmp_path, mine)["job"] == "12"
    monkeypatch.setenv(attempts.VARIABLE, str(mine))
    attempts.check_ours(tmp_path)
    attempts.take_next(tmp_path)
    with pytest.raises(attempts.Superseded, match="attempt 1 .* another has begun"):
        attempts.check_ours(tmp_path)


def _run_folder(folder: Path) -> None:
    steps = [{"iteration": n, "step_time_s": 2.0} for n in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps) + '{"it')
    history = [
        {"time": 1000.0, "event": "job started"},
        {"time": 1010.0, "event": "failed", "cause": "hang", "step": 3, "job": "7"},
        {"time": 1035.0, "event": "restart"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in history))
    ranks = {"0": {"step": 11, "phase": "forward"}}
    nodes = {"n1": {"ready": True, "ranks": ranks}, "n2": {"ready": True, "ranks": {}}}
    status = {"time": 1039.0, "state": "running", "job": "7", "host": "n1", "attempt": 2}
    (folder / "status.json").write_text(json.dumps({**status, "nodes": nodes, "avoided": ["n3"]}))
    (folder / "checkpoints").mkdir()
    note = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    note.write_text("10\n")
    os.utime(note, (1030, 1030))


def test_summary(tmp_path: Path) -> None:
    _run_folder(tmp_path)
    found = summarize(tmp_path, now=1040.0)
    assert (found.state, found.job, found.attempt, found.iteration) == ("running", "7", 2, 10)
    assert (found.checkpoint, found.checkpoint_age) == (10, 10.0)
    assert found.seconds_per_step == 2.0
    # Ten steps of two seconds that count, of forty seconds in all.
    assert found.effective == pytest.approx(0.5)
    assert [cause["event"] for cause in found.causes] == ["failed"]
    assert summarize(tmp_path, now=1100.0).state == "silent"
    (tmp_path / attempts.FINISHED).write_text("{}")
    over = summarize(tmp_path, now=9999.0)
    # Time after the last event does not count against it.
    assert over.state == "finished" and over.effective == pytest.approx(20 / 35)


def test_status_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run_folder(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for part in ("silent (job 7 on n1, attempt 2)", "rank 0 step 11 forward", "spare, ready"):
        assert part in told
    assert "iteration 10," in told and "failures     1" in told and "hang" in told
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["avoided"] == ["n3"]
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_status_of_a_run_that_nobody_supervises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "unsupervised" in told and "none yet" in told and "effective" not in told
