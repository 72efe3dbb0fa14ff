"""How a process finds its place, from each launcher's variables, and real starts by launchers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform import World, detect_world, free_port

LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI", "PRTE_", "TORCHELASTIC_", "MASTER_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def _clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) and name not in LAUNCHER_NAMES
    }


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variable is set."""
    for name in os.environ.keys() - _clean_environment().keys():
        monkeypatch.delenv(name)
    return monkeypatch


def _set(environment: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.unit
def test_alone(environment: pytest.MonkeyPatch) -> None:
    world = detect_world()
    assert (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
    assert world.launcher == "alone" and world.master_addr == "127.0.0.1"
    assert 1024 <= world.master_port < 65536


@pytest.mark.unit
def test_torchrun_variables(environment: pytest.MonkeyPatch) -> None:
    _set(environment, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    _set(environment, MASTER_ADDR="node-7", MASTER_PORT="12345")
    assert detect_world() == World(5, 8, 1, "torchrun", "node-7", 12345)
    # They win over srun, which may have started torchrun.
    _set(environment, SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_STEP_ID="0")
    assert detect_world().launcher == "torchrun"


@pytest.mark.unit
def test_slurm_inside_a_step(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(environment, SLURM_PROCID="3", SLURM_NTASKS="8", SLURM_STEP_ID="0", SLURM_LOCALID="1")
    _set(environment, SLURM_JOB_ID="31007", MASTER_ADDR="given")
    assert detect_world() == World(3, 8, 1, "srun", "given", 20000 + 31007 % 15000)
    environment.delenv("MASTER_ADDR")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[07-08]" ] && printf "n07\\nn08\\n"\n'
    )
    scontrol.chmod(0o755)
    environment.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _set(environment, SLURM_JOB_NODELIST="n[01-99]", SLURM_STEP_NODELIST="n[07-08]")
    assert detect_world().master_addr == "n07", "the step's first node, not the job's"
    _set(environment, MASTER_PORT="777")
    assert detect_world().master_port == 777
    scontrol.unlink()
    environment.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'n\[07-08\]'.*scontrol.*MASTER_ADDR"):
        detect_world()


@pytest.mark.unit
def test_slurm_outside_a_step(environment: pytest.MonkeyPatch) -> None:
    """A batch script is one process, whatever its job has."""
    _set(environment, SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="31007")
    assert detect_world().launcher == "alone"
    _set(environment, SLURM_STEP_ID="0", SLURM_NTASKS="1")
    assert detect_world().launcher == "alone", "a step of one task"
    _set(environment, PMI_SIZE="1", PMI_RANK="0", PMIX_RANK="0")
    assert detect_world().launcher == "alone", "a step of one task, which srun tells by PMI too"


@pytest.mark.unit
@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9"},
        {"PMI_SIZE": "16", "PMI_RANK": "9"},
    ],
)
def test_mpirun_inside_a_slurm_job(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """It starts one daemon a node by srun, and its ranks inherit the daemons' places."""
    _set(environment, SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_STEP_ID="0", MASTER_ADDR="a")
    _set(environment, **variables)
    place = World(9, 16, 1, "mpirun", "a", 1)
    environment.setattr("megatron_vlm.platform.distributed._from_mpi", lambda: place)
    assert detect_world() == place


@pytest.mark.unit
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["torchrun", "rank 4 of 4", "same launcher"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, ["rank -1 of 4"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK is 'one'", "whole number"]),
        ({"RANK": "0", "WORLD_SIZE": ""}, ["WORLD_SIZE is ''", "whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, ["MASTER_PORT is 'x'"]),
        (
            {"SLURM_PROCID": "9", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "MASTER_ADDR": "a"},
            ["srun", "rank 9 of 2"],
        ),
        (
            {"SLURM_PROCID": "?", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
            ["SLURM_PROCID is '?'"],
        ),
    ],
)
def test_contradictory_values(
    environment: pytest.MonkeyPatch, variables: dict[str, str], said: list[str]
) -> None:
    _set(environment, **variables)
    with pytest.raises(ConfigError) as caught:
        detect_world()
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


class _Communicator:
    """What MPI.COMM_WORLD is asked for."""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self._local = types.SimpleNamespace(rank=local_rank, size=local_size)

    def Split_type(self, kind: object) -> types.SimpleNamespace:
        return self._local

    def bcast(self, value: object, root: int) -> Any:
        return value if self.rank == root else ("first-host", 4321)


def _pretend_mpi(environment: pytest.MonkeyPatch, communicator: _Communicator) -> None:
    mpi = types.SimpleNamespace(COMM_WORLD=communicator, COMM_TYPE_SHARED="shared")
    environment.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))  # type: ignore[arg-type]


@pytest.mark.unit
def test_mpi_place(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OMPI_COMM_WORLD_SIZE", "4")
    _pretend_mpi(environment, _Communicator(3, 4, 1, 2))
    assert detect_world() == World(3, 4, 1, "mpirun", "first-host", 4321)
    _pretend_mpi(environment, _Communicator(0, 4, 0, 4))
    world = detect_world()
    assert world.master_addr == "127.0.0.1", "all on one machine: no host name is needed"
    _pretend_mpi(environment, _Communicator(0, 4, 0, 2))
    assert detect_world().master_addr not in ("127.0.0.1", ""), "other machines must reach it"


@pytest.mark.unit
def test_mpi_that_cannot_be_used(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PMI_SIZE", "2")
    environment.setitem(sys.modules, "mpi4py", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mpi4py is not installed.*megatron-vlm\[mpi\]"):
        detect_world()
    # mpirun of one MPI, mpi4py of another: every process believes it is alone.
    _pretend_mpi(environment, _Communicator(0, 1, 0, 1))
    with pytest.raises(ConfigError, match="started 2 processes, but mpi4py sees 1"):
        detect_world()
    environment.setenv("PMI_SIZE", "two")
    with pytest.raises(ConfigError, match="PMI_SIZE is 'two'"):
        detect_world()


SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from megatron_vlm.platform import detect_world, start_distributed, stop

world = detect_world()
device = start_distributed(world)
total = torch.full((1,), 10.0 ** world.rank, device=device)
dist.all_reduce(total)
answer = [world.rank, world.world_size, world.local_rank, world.launcher, total.item()]
answer += [dist.get_rank(), dist.get_world_size()]
stop()
answer.append(dist.is_initialized())
with open(f"{sys.argv[1]}/{world.rank}.json", "w") as stream:
    json.dump(answer, stream)
"""


def _start(command: list[str], folder: Path, **variables: str) -> list[list]:
    """Run SCRIPT on two ranks by `command`; what each rank answered."""
    script = folder / "ask.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env=_clean_environment()
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
def test_started_by_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    answers = _start([*command, "--master-port", str(free_port())], tmp_path)
    expected = [[rank, 2, rank, "torchrun", 11.0, rank, 2, False] for rank in range(2)]
    assert answers == expected


@pytest.mark.distributed
def test_started_by_mpirun(tmp_path: Path) -> None:
    """Open MPI and mpi4py come with the `dev` extra, so that this always runs."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    assert mpirun, "no mpirun: run `make setup`"
    command = [mpirun, "-n", "2", "--map-by", ":OVERSUBSCRIBE", sys.executable]
    # Containers run as root, which Open MPI asks about.
    asked = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    answers = _start(command, tmp_path, **asked)
    expected = [[rank, 2, rank, "mpirun", 11.0, rank, 2, False] for rank in range(2)]
    assert answers == expected


@pytest.mark.unit
@pytest.mark.parametrize(("failed", "left"), [(True, False), (False, True)])
def test_a_failing_rank_does_not_wait_for_nccl(
    failed: bool, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers are in a collective: waiting for them, it would never tell its error."""
    from megatron_vlm.platform import distributed

    done = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: done.append(True))
    distributed.stop(failed)
    assert bool(done) is left
