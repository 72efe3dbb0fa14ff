"""`mvlm demo`: a model that reads handwritten digits, trained here and now."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Train a tiny vision-language model on real pictures and let it answer questions.

Digits, photographs and lines of print from installed packages become pictures with questions; the
model answers held-out ones before and after. Leaves a data set, a run with its checkpoint, and
answers.png in the run folder. Interrupted, the same command goes on where it was; finished, it
trains anew. A folder that it did not make itself is left alone.

Trains on any number of processes: experts are shared out where the number is even, and the batch
grows where it must. Exits with 0 when the model has learned to read digits, else with 1.

example:
  mvlm demo
  mvlm demo --run-dir runs/long training.train_iters=2000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where all of it goes (default: %(default)s)",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="training processes (default: one for each GPU; without GPUs 2, on one core 1)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="training pictures (default: 8000, or those of the demo that was interrupted)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe `demo`"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; raises UserError for wrong input."""
    from megatron_vlm.demo.run import run_demo

    return run_demo(args.run_dir, args.nproc, args.overrides, args.samples)
