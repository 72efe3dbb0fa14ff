"""`mvlm train`: the process that is one rank of a run, or the whole of it."""

from __future__ import annotations

import argparse
import logging
import os

HELP = """Train in this process: alone, or as one rank under torchrun, srun or mpirun.

On this machine `mvlm launch` starts the ranks itself.

example:
  mvlm train demo data.train=datasets/train run_dir=runs/first
  torchrun --nproc-per-node 8 -m megatron_vlm train recipe.yaml
"""

_USER_ERROR = 2
# In the order in which the run itself asks its launcher.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...]`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end, or until asked to stop.

    Raises:
        UserError: bad input. What every rank meets alike is told by rank 0 alone.
    """
    from megatron_vlm.config import load_recipe
    from megatron_vlm.errors import DataError, UserError

    try:
        config = load_recipe(args.recipe, args.overrides)
        # Imports the engine: only once the recipe is known to be right.
        from megatron_vlm.training.loop import train

        train(config)
    except UserError as error:
        rank = own_rank()
        if rank == 0:
            raise
        logger = logging.getLogger("megatron_vlm")
        # Open log files mean that the run had begun.
        begun = bool(logger.handlers)
        if begun:
            logger.error("%s", error)
        if begun and isinstance(error, DataError):
            # Each rank reads samples of its own: no other may have met this.
            raise DataError(f"rank {rank}: {error}") from error
        return _USER_ERROR
    return 0


def own_rank() -> int:
    """This process's rank as its launcher's environment tells it; 0 where none does."""
    for name in _RANK_VARIABLES:
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return 0
