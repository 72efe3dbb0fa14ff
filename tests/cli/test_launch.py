"""`mvlm launch`: real processes, real signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vlm.platform import local_launch
from megatron_vlm.platform.local_launch import rank_environments, run_local_ranks, train_command
from tests.training_case import RECIPE

MARK = "MVLM_TEST_LAUNCH"
ENDLESS = ("training.train_iters=100000", "optimizer.lr_warmup_iters=0")


class Launched:
    """A launcher in a process of its own; all that descends from it bears a mark."""

    def __init__(self, command: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def alive(self) -> list[int]:
        """Living processes that descend from it, itself included."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    marked = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if marked and state != "Z":
                    found.append(int(folder.name))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in self.alive():
            words = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            # Helpers that a rank forks bear its variables too; the rank is its group's leader.
            if f"RANK={number}".encode() in words and os.getpgid(pid) == pid:
                return pid
        raise AssertionError(f"rank {number} is not there")

    def wait(self, timeout: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def start() -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def begin(*command: str) -> Launched:
        launched.append(Launched(list(command)))
        return launched[-1]

    yield begin
    for each in launched:
        for pid in each.alive():
            os.kill(pid, signal.SIGKILL)
        each.process.communicate()


@pytest.fixture
def launch(
    start: Callable[..., Launched], nano_data: Path, tmp_path: Path
) -> Callable[..., Launched]:
    def begin(*words: str) -> Launched:
        return start(
            sys.executable,
            "-m",
            "megatron_vlm",
            "launch",
            str(RECIPE),
            f"data.train={nano_data / 'train'}",
            f"run_dir={tmp_path / 'run'}",
            *words,
        )

    return begin


def steps(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def saved_iteration(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.distributed
def test_two_processes_train_to_the_end(launch: Callable[..., Launched], tmp_path: Path) -> None:
    run = launch("--nproc", "2", "training.train_iters=3")
    code, out, err = run.wait()
    assert code == 0, err
    assert "2 processes" in out and "iteration        3/       3" in out
    assert len(steps(tmp_path / "run")) == 3 and saved_iteration(tmp_path / "run") == 3
    assert (tmp_path / "run/logs/rank_00001.out").is_file()
    assert run.alive() == []


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parallel.pipeline_model_parallel_size=3",), "4 processes cannot hold"),
        (("data.train=/nowhere",), "/nowhere"),
        (("training.seq_len=1",), "unknown key training.seq_len"),
        (("run_dir=/dev/null/run",), "/dev/null"),
    ],
)
def test_wrong_input_is_one_line_and_starts_nothing(
    launch: Callable[..., Launched], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, out, err = launch("--nproc", "4", *words).wait()
    assert code == 2 and out == ""
    assert err.startswith("mvlm: error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_an_error_that_all_ranks_meet_is_told_once(launch: Callable[..., Launched]) -> None:
    code, out, err = launch("--nproc", "2", "training.objective=unheard_of").wait()
    assert code == 2
    assert err.count("mvlm: error:") == 1 and "unheard_of" in err and "failed first" not in err


@pytest.mark.distributed
def test_a_killed_rank_ends_the_run(launch: Callable[..., Launched], tmp_path: Path) -> None:
    run = launch("--nproc", "2", *ENDLESS)
    until(lambda: bool(steps(tmp_path / "run")))
    killed = time.monotonic()
    os.kill(run.rank(1), signal.SIGKILL)
    code, _, err = run.wait()
    assert time.monotonic() - killed < 30
    assert code == 1 and "rank 1 failed first: it was killed by SIGKILL" in err
    assert run.alive() == []


@pytest.mark.distributed
def test_sigterm_saves(launch: Callable[..., Launched], tmp_path: Path) -> None:
    run = launch("--nproc", "2", *ENDLESS)
    until(lambda: bool(steps(tmp_path / "run")))
    run.process.terminate()
    code, _, err = run.wait()
    assert code == 0, err
    assert saved_iteration(tmp_path / "run") == steps(tmp_path / "run")[-1]["iteration"]
    assert run.alive() == []


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_die_with_their_launcher(launch: Callable[..., Launched], tmp_path: Path) -> None:
    run = launch("--nproc", "2", *ENDLESS, "checkpoint.save_interval=1")
    # A saved checkpoint: by now ranks have helper processes too.
    until(lambda: (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").exists())
    assert len(run.alive()) > 3
    run.process.kill()
    until(lambda: run.alive() == [], seconds=10)


# The file alone: its package would import torch, which takes seconds and is not needed here.
SCRIPT = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("local_launch", {local_launch.__file__!r})
module = sys.modules["local_launch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
code, count, logs = sys.argv[1:]
command = [sys.executable, "-c", code]
sys.exit(module.run_local_ranks(command, int(count), pathlib.Path(logs)))
"""


@pytest.fixture
def ranks(start: Callable[..., Launched], tmp_path: Path) -> Callable[[str, int], Launched]:
    """Start plain Python code as ranks, below a launcher of their own."""

    def begin(code: str, count: int) -> Launched:
        head = "import os, sys, time, signal; rank = int(os.environ['RANK'])\n"
        return start(sys.executable, "-c", SCRIPT, head + code, str(count), str(tmp_path))

    return begin


@pytest.mark.distributed
def test_places_and_output(ranks: Callable[[str, int], Launched], tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS"
    (tmp_path / "rank_00002.out").write_text("of an earlier run\n")
    code, out, err = ranks(f"print(*map(os.environ.get, '{names}'.split()))", 3).wait()
    assert (code, err) == (0, "")
    assert out == "0 3 0 3 127.0.0.1 1\n"
    assert (tmp_path / "rank_00001.out").read_text() == "1 3 1 3 127.0.0.1 1\n"
    text = "of an earlier run\n2 3 2 3 127.0.0.1 1\n"
    assert (tmp_path / "rank_00002.out").read_text() == text


@pytest.mark.distributed
def test_the_first_to_fail_is_shown_and_its_peers_get_little_time(
    ranks: Callable[[str, int], Launched], tmp_path: Path
) -> None:
    (tmp_path / "rank_00001.out").write_text("of an earlier run\n")
    started = time.monotonic()
    run = ranks("if rank == 1: print('what\\nwent wrong'); sys.exit(7)\ntime.sleep(600)", 3)
    code, _, err = run.wait()
    assert code == 1 and time.monotonic() - started < 60
    assert "rank 1 failed first: it exited with 7" in err
    assert "  what\n  went wrong\n" in err and "earlier run" not in err
    assert run.alive() == []


@pytest.mark.distributed
def test_a_user_error_that_rank_0_has_not_met_is_shown(
    ranks: Callable[[str, int], Launched],
) -> None:
    code, _, err = ranks("if rank == 1: print('mvlm: error: mine'); sys.exit(2)", 2).wait()
    assert code == 2 and "rank 1 met wrong input" in err and "mine" in err


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_a_user_error_counts_whoever_ends_first(
    ranks: Callable[[str, int], Launched], late: int
) -> None:
    fails = "time.sleep(0.5 * (rank == {})); print(f'rank {{rank}} ends'); sys.exit(1 + rank)"
    code, _, err = ranks(fails.format(late), 2).wait()
    assert code == 2 and "rank 1 met wrong input" in err and "  rank 1 ends\n" in err


@pytest.mark.distributed
def test_helpers_of_ranks_do_not_outlive_them(ranks: Callable[[str, int], Launched]) -> None:
    run = ranks("if os.fork() == 0: time.sleep(600)", 2)
    assert run.wait()[0] == 0
    assert run.alive() == []


@pytest.mark.distributed
def test_helpers_live_until_their_rank_has_saved(
    ranks: Callable[[str, int], Launched],
) -> None:
    code = (
        "readable, writable = os.pipe()\n"
        "if os.fork() == 0: time.sleep(1); os.write(writable, b'written'); os._exit(0)\n"
        "os.close(writable); seen = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: seen.append(1)); print('up', flush=True)\n"
        "while not seen: time.sleep(0.01)\n"
        "print(os.read(readable, 9).decode())"
    )
    run = ranks(code, 1)
    assert run.process.stdout is not None and run.process.stdout.readline() == "up\n"
    run.process.terminate()
    assert run.wait()[:2] == (0, "written\n")


@pytest.mark.distributed
def test_terminated_before_there_was_anything_to_save(
    ranks: Callable[[str, int], Launched],
) -> None:
    run = ranks("print('up', flush=True); time.sleep(600)", 2)
    assert run.process.stdout is not None and run.process.stdout.readline() == "up\n"
    run.process.terminate()
    code, _, err = run.wait()
    assert code == 143 and "before the run could save" in err
    assert run.alive() == []


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_signals_reach_every_rank_once(
    ranks: Callable[[str, int], Launched], tmp_path: Path, number: int, expected: int
) -> None:
    code = (
        "seen = []; signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        "print('up', flush=True)\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.5); print('saved', len(seen))"
    )
    run = ranks(code, 2)
    assert run.process.stdout is not None and run.process.stdout.readline() == "up\n"
    other = tmp_path / "rank_00001.out"
    until(lambda: other.exists() and "up" in other.read_text())
    run.process.send_signal(number)
    time.sleep(0.1)
    if number != signal.SIGINT:
        run.process.send_signal(number)
    assert run.wait()[:2] == (expected, "saved 1\n")
    assert other.read_text() == "up\nsaved 1\n"


@pytest.mark.distributed
def test_ranks_and_their_helpers_die_with_the_launcher(
    ranks: Callable[[str, int], Launched],
) -> None:
    run = ranks("os.fork(); print('up', flush=True); time.sleep(600)", 2)
    # The launcher, its warden, two ranks, two helpers.
    until(lambda: len(run.alive()) == 6)
    run.process.kill()
    until(lambda: run.alive() == [], seconds=10)


@pytest.mark.distributed
def test_a_second_interrupt_kills(ranks: Callable[[str, int], Launched]) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    run = ranks(deaf, 1)
    assert run.process.stdout is not None and run.process.stdout.readline() == "up\n"
    run.process.send_signal(signal.SIGINT)
    assert run.process.stderr is not None
    assert "Ctrl-C again kills" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGINT)
    assert run.wait()[0] == 130
    assert run.alive() == []


@pytest.mark.unit
def test_threads_are_shared_out_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [place["OMP_NUM_THREADS"] for place in rank_environments(3, {})] == ["2"] * 3
    assert rank_environments(16, {})[0]["OMP_NUM_THREADS"] == "1"
    assert rank_environments(3, {"OMP_NUM_THREADS": "5"})[0]["OMP_NUM_THREADS"] == "5"
    # The places of an outer launcher are not inherited.
    inner = rank_environments(2, {"RANK": "7", "WORLD_SIZE": "8", "HOME": "/h"})[1]
    assert (inner["RANK"], inner["WORLD_SIZE"], inner["HOME"]) == ("1", "2", "/h")


@pytest.mark.unit
def test_a_command_that_does_not_exist_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        run_local_ranks([str(tmp_path / "nothing")], 2, tmp_path / "logs")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.unit
def test_last_lines_of_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "rank_00001.out"
    file.write_text("x" * 200_000 + "\n" + "\n".join(map(str, range(100))) + "\n")
    rank = local_launch.Rank(1, None, file)  # type: ignore[arg-type]
    assert rank.last_lines() == [str(number) for number in range(80, 100)]


@pytest.mark.unit
def test_ranks_look_for_modules_where_the_package_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "rich.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "megatron_vlm.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    command = train_command("/nowhere.yaml", [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "/nowhere.yaml" in done.stderr, done.stderr
    # Not installed, it is found where it lies.
    monkeypatch.chdir(Path(local_launch.__file__).parents[2])
    assert train_command("r", ["a=1"], debug=True) == [
        *(sys.executable, "-m", "megatron_vlm", "train", "r", "a=1", "--debug")
    ]
