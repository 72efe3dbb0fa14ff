"""`mvlm train`: the process that is one rank of a run, or the whole of it.

Ranks share a terminal, and what is wrong with a recipe is wrong for all of them. So of the ranks of
a machine that meet the same error the first to meet it tells it, and each error is told.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import hashlib
import logging
import os
import socket
import time

HELP = """Train in this process: alone, or as one rank under torchrun, srun or mpirun.

On this machine `mvlm launch` starts the ranks itself. Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint
and leaves; a second Ctrl-C ends at once.

example:
  mvlm train demo parallel.expert_model_parallel_size=1 data.train=datasets/train
  torchrun --nproc-per-node 2 -m megatron_vlm train demo data.train=datasets/train
"""

_USER_ERROR = 2
# In the order in which the run itself asks its launcher.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
_COUNT_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE")
# Set by platform/local_launch.py, whose import would import torch.
_OWN_OUTPUT = "MVLM_OWN_OUTPUT"
_TELLER_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...]`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end, or until asked to stop.

    Raises:
        UserError: bad input, told by the first rank of this machine to meet it; ranks above 0
            name themselves.
    """
    from megatron_vlm.config import load_recipe
    from megatron_vlm.errors import UserError

    try:
        config = load_recipe(args.recipe, args.overrides)
        # Imports the engine: only once the recipe is known to be right.
        from megatron_vlm.training.loop import train

        train(config)
    except UserError as error:
        rank = own_rank()
        logger = logging.getLogger("megatron_vlm")
        # Open log files mean that the run had begun; rank 0's log is the terminal.
        if rank > 0 and logger.handlers:
            logger.error("%s", error)
        if not _is_first_to_tell(str(error)):
            return _USER_ERROR
        if rank == 0:
            raise
        raise type(error)(f"rank {rank}: {error}") from error
    return 0


def own_rank() -> int:
    """This process's rank as its launcher's environment tells it; 0 where none does."""
    return _from_environment(_RANK_VARIABLES, 0)


def _from_environment(names: tuple[str, ...], default: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return default


def _is_first_to_tell(message: str) -> bool:
    """Whether no other rank that this rank's launcher started on this machine has told `message`.

    The first takes a name that the kernel frees when it ends, so nothing is left behind; it stays
    a moment for those that are a little later. One that is later still tells it again: better
    twice than not at all.
    """
    if _OWN_OUTPUT in os.environ or _from_environment(_COUNT_VARIABLES, 1) == 1:
        return True
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()[:32]
    # Ranks of one launcher on one machine are its children.
    name = f"\0mvlm-train-{os.getuid()}-{os.getppid()}-{digest}"
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(name)
    except OSError as error:
        claim.close()
        return error.errno != errno.EADDRINUSE
    atexit.register(_hold, claim)
    return True


def _hold(claim: socket.socket) -> None:
    time.sleep(_TELLER_SECONDS)
    claim.close()
