"""The batch script that is sent, what is refused before, and how Slurm's answers are read."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config.shipped import batch_script
from megatron_vlm.errors import ConfigError
from megatron_vlm.resilience import events, slurm
from megatron_vlm.resilience.submission import Request, write_script

pytestmark = pytest.mark.unit

RECIPE = str(Path(__file__).parents[1] / "nano.yaml")
REQUEST = Request(nodes=2, spares=1, ranks_per_node=4, gpus_per_node=4)


def _run(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """The words with which a script calls mvlm."""
    stand_in = tmp_path / "mvlm"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    lines = [
        f"MVLM={stand_in}" if line.startswith("MVLM=") else line for line in script.split("\n")
    ]
    file = tmp_path / "script"
    file.write_text("\n".join(lines))
    done = subprocess.run(
        ["bash", str(file)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def _directives(script: str) -> dict[str, str]:
    """What sbatch takes from a script: comments before its first command; the last one counts."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH ").partition("=")
            found[name] = shlex.split(value)[0] if value else ""
        elif line and not line.startswith("#"):
            break
    return found


def test_words_reach_the_supervisor_as_they_were_given(tmp_path: Path) -> None:
    evil = "run_dir=/tmp/a b'; touch /tmp/x; $(id) `id`"
    script = write_script(REQUEST, "my recipe.yaml", [evil, 'a="*"'], tmp_path)
    words = _run(script, tmp_path, SLURM_JOB_NUM_NODES="3")
    assert words == [
        "supervise", "my recipe.yaml", evil, 'a="*"',
        "--nodes", "2", "--spares", "1", "--ranks-per-node", "4",
    ]  # fmt: skip


def test_what_is_asked_of_slurm(tmp_path: Path) -> None:
    request = Request(
        nodes=2, spares=1, ranks_per_node=4, gpus_per_node=4, time="1-0", partition="big",
        account="team a", job_name="first run", warning_seconds=99,
        options=("--constraint=h100&ib", "--exclusive"),
    )  # fmt: skip
    found = _directives(write_script(request, "demo", [], tmp_path))
    expected = {
        "--nodes": "3", "--gpus-per-node": "4", "--time": "1-0", "--partition": "big",
        "--account": "team a", "--job-name": "first run", "--signal": "B:USR1@99",
        "--constraint": "h100&ib", "--exclusive": "", "--requeue": "", "--no-kill": "",
        "--output": str(tmp_path / "slurm-%j.out"), "--chdir": os.getcwd(),
    }  # fmt: skip
    assert found.items() >= expected.items()


def test_one_node_is_left_to_slurm(tmp_path: Path) -> None:
    alone = Request(nodes=1, spares=0, ranks_per_node=2)
    found = _directives(write_script(alone, "demo", [], tmp_path))
    assert found["--no-kill"] == "off" and "--gpus-per-node" not in found


@pytest.mark.parametrize(
    "option", ["constraint=h100", "--comment=a\n#SBATCH --uid=0", "-p x", "--comment=\x1b[2J"]
)
def test_an_option_cannot_break_out(option: str, tmp_path: Path) -> None:
    request = Request(nodes=1, spares=0, ranks_per_node=1, options=(option,))
    with pytest.raises(ConfigError, match="no option of sbatch"):
        write_script(request, "demo", [], tmp_path)


def test_the_script_stands_by_itself(tmp_path: Path) -> None:
    text = batch_script().read_text()
    assert subprocess.run(["bash", "-n", str(batch_script())], check=False).returncode == 0
    assert {"--requeue", "--no-kill", "--signal"} <= _directives(text).keys()
    stand_in = {"MVLM": str(tmp_path / "mvlm"), "SLURM_JOB_NUM_NODES": "5", "MVLM_SPARES": "1"}
    words = _run(text, tmp_path, **stand_in, SLURM_GPUS_ON_NODE="8")
    assert words[1:] == ["--nodes", "4", "--spares", "1", "--ranks-per-node", "8"]


