"""Asking Slurm, with a limit on every answer."""

from __future__ import annotations

import os
import subprocess

from megatron_vlm.errors import TaskFailed

_SECONDS = 20.0


class SlurmError(TaskFailed):
    """Slurm did not answer, or not as hoped; the message has its words."""


def ask(*command: str, seconds: float = _SECONDS) -> str:
    """Run one of Slurm's commands; its output.

    Raises:
        SlurmError: it is not there, failed or did not answer.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on PATH; is this a machine of the cluster?"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmError(f"{command[0]}: {said[-1] if said else f'status {done.returncode}'}")
    return done.stdout


def own_job() -> str | None:
    """The job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def job_state(job: str) -> str:
    """A job's state in Slurm's word, such as RUNNING; empty when Slurm no longer knows it.

    Raises:
        SlurmError: Slurm did not answer.
    """
    try:
        return _shown("job", job).get("JobState", "")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def is_ended(job: str) -> bool:
    """Whether Slurm ends a job for good: cancelled, say, and not preempted or out of time.

    Raises:
        SlurmError: Slurm did not answer.
    """
    told = _shown("job", job)
    # While a job's processes end its state says no more than that.
    ending = told.get("JobState") in ("CANCELLED", "COMPLETING")
    return ending and told.get("Reason") != "TimeLimit"


def is_live(job: str) -> bool:
    """Whether a job waits, runs or is about to run again.

    Raises:
        SlurmError: Slurm did not answer.
    """
    live = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED"}
    return job_state(job) in live


def is_down(node: str) -> bool:
    """Whether Slurm has given a node up.

    Raises:
        SlurmError: Slurm did not answer, or knows no such node.
    """
    return "DOWN" in _shown("node", node).get("State", "")


def _shown(kind: str, name: str) -> dict[str, str]:
    told = ask("scontrol", "show", kind, "--oneliner", name)
    return dict(word.partition("=")[::2] for word in told.split())


def requeue(job: str) -> None:
    """Have this process's job started again from its beginning; Slurm then ends this one.

    Raises:
        SlurmError: Slurm does not, or it has done so already: who was cut off may come too late.
    """
    started, mine = _shown("job", job).get("Restarts"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if started != mine:
        raise SlurmError(f"job {job} has been started again without this process")
    ask("scontrol", "requeue", job)


def drain(node: str, reason: str) -> bool:
    """Have a node given no more work; whether this user may do that."""
    try:
        ask("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}")
    except SlurmError:
        return False
    return True


def exclude(job: str, nodes: list[str]) -> None:
    """Keep a job off some nodes from its next start on.

    Raises:
        SlurmError: Slurm does not.
    """
    ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(sorted(nodes))}")
