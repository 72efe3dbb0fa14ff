"""`mvlm data verify`: whether every byte of a data set is still what its build wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_vlm.cli.arguments import positive
from megatron_vlm.errors import DataError

HELP = "read all files of a data set and compare them with the digests that its build recorded"

EXAMPLES = """examples:
  mvlm data verify datasets/train
  mvlm data verify /mnt/copy/train --workers 32

Leaves with 0 if every byte is as it was built, and with 2 if one is not; names the files that
differ and, where one shows it, the first sample of a shard that does. A run checks sizes and the
index alone: verify a set after it was copied, or when its disk is in doubt."""

_NAMED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder and how it is read."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a built data set")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="files that are read at once (default: one per core it may use)",
    )
    parser.set_defaults(run_data=_run)


def _run(args: argparse.Namespace) -> int:
    # Imported here, so that `mvlm --help` stays fast.
    from megatron_vlm.data.verify import verify_dataset

    found = verify_dataset(args.folder, workers=args.workers, show_progress=True)
    for damage in found.damaged:
        _tell(f"{damage.name}: {damage.reason}")
    if found.damaged:
        names = ", ".join(damage.name for damage in found.damaged[:_NAMED])
        more = len(found.damaged) - _NAMED
        raise DataError(
            f"{args.folder}: {len(found.damaged):,} of {found.files:,} files are not as they were "
            f"built: {names}{f' and {more:,} more' if more > 0 else ''}; copy them again from "
            "where they are whole, or build the data set again"
        )
    _tell(
        f"{args.folder}: all {found.files:,} files ({found.bytes / 1e9:,.2f} GB) are as they were "
        "built"
    )
    return 0


def _tell(line: str) -> None:
    """Print what may hold names from a user's source."""
    from megatron_vlm.data.build_progress import printable

    print(printable(line, sys.stdout.encoding))
