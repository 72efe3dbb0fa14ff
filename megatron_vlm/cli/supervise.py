"""`mvlm supervise`: a run that is watched and started again, in a Slurm job or on this machine."""

from __future__ import annotations

import argparse

HELP = """Run a recipe on the nodes of this Slurm job, and start it again when something fails.

`mvlm submit` sends a job that calls it. --local stands in for a cluster: agents of this machine
pose as nodes. What happens is told in run_dir/events.jsonl; `mvlm status RUN_DIR` sums it up.

example:
  mvlm supervise demo --local --nodes 2 --ranks-per-node 1 data.train=datasets/train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...] --nodes N --ranks-per-node G [--spares K] [--local]`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )
    parser.add_argument(
        "--nodes", type=int, required=True, metavar="N", help="nodes that the run needs"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, required=True, metavar="G", help="processes on each"
    )
    parser.add_argument(
        "--spares", type=int, default=0, metavar="K", help="nodes beyond them that wait, ready"
    )
    parser.add_argument(
        "--local", action="store_true", help="on this machine, with processes for nodes"
    )


def run(args: argparse.Namespace) -> int:
    """Supervise to the end of the run or of the job.

    Raises:
        UserError: something is wrong beforehand.
    """
    from megatron_vlm.resilience.job import supervise

    return supervise(
        args.recipe,
        args.overrides,
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        spares=args.spares,
        local=args.local,
    )
