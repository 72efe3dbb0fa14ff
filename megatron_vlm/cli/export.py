"""`mvlm export`: weights to Hugging Face."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_vlm.errors import ConfigError
from megatron_vlm.release.dtypes import CHOICES

HELP = """Turn a checkpoint into a folder that transformers loads.

Takes a checkpoint of any layout. Language models become Dots1, DeepSeek-V3 or Qwen2; with dots'
encoder, megatron_vlm, dots.vlm1 or dots.ocr. The folder appears when all of it is written. Experts'
biases are counted among its parameters; `mvlm plan` leaves them out.

example:
  mvlm export runs/demo exported/demo
  mvlm export runs/demo exported/demo-fp32 --dtype float32
"""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare folders and options."""
    parser.add_argument(
        "source",
        metavar="CHECKPOINT",
        type=Path,
        help="a run folder (its newest checkpoint) or a checkpoint",
    )
    parser.add_argument("target", metavar="HF_DIR", type=Path, help="folder to write")
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
        "--overwrite", action="store_true", help="replace the export that HF_DIR holds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Export; raises UserError for what is wrong with the checkpoint or the folder."""
    most = parse_bytes(args.max_shard_size)
    from megatron_vlm.release.exporting import as_json, describe, export_checkpoint

    summary = export_checkpoint(
        args.source,
        args.target,
        dtype=args.dtype,
        max_shard_bytes=most,
        overwrite=args.overwrite,
        show_progress=True,
    )
    print(as_json(summary) if args.json else describe(summary))
    return 0


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ConfigError(
            f"--max-shard-size {text}: expected a size with its unit, such as 5GB or 500MB"
        )
    return size
