"""One job's work on a run: supervise it, then end, or be requeued for what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.errors import ConfigError, TaskFailed
from megatron_vlm.resilience import attempts, events, slurm
from megatron_vlm.resilience.attempt import Outcome
from megatron_vlm.resilience.crew import Program
from megatron_vlm.resilience.starters import LocalStarter, SrunStarter
from megatron_vlm.resilience.supervisor import Supervisor

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
_REQUEUE_SECONDS = 60.0


def supervise(
    recipe: str,
    overrides: Sequence[str],
    nodes: int,
    ranks_per_node: int,
    spares: int,
    local: bool,
) -> int:
    """Run a recipe under supervision; the exit code of this process.

    Raises:
        UserError: something is wrong beforehand.
    """
    for name, value, least in (
        ("--nodes", nodes, 1),
        ("--ranks-per-node", ranks_per_node, 1),
        ("--spares", spares, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} {value}: expected a number of at least {least}")
    job = slurm.own_job()
    if job is None and not local:
        raise ConfigError(
            "this is no Slurm job; send one with mvlm submit, or use --local for this machine"
        )
    config = load_recipe(recipe, overrides)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    refuse_other_jobs(run_dir, job)
    starter = LocalStarter(nodes + spares) if local else SrunStarter(nodes + spares)
    supervisor = Supervisor(
        run_dir,
        config.resilience,
        training_program(config, recipe, overrides, ranks_per_node),
        starter,
        nodes,
        spares,
        ranks_per_node,
        job,
    )
    events.tell(run_dir, "job started", job=job, nodes=nodes, spares=spares, pid=os.getpid())
    outcome = asyncio.run(supervisor.run())
    return _leave(outcome, supervisor.stop_signal, job, run_dir)


def training_program(
    config: RunConfig, recipe: str, overrides: Sequence[str], ranks_per_node: int
) -> Program:
    """What each rank of a run is: `mvlm train RECIPE key=value ...`."""
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks_per_node)),
        "PYTHONUNBUFFERED": "1",
        # To ask the driver itself before a fork would make the GPUs unusable after it.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    return Program(
        ("megatron_vlm.training.loop",),
        "megatron_vlm.cli.main:main",
        ("train", recipe, *overrides),
        environment,
    )


def refuse_other_jobs(run_dir: Path, job: str | None) -> None:
    """Refuse a run folder on which another job works or waits to.

    Raises:
        ConfigError: one does.
    """
    number = attempts.newest(run_dir)
    other = attempts.about(run_dir, number).get("job") if number else None
    submitted = [e.get("job") for e in events.read(run_dir) if e["event"] == "submitted"]
    for name in dict.fromkeys([other, *submitted[-1:]]):
        if name is None or name == job:
            continue
        try:
            live = slurm.is_live(str(name))
        except slurm.SlurmError as error:
            raise ConfigError(
                f"run_dir {run_dir} belongs to job {name}, and whether that still runs cannot be "
                f"told: {error}"
            ) from None
        if live:
            raise ConfigError(
                f"run_dir {run_dir} is in use by job {name}; wait until it ends, cancel it "
                f"(scancel {name}), or choose another run_dir"
            )


def _leave(outcome: Outcome, stop_signal: int | None, job: str | None, run_dir: Path) -> int:
    if outcome.kind == "finished":
        return 0
    if outcome.kind in ("refused", "gave up"):
        print(f"mvlm: error: {outcome.why}", file=sys.stderr)
        return USER_ERROR if outcome.kind == "refused" else FAILED
    if job is None:
        if outcome.kind == "no nodes":
            print(f"mvlm: error: {outcome.why}", file=sys.stderr)
            return FAILED
        return INTERRUPTED if stop_signal == signal.SIGINT else 0
    if stop_signal == signal.SIGTERM and _is_ended(job):
        return 0
    return _requeue(outcome, job, run_dir)


def _is_ended(job: str) -> bool:
    try:
        return slurm.is_ended(job)
    except slurm.SlurmError:
        return False


def _requeue(outcome: Outcome, job: str, run_dir: Path) -> int:
    events.tell(run_dir, "requeue", job=job, why=outcome.why, avoid=list(outcome.avoid))
    try:
        if outcome.avoid:
            slurm.exclude(job, list(outcome.avoid))
        slurm.requeue(job)
    except TaskFailed as error:
        events.tell(run_dir, "not requeued", job=job, why=str(error))
        print(f"mvlm: error: the job could not be requeued: {error}", file=sys.stderr)
        return FAILED
    # Slurm ends this process; leaving by itself would look like the end of the job.
    time.sleep(_REQUEUE_SECONDS)
    return FAILED
