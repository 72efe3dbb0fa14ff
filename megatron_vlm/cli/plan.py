"""`mvlm plan`: what a recipe needs on a number of devices, told on any machine in a moment."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from megatron_vlm.cli.arguments import positive

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from megatron_vlm.planning.report import RunPlan, StagePlan

HELP = r"""Predict the memory of a recipe on a number of devices, without a GPU.

Shows, for each pipeline stage, the bytes that one of its ranks holds at the fullest moment of a
step. Data sets are not looked at. Left out are temporaries, communication buffers, the allocator's
fragments and the CUDA context: keep about a tenth of the device free.

example:
  mvlm plan demo --nproc 2
  mvlm plan demo --nproc 6 parallel.pipeline_model_parallel_size=3
  mvlm plan demo model=dots-vlm-142b --nodes 8 --gpus-per-node 8 \
      parallel.pipeline_model_parallel_size=2 parallel.expert_model_parallel_size=32 \
      training.micro_batch_size=2 training.global_batch_size=64 training.precision=bf16
"""

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}
_SHOWN_RANKS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, the number of devices and the assumptions."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or a shipped recipe's name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.seq_length=8192"
    )
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes, one a device")
    parser.add_argument("--nodes", type=positive, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=positive,
        metavar="N",
        help="processes on each machine, instead of --nproc",
    )
    parser.add_argument(
        "--picture-tokens",
        type=int,
        metavar="N",
        help="tokens of pictures in a packed row (default: half of training.seq_length)",
    )
    parser.add_argument(
        "--sample-tokens",
        type=positive,
        metavar="N",
        help="length of a sample, which context parallelism's mask grows with (default: a row)",
    )
    parser.add_argument(
        "--expert-imbalance",
        type=_at_least_one,
        default=1.0,
        metavar="X",
        help="tokens of the busiest rank's experts over the mean (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where the run will compute (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; raises ConfigError when the recipe or the layout cannot run."""
    from megatron_vlm.config import load_recipe
    from megatron_vlm.planning.memory import Assumptions
    from megatron_vlm.planning.report import plan_run

    config = load_recipe(args.recipe, args.overrides)
    plan = plan_run(
        config,
        _world_size(args),
        Assumptions(
            picture_tokens=args.picture_tokens,
            sample_tokens=args.sample_tokens,
            expert_imbalance=args.expert_imbalance,
            device=args.device,
        ),
    )
    if args.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        _print(plan)
    return 0


def _at_least_one(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 1")
    return number


def _world_size(args: argparse.Namespace) -> int:
    from megatron_vlm.errors import ConfigError

    if (args.nproc is None) == (args.gpus_per_node is None):
        raise ConfigError(
            "the number of devices is not clear: give either --nproc N, or --nodes N with "
            "--gpus-per-node N"
        )
    if args.nproc is not None and args.nodes is not None:
        raise ConfigError(
            f"--nodes {args.nodes} goes with --gpus-per-node, not with --nproc {args.nproc} "
            "(processes of all machines)"
        )
    return int(args.nproc or (args.nodes or 1) * args.gpus_per_node)


def _print(plan: RunPlan) -> None:
    from rich.console import Console

    layout, model, worst = plan.layout, plan.model, plan.worst
    console = Console(highlight=False, soft_wrap=True)
    unit = "GiB" if worst.memory.total >= _UNITS["GiB"] else "MiB"
    console.print(
        f"{layout.world_size} processes ({layout.describe()}); a step is "
        f"{plan.tokens_per_step:,} tokens, {layout.num_micro_batches} micro-batches for each of "
        f"{layout.dp} replicas"
    )
    console.print(
        f"{model.total:,} parameters: decoder {model.decoder + model.experts:,} "
        f"({plan.active:,} active for a token), encoder {model.trunk:,}, adapter {model.adapter:,}"
    )
    if model.trunk:
        console.print(f"assumed: {plan.picture_tokens_per_row:,} picture tokens in each row")
    console.print(_stages_table(plan))
    console.print(_memory_table(plan, unit))
    console.print(
        f"most: {_amount(worst.memory.total, unit)} {unit} on each rank of stage {worst.pp} "
        f"(the first is rank {layout.rank(pp=worst.pp)})"
    )
    console.print(_ranks_table(plan))
    if layout.world_size > _SHOWN_RANKS:
        console.print(f"{layout.world_size - _SHOWN_RANKS} more ranks: --json lists them all")


def _table(title: str, columns: Iterable[str]) -> Table:
    from rich.table import Table

    # Without lines, so that nine columns of sizes fit into 80 characters.
    table = Table(
        title=f"\n{title}", title_justify="left", box=None, padding=(0, 1), pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _stages_table(plan: RunPlan) -> Table:
    table = _table("each rank of a pipeline stage holds", ("stage", "parameters", "layers"))
    for stage in plan.stages:
        table.add_row(str(stage.pp), f"{stage.parameters.total:,}", _layers(stage))
    return table


def _memory_table(plan: RunPlan, unit: str) -> Table:
    kinds = list(plan.worst.memory.kinds())
    title = f"{unit} on each of them (decoder and encoder: saved activations)"
    table = _table(title, ("stage", *kinds, "total"))
    for stage in plan.stages:
        sizes = (*stage.memory.kinds().values(), stage.memory.total)
        table.add_row(str(stage.pp), *(_amount(size, unit) for size in sizes))
    return table


def _ranks_table(plan: RunPlan) -> Table:
    columns = ("rank", "tensor", "context", "data", "stage", "expert", "expert tensor")
    table = _table("layout", columns)
    for each in plan.places()[:_SHOWN_RANKS]:
        row = (each.rank, each.tp, each.cp, each.dp, each.pp, each.ep, each.etp)
        table.add_row(*map(str, row))
    return table


def _layers(stage: StagePlan) -> str:
    """For example `embedding, 0-3, 8-11`."""
    runs: list[list[int]] = []
    for number in stage.layers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    parts = ["-".join(map(str, each)) for each in runs]
    letters = "".join(stage.chunks)
    return ", ".join(["embedding"] * ("E" in letters) + parts + ["loss"] * ("L" in letters))


def _amount(size: int, unit: str) -> str:
    return f"{size / _UNITS[unit]:,.2f}"
