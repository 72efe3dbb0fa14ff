"""`mvlm launch`: a training run as processes of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Train on this machine: one process for each device, started and ended together.

The recipe, the layout and the data sets are checked before anything starts; that a checkpoint to
be loaded fits them, by the processes. Ctrl-C or SIGTERM saves a checkpoint and leaves; a second
Ctrl-C kills. The output of ranks above 0 goes to run_dir/logs/rank_NNNNN.out.

example:
  mvlm launch demo --nproc 2 data.train=datasets/train run_dir=runs/first
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...] [--nproc N]`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes (default: one for each GPU, or 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, start, wait; raises UserError when something is wrong beforehand."""
    from megatron_vlm.config import load_recipe
    from megatron_vlm.errors import ConfigError
    from megatron_vlm.topology.layout import resolve_layout

    config = load_recipe(args.recipe, args.overrides)
    if args.nproc is not None and args.nproc > 0:
        resolve_layout(config, args.nproc)
    # From here on torch is imported: only once the quick checks have passed.
    from megatron_vlm.platform.local_launch import local_processes, run_local_ranks, train_command

    count = local_processes(args.nproc)
    resolve_layout(config, count)
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data

    open_held_out_data(config, open_training_data(config))
    command = train_command(args.recipe, args.overrides, args.debug)
    logs = Path(config.run_dir) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir {config.run_dir}: {error.filename} cannot be made ({error.strerror}); "
            "choose a folder that can be written"
        ) from error
    return run_local_ranks(command, count, logs)
