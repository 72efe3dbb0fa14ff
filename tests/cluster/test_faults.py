"""Every fault of the table, on a real Slurm cluster: the run goes on by itself, within its bound,
and comes to the same losses and parameters as one that nothing happened to."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.job import STEPS, Job, Result, launched

pytestmark = pytest.mark.cluster


def test_a_rank_is_killed(job: Job, undisturbed: Result) -> None:
    job.sent().until_step(14)
    job.process(rank=2).kill()
    job.until_training_again(time.time(), 30)
    job.until_finished()
    died = job.events("rank died")[0]
    assert died["rank"] == 2 and died["status"] == "SIGKILL"
    job.result().assert_equal(undisturbed)


@pytest.mark.parametrize(("kind", "phase"), [("collective", "reduce"), ("loader", "data")])
def test_a_rank_hangs(kind: str, phase: str, job: Job, undisturbed: Result) -> None:
    job.sent(fault=f"{kind} 1 14")
    job.until((job.run_dir / "broken").exists, 90, "fault")
    job.until_training_again(time.time(), 30)
    job.until_finished()
    hang = job.events("hang")[0]
    (culprit,) = hang["culprits"]
    assert culprit["rank"] == 1 and culprit["node"] == job.events("attempt")[0]["nodes"][0]
    assert (culprit["step"], culprit["phase"]) == (14, phase)
    assert any("sitecustomize.py" in call for call in culprit["stack"]), culprit
    if kind == "collective":
        assert "barrier" in culprit["place"]
    job.result().assert_equal(undisturbed)


def test_a_rank_is_frozen(job: Job, undisturbed: Result) -> None:
    job.sent().until_step(14)
    job.process(rank=3).send_signal(signal.SIGSTOP)
    job.until_training_again(time.time(), 30)
    assert [c["rank"] for c in job.events("hang")[0]["culprits"]] == [3]
    job.until_finished()
    job.result().assert_equal(undisturbed)


@pytest.mark.parametrize("how", ["off", "cut"])
@pytest.mark.parametrize("which", ["worker", "batch_host"])
def test_a_node_is_lost(which: str, how: str, job: Job, undisturbed: Result, cluster: Any) -> None:
    job.sent().until_step(14)
    host = job.host()
    lost = host if which == "batch_host" else next(n for n in job.nodes() if n != host)
    getattr(cluster, how)(lost)
    job.until_training_again(time.time(), 90)
    if how == "cut":
        cluster.mend(lost)
    assert lost not in job.nodes()
    job.until_finished()
    job.result().assert_equal(undisturbed)


def test_the_time_is_up(job: Job, undisturbed: Result, cluster: Any) -> None:
    # Slurm looks at limits every half a minute, and warns up to a minute early.
    job.sent("--time", "1", "--warning", "5", fault="slow 0 10")
    job.until_event("requeue", seconds=120)
    assert job.events("asked to stop")[0]["signal"] == "SIGUSR1"
    stopped_at = job.iteration()
    assert 10 < stopped_at < STEPS
    cluster.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.until_finished()
    assert [e["step"] for e in job.events("training")] == [1, stopped_at + 1]
    job.result().assert_equal(undisturbed)


def test_preempted(job: Job, undisturbed: Result, cluster: Any) -> None:
    job.sent().until_step(14)
    cluster.slurm(
        "sbatch", "-p", "urgent", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"
    )
    asked = job.until_event("asked to stop")
    assert asked["signal"] == "SIGTERM"
    job.until_training_again(time.time(), 90)
    first = job.events("training")[1]["step"]
    assert first > 14, "went on from a checkpoint of its interval, not from where it was stopped"
    job.until_finished()
    job.result().assert_equal(undisturbed)


def test_cancelled(job: Job, cluster: Any) -> None:
    job.sent().until_step(14)
    cluster.slurm("scancel", job.number)
    job.until(lambda: job.state() == "CANCELLED", 40, "end of the job")
    assert not job.events("requeue")
    latest = int((job.run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert latest == job.iteration() >= 14


def test_the_controller_restarts(job: Job, undisturbed: Result, cluster: Any) -> None:
    job.sent().until_step(10)
    cluster.stop_controller()
    time.sleep(3)
    cluster.start_controller()
    job.until_finished()
    assert len(job.events("attempt")) == 1
    job.result().assert_equal(undisturbed)


def test_killed_while_saving(job: Job, undisturbed: Result) -> None:
    job.sent(fault="save 0 20")
    job.until((job.run_dir / "broken").exists, 90, "fault")
    job.until_training_again(time.time(), 30)
    job.until_finished()
    assert job.events("rank died")[0]["phase"] == "save"
    job.result().assert_equal(undisturbed)


def test_an_error_that_comes_again_ends_the_job(job: Job) -> None:
    job.sent(fault="raise 0 13")
    job.until(lambda: job.state() == "FAILED", 90, "end of the job")
    assert len(job.events("attempt")) == 3
    ended = job.events("ended")[-1]
    assert ended["outcome"] == "gave up"
    assert "the same error 3 times at step 13 (rank 0" in ended["why"]
    assert "RuntimeError: a fault of the code itself" in ended["why"]
    output = (job.run_dir / f"logs/slurm-{job.number}.out").read_text()
    assert ended["why"] in output.splitlines()[-1]


def test_the_newest_checkpoint_is_damaged(job: Job, undisturbed: Result) -> None:
    job.sent().until_step(24)
    newest = job.run_dir / "checkpoints" / "iter_0000020"
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    job.process(rank=1).kill()
    job.until_training_again(time.time(), 30)
    assert job.events("training")[1]["step"] == 11
    job.until_finished()
    job.result().assert_equal(undisturbed)


def test_the_disk_is_full(job: Job, undisturbed: Result, shared: Path) -> None:
    """From before one checkpoint of the interval until after the next."""
    small = shared / "small_disk"
    job.move_to(small / "run")
    job.sent().until_step(14)
    with open(small / "filler", "wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(1 << 16))
            except OSError:
                break
        job.until_event("not saved")
        (small / "filler").unlink()
    job.until_finished()
    assert len(job.events("attempt")) == 1
    assert "free space" in job.events("not saved")[0]["what"]
    job.result().assert_equal(undisturbed)


@pytest.mark.parametrize(("fault", "bad"), [("nan 3 25", "non-finite step"), ("spike -1 25", "")])
def test_a_step_is_spoiled(
    fault: str, bad: str, job: Job, cluster_data: Path, shared: Path
) -> None:
    """As the run that was told to pass over that step, to the bit."""
    job.words += ["guard.spike_deviations=20", "guard.spike_policy=rollback"]
    job.sent(fault=fault).until_finished()
    if bad:
        assert [e["iteration"] for e in job.events(bad)] == [25]
    else:
        (back,) = job.events("rolled back")
        assert (back["spike"], back["to"]) == (25, 20)
    assert len(job.events("attempt")) == 1
    told = launched(cluster_data, shared / "told", "training.iterations_to_skip=[25]")
    job.result().assert_equal(told, but=25)


def test_a_bad_recipe_is_not_sent(job: Job, cluster: Any) -> None:
    job.words.append("parallel.expert_model_parallel_size=3")
    done = job.submit()
    assert done.returncode == 2 and "expert_model_parallel_size" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not cluster.slurm("squeue", "-h").strip()


def test_a_run_folder_in_use_is_refused(job: Job, cluster: Any) -> None:
    job.sent().until_step(1)
    again = Job(cluster, job.run_dir.parent.parent / "data", job.run_dir)
    done = again.submit()
    assert done.returncode == 2 and f"in use by job {job.number}" in done.stderr
    cluster.slurm("scancel", job.number)