def test_a_dry_run_sends_nothing(
    nano_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [RECIPE, f"data.train={nano_data / 'train'}", f"run_dir={tmp_path / 'run'}"]
    words += ["parallel.pipeline_model_parallel_size=2", "--ranks-per-node", "2", "--nodes", "2"]
    assert main(["submit", *words, "--spares", "1", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "node 1: ranks 0-1: PP 0, DP 0-1" in told and "node 2: ranks 2-3: PP 1, DP 0-1" in told
    assert "node 3: spare" in told and "#SBATCH --nodes=3" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "2", "--ranks-per-node", "2", "data.train=/none"], "/none"),
        (["--nodes", "3", "--ranks-per-node", "1"], "global_batch_size"),
        (["--nodes", "0", "--ranks-per-node", "2"], "--nodes"),
        (["--nodes", "1", "--ranks-per-node", "2", "--spares", "-1"], "--spares"),
        (["--nodes", "1", "--ranks-per-node", "2", "--gpus-per-node", "2"], "not allowed with"),
        (["--nodes", "1", "--ranks-per-node", "2", "--container-mounts", "a:b"], "--container"),
    ],
)
def test_refused_before_it_is_sent(
    words: list[str], said: str, nano_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [RECIPE, f"data.train={nano_data / 'train'}", f"run_dir={tmp_path / 'run'}", *words]
    try:
        code = main(["submit", *given])
    except SystemExit as left:
        code = int(str(left.code))
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`scontrol` and `sbatch` that answer what the file `answer` says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "sbatch"):
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/asked\n. {tmp_path}/answer\n'
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "answer"


@pytest.mark.parametrize(
    ("shown", "live", "ended"),
    [
        ("JobState=RUNNING Reason=None Restarts=0", True, False),
        ("JobState=PENDING Reason=BeginTime Restarts=1", True, False),
        ("JobState=COMPLETING Reason=None Restarts=0", True, True),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", True, False),
        ("JobState=CANCELLED Reason=None Restarts=0", False, True),
        ("JobState=COMPLETED Reason=None Restarts=0", False, False),
    ],
)
def test_states_of_a_job(shown: str, live: bool, ended: bool, fake_slurm: Path) -> None:
    fake_slurm.write_text(f"echo 'JobId=7 JobName=a {shown}'")
    assert slurm.is_live("7") is live and slurm.is_ended("7") is ended


def test_who_comes_too_late_requeues_nothing(
    fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm.write_text("echo 'JobId=7 JobState=RUNNING Restarts=1'")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(slurm.SlurmError, match="started again without this process"):
        slurm.requeue("7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    slurm.requeue("7")
    asked = (fake_slurm.parent / "asked").read_text().splitlines()
    assert [line for line in asked if "requeue" in line] == ["scontrol requeue 7"]


def test_draining_needs_permission(fake_slurm: Path) -> None:
    fake_slurm.write_text("exit 0")
    assert slurm.drain("n1", "two faults")
    asked = (fake_slurm.parent / "asked").read_text()
    assert "update NodeName=n1 State=DRAIN Reason=two faults" in asked
    fake_slurm.write_text("echo 'Invalid user id' >&2; exit 1")
    assert not slurm.drain("n1", "two faults")


def test_no_answer_is_an_error(fake_slurm: Path) -> None:
    fake_slurm.write_text("echo 'Invalid job id specified' >&2; exit 1")
    assert slurm.job_state("7") == ""
    fake_slurm.write_text("echo 'cannot contact controller' >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="cannot contact controller"):
        slurm.is_live("7")
    fake_slurm.write_text("sleep 5")
    with pytest.raises(slurm.SlurmError, match="no answer"):
        slurm.ask("scontrol", "ping", seconds=0.2)


def test_a_folder_of_another_job_is_refused(
    fake_slurm: Path, nano_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    events.tell(run_dir, "submitted", job="7")
    words = [RECIPE, f"data.train={nano_data / 'train'}", f"run_dir={run_dir}"]
    words += ["--nodes", "1", "--ranks-per-node", "1"]
    fake_slurm.write_text("echo 'JobId=7 JobState=PENDING'")
    assert main(["submit", *words]) == 2
    assert "in use by job 7" in capsys.readouterr().err
    fake_slurm.write_text("[ $1 = --parsable ] && echo '8;cluster' || echo 'JobState=COMPLETED'")
    assert main(["submit", *words]) == 0
    assert "job 8" in capsys.readouterr().out
    assert [e["job"] for e in events.read(run_dir)] == ["7", "8"]
    (script,) = (run_dir / "slurm").glob("*.sbatch")
    assert "supervise" in script.read_text()


def test_supervise_needs_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["supervise", RECIPE, "--nodes", "1", "--ranks-per-node", "1"]) == 2
    assert "no Slurm job" in capsys.readouterr().err
    assert main(["supervise", RECIPE, "--nodes", "0", "--ranks-per-node", "1", "--local"]) == 2
    assert "--nodes 0" in capsys.readouterr().err
