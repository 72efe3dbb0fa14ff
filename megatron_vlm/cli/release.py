"""`mvlm release`: intermediate checkpoints of a run, as folders to publish."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_vlm.cli.export import parse_bytes
from megatron_vlm.errors import ConfigError
from megatron_vlm.release.dtypes import CHOICES

HELP = """Release checkpoints of a run: weights for transformers, a model card, the training state.

Takes the first checkpoint at or beyond each multiple of a number of tokens, or given iterations,
or the newest. Each release is compared with the checkpoint's own logits before it gets its name;
running the same command again makes and sends only what is missing.

example:
  mvlm release runs/demo releases --every-tokens 1T --licence Apache-2.0
  mvlm release runs/demo releases --iterations 100,200 --with-optimizer
  mvlm release runs/demo releases --push OWNER/NAME
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare folders and options."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", type=Path, help="folder of releases, with an index of them"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--every-tokens",
        metavar="N",
        help="for each multiple of N tokens (1e12, 1T, 500B, 2M), the first checkpoint beyond it",
    )
    which.add_argument("--iterations", metavar="LIST", help="these iterations, as 100,200,300")
    parser.add_argument("--name", help="name of the releases (default: the model's)")
    parser.add_argument(
        "--licence", metavar="ID", help="SPDX identifier, as Apache-2.0, or other (default: none)"
    )
    parser.add_argument("--base-model", metavar="ID", help="model on the hub that this began as")
    parser.add_argument(
        "--dtype",
        choices=CHOICES,
        default="keep",
        help="what weights become; float32 takes the optimizer's where there are (default: keep)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="most bytes of tensors in a file, as 5GB or 500MB (default: %(default)s)",
    )
    parser.add_argument(
        "--with-optimizer",
        action="store_true",
        help="add the checkpoint itself, so that training goes on exactly",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare with the checkpoint's logits: for models that do not fit here",
    )
    parser.add_argument(
        "--verify-existing",
        action="store_true",
        help="read releases that are there already through, and compare their digests",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="make releases anew that are damaged, or of another checkpoint or other options; "
        "replace pushed ones that differ",
    )
    parser.add_argument(
        "--push",
        metavar="TARGET",
        help="send them, a branch each, to OWNER/NAME on the hub, or to a folder (file:///path)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Release; raises UserError for what is wrong with the run, the folder or the options."""
    iterations = _iterations(args.iterations) if args.iterations is not None else None
    most = parse_bytes(args.max_shard_size)
    from megatron_vlm.release.licences import parse_licence
    from megatron_vlm.release.words import parse_count

    every = None
    if args.every_tokens is not None:
        every = parse_count(args.every_tokens, "--every-tokens")
    licence = parse_licence(args.licence)
    # Imports torch and the engine: after what can fail without them.
    from megatron_vlm.release.releasing import Options, Request, as_json_line, release_run

    request = Request(
        args.run_dir,
        args.out_dir,
        every,
        iterations,
        args.name,
        Options(
            args.dtype, most, args.with_optimizer, not args.no_verify, licence, args.base_model
        ),
        args.overwrite,
        args.verify_existing,
        args.push,
        show_progress=sys.stderr.isatty(),
    )
    report = release_run(request, lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        print(as_json_line(report))
    else:
        print(
            f"{args.out_dir}: {len(report.made)} made, {len(report.skipped)} there already"
            + (f", {len(report.pushed)} pushed" if args.push else "")
        )
    return 0


def _iterations(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise ConfigError(f"--iterations {text}: expected whole numbers, such as 100,200,300")
    return [int(word) for word in words]
