"""`mvlm submit`: check a recipe, write its batch script and send it to Slurm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.arguments import positive

if TYPE_CHECKING:
    from megatron_vlm.config import RunConfig
    from megatron_vlm.resilience.submission import Request
    from megatron_vlm.topology.layout import Layout

HELP = """Train a recipe under Slurm, as a job that recovers by itself.

The recipe, the layout and the data sets are checked before anything is sent. The script is kept in
run_dir/slurm/; the job's output is run_dir/logs/slurm-JOB.out, what happens to it is told in
run_dir/events.jsonl and by mvlm status. A machine without Slurm can try it: docs/slurm.md.

example:
  mvlm submit demo --nodes 4 --gpus-per-node 8 --spares 1 training.global_batch_size=128
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `RECIPE [key=value ...]` and what is asked of Slurm."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.train_iters=100"
    )
    parser.add_argument(
        "--nodes", type=positive, required=True, metavar="N", help="nodes that train"
    )
    each = parser.add_mutually_exclusive_group(required=True)
    each.add_argument(
        "--gpus-per-node", type=positive, metavar="G", help="GPUs of each; one process for each"
    )
    each.add_argument(
        "--ranks-per-node", type=positive, metavar="R", help="processes of each, without GPUs"
    )
    parser.add_argument(
        "--spares", type=int, default=0, metavar="K", help="nodes beyond them that wait, ready"
    )
    parser.add_argument("--time", metavar="LIMIT", help="for example 2-00:00:00 (days-h:m:s)")
    parser.add_argument("--partition", metavar="NAME", help="Slurm's partition")
    parser.add_argument("--account", metavar="NAME", help="Slurm's account")
    parser.add_argument("--job-name", default="mvlm", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--warning", type=positive, metavar="SECONDS",
        help="before the time limit, to save and go back into the queue (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--container", metavar="IMG", help="image of the ranks (srun with Pyxis); has mvlm on PATH"
    )
    parser.add_argument(
        "--container-mounts", metavar="SRC:DST[,...]", help="folders that the image sees"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="another option of sbatch, as --sbatch=--constraint=h100 (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and the layout; send nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Check, write, send.

    Raises:
        UserError: something is wrong; nothing was sent.
        TaskFailed: Slurm does not take the job.
    """
    from megatron_vlm.config import load_recipe
    from megatron_vlm.errors import ConfigError
    from megatron_vlm.resilience.job import refuse_other_jobs
    from megatron_vlm.resilience.submission import Request, send, write_script
    from megatron_vlm.topology.layout import resolve_layout

    if args.spares < 0:
        raise ConfigError(f"--spares {args.spares}: expected a number of at least 0")
    if args.container_mounts is not None and args.container is None:
        raise ConfigError("--container-mounts is for --container, which is not given")
    config = load_recipe(args.recipe, args.overrides)
    each = args.gpus_per_node or args.ranks_per_node
    layout = resolve_layout(config, args.nodes * each)
    _check_data(config)
    run_dir = Path(config.run_dir).absolute()
    request = Request(
        nodes=args.nodes,
        spares=args.spares,
        ranks_per_node=each,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        partition=args.partition,
        account=args.account,
        job_name=args.job_name,
        warning_seconds=args.warning,
        container=args.container,
        container_mounts=args.container_mounts,
        options=tuple(args.sbatch),
    )
    script = write_script(request, args.recipe, args.overrides, run_dir / "logs")
    if args.dry_run:
        print(script)
        print("\n".join(_layout_by_node(layout, request)))
        return 0
    refuse_other_jobs(run_dir, None)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        job = send(script, run_dir)
    except OSError as error:
        raise ConfigError(
            f"run_dir {run_dir}: {error.filename} cannot be written ({error.strerror}); choose a "
            "folder that all nodes can write"
        ) from error
    print(f"job {job}: {request.nodes} nodes ({layout.describe()}), {request.spares} spare")
    print(f"  mvlm status {config.run_dir}")
    print(f"  tail -F {run_dir / 'logs' / f'slurm-{job}.out'}")
    return 0


def _check_data(config: RunConfig) -> None:
    """Refuse what a rank would refuse, before it costs a place in the queue."""
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data

    open_held_out_data(config, open_training_data(config))


def _layout_by_node(layout: Layout, request: Request) -> list[str]:
    """What lies where, and what was and will be looked at."""
    lines = [f"layout: {layout.describe()}, {layout.world_size} processes"]
    for node in range(request.nodes):
        ranks = range(node * request.ranks_per_node, (node + 1) * request.ranks_per_node)
        places = [layout.coordinates(rank) for rank in ranks]
        told = []
        for name in ("pp", "dp", "cp", "tp"):
            found = sorted({getattr(place, name) for place in places})
            if getattr(layout, name) > 1:
                shown = f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])
                told.append(f"{name.upper()} {shown}")
        shown = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        lines.append(f"  node {node + 1}: ranks {shown}{': ' if told else ''}{', '.join(told)}")
    for spare in range(request.spares):
        lines.append(f"  node {request.nodes + spare + 1}: spare")
    lines.append("checked: the recipe, its layout, every data set; before it is sent for real: ")
    lines[-1] += "that no other job has this run_dir"
    return lines
