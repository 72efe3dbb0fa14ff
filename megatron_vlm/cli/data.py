"""`mvlm data`: builds data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_vlm.data.format import DEFAULT_SHARD_MB

HELP = """Build data sets from conversations with pictures.

example:
  mvlm data build conversations.json datasets/train
"""

_BUILD_HELP = "turn a LLaVA-style JSON list into a data set: tars, an index, a tokenizer"

_SHOWN_REASONS = 3
_LONGEST_ID = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `data`'s subcommands to its parser."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build",
        help=_BUILD_HELP,
        description=f"{_BUILD_HELP[0].upper()}{_BUILD_HELP[1:]}.",
        epilog="example:\n  mvlm data build conversations.json datasets/train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("source", metavar="FILE.json", type=Path, help="list of conversations")
    build.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    build.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="a Hugging Face tokenizer.json (default: byte-level)",
    )
    build.add_argument(
        "--image-root",
        metavar="DIR",
        type=Path,
        help="folder that picture paths start from and stay in (default: that of FILE.json)",
    )
    build.add_argument(
        "--shard-size-mb",
        metavar="N",
        type=int,
        default=DEFAULT_SHARD_MB,
        help="megabytes after which a new tar begins (default: %(default)s)",
    )
    build.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="threads that read and decode (default: one per core it may use)",
    )
    build.add_argument(
        "--overwrite", action="store_true", help="replace the data set that OUT holds"
    )
    build.set_defaults(run_data=_build)


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; returns the exit status.

    Raises:
        UserError: bad input.
    """
    return int(args.run_data(args))


def _build(args: argparse.Namespace) -> int:
    # Imported here, so that `mvlm --help` stays fast.
    from megatron_vlm.data.build import build_dataset
    from megatron_vlm.data.format import REJECTED_FILE
    from megatron_vlm.data.tokenizer import Tokenizer

    summary = build_dataset(
        args.source,
        args.out,
        tokenizer=Tokenizer.load(args.tokenizer) if args.tokenizer else None,
        image_root=args.image_root,
        shard_mb=args.shard_size_mb,
        overwrite=args.overwrite,
        workers=args.workers,
        show_progress=True,
        inputs=[args.tokenizer] if args.tokenizer else [],
    )
    _tell(
        f"{args.out}: {summary.samples:,} samples, {summary.pictures:,} pictures, "
        f"{summary.text_tokens:,} text tokens ({summary.loss_tokens:,} targets), "
        f"{summary.shards:,} shards"
    )
    if summary.rejected:
        _tell(f"{len(summary.rejected):,} samples rejected; see {summary.folder / REJECTED_FILE}")
        for rejection in summary.rejected[:_SHOWN_REASONS]:
            _tell(f"  sample {rejection.index}{_id(rejection.id)}: {rejection.reason}")
        if len(summary.rejected) > _SHOWN_REASONS:
            _tell(f"  and {len(summary.rejected) - _SHOWN_REASONS:,} more")
    return 0


def _id(given: Any) -> str:
    if given is None:
        return ""
    text = str(given)
    return f" (id {text if len(text) <= _LONGEST_ID else text[:_LONGEST_ID] + '...'})"


def _tell(line: str) -> None:
    """Print what may hold anything that stands in a user's list or names a file.

    What is not printable, for this terminal, is escaped: it could drive the terminal, or fail.
    """
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = sys.stdout.encoding or "utf-8"
    print(safe.encode(encoding, "backslashreplace").decode(encoding))
