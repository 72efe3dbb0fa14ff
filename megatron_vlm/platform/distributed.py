"""Find out how this process was started (torchrun, srun, mpirun, alone) and join its group."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform.results_queue import stop_results_queue

# The engine's own default is 30 minutes; collectives of a healthy step take seconds.
_TIMEOUT = timedelta(minutes=30)
_OWN_PORTS = (10000, 20000)


@dataclass(frozen=True)
class World:
    """One process's place: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    master_addr: str
    master_port: int


def detect_world() -> World:
    """Read this process's place from its launcher's environment.

    torchrun sets RANK and WORLD_SIZE; mpirun is asked through mpi4py; srun sets SLURM_PROCID and
    SLURM_NTASKS inside a step; otherwise the process is alone. In that order, since torchrun may
    have been started by the others, and mpirun starts its daemons by srun inside a Slurm job.

    Raises:
        ConfigError: a launcher's variables contradict each other, or mpirun without mpi4py.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _checked(
            World(
                rank=_integer("RANK"),
                world_size=_integer("WORLD_SIZE"),
                local_rank=_integer("LOCAL_RANK", 0),
                launcher="torchrun",
                master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
                master_port=_integer("MASTER_PORT", 29500),
            )
        )
    if _by_mpirun():
        return _checked(_from_mpi())
    # Inside a batch script, outside srun, SLURM_PROCID is set too, but no step.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _integer("SLURM_NTASKS", 1) > 1:
        return _checked(
            World(
                rank=_integer("SLURM_PROCID"),
                world_size=_integer("SLURM_NTASKS"),
                local_rank=_integer("SLURM_LOCALID", 0),
                launcher="srun",
                master_addr=env.get("MASTER_ADDR") or _first_slurm_host(),
                # Two jobs on one machine must not meet; 15000 ports from 20000 on.
                master_port=_integer("MASTER_PORT", 20000 + _integer("SLURM_JOB_ID", 0) % 15000),
            )
        )
    return World(0, 1, 0, "alone", "127.0.0.1", free_port())


def start_distributed(world: World) -> torch.device:
    """Join the default process group (NCCL on GPUs, gloo on CPU); returns this rank's device."""
    _quiet_engine()
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if world.master_addr in ("127.0.0.1", "localhost"):
            # Otherwise gloo resolves the host name, which need not be in any hosts file.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend,
        init_method=f"tcp://{world.master_addr}:{world.master_port}",
        rank=world.rank,
        world_size=world.world_size,
        timeout=_TIMEOUT,
    )
    return device


def stop(failed: bool = False) -> None:
    """Leave the process group, if this process is in one, and end helper processes.

    Args:
        failed: whether this rank leaves with an error. NCCL would wait for peers that are still in
            a collective, and the error would not be told; the process ends without it.
    """
    stop_results_queue()
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def _quiet_engine() -> None:
    # Deprecations and hints that the engine's calls set off in torch, on every rank.
    for module in ("torch", "megatron"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    # It warns about every layer that is not its own; its errors still show.
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _by_mpirun() -> bool:
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return True
    if "SLURM_STEP_ID" not in env:
        return "PMI_SIZE" in env or "PMIX_RANK" in env
    # srun too speaks PMI to its tasks; mpirun's daemons are tasks of a step of another size.
    return env.get("PMI_SIZE", env.get("SLURM_NTASKS")) != env.get("SLURM_NTASKS")


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(
            f"environment variable {name} is {text!r}; expected a whole number from the launcher"
        ) from None


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.world_size:
        raise ConfigError(
            f"{world.launcher} gave rank {world.rank} of {world.world_size} processes; expected a "
            "rank below the count: start all ranks with the same launcher command"
        )
    return world


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        return "127.0.0.1"
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"cannot expand the node list {nodes!r} ({error}); put scontrol on PATH or set "
            "MASTER_ADDR to the first node's name"
        ) from None
    return listing.stdout.split()[0]


def _from_mpi() -> World:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ConfigError(
            "this process was started by mpirun, but mpi4py is not installed: "
            "pip install 'megatron-vlm[mpi]', or start with `mvlm launch`"
        ) from None
    comm = MPI.COMM_WORLD
    counts = [name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if name in os.environ]
    expected = _integer(counts[0]) if counts else comm.size
    if expected != comm.size:
        raise ConfigError(
            f"mpirun started {expected} processes, but mpi4py sees {comm.size}: mpi4py was built "
            "for another MPI than the one that provides mpirun"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    address = (socket.gethostname(), free_port()) if comm.rank == 0 else None
    if comm.size == local.size:
        address = ("127.0.0.1", address[1]) if address else None
    host, port = comm.bcast(address, root=0)
    return World(comm.rank, comm.size, local.rank, "mpirun", host, port)


def free_port() -> int:
    """A TCP port on loopback that is free now.

    None of those that the system hands out itself (on Linux from 32768 on): until somebody listens
    on it, every connection that another run makes could take one of these.
    """
    for port in random.SystemRandom().sample(range(*_OWN_PORTS), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(
        "no free TCP port was found on 127.0.0.1 between {} and {}; free one of them".format(
            *_OWN_PORTS
        )
    )
