"""`mvlm import`: weights from Hugging Face."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vlm.release.dtypes import CHOICES

HELP = """Turn a Hugging Face folder into a checkpoint.

Reads config.json and safetensors of Dots1, DeepSeek-V3 (float8 too) and Qwen2, and of dots' encoder
before one of them: megatron_vlm, dots.vlm1, dots.ocr. Every tensor is accounted for before any is
read, and memory stays at some of the largest. A checkpoint loads in every layout, so none is
chosen here. To train from it: model=CHECKPOINT/iter_0000000/model.yaml
checkpoint.load=CHECKPOINT checkpoint.load_optimizer=false

example:
  mvlm import dots.llm1.base checkpoints/dots
  mvlm import DeepSeek-V3 checkpoints/v3 --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare folders and options."""
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="folder to read")
    parser.add_argument("target", metavar="CHECKPOINT", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=CHOICES,
        default="keep",
        help="what weights become (default: what each is; float8 becomes bfloat16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the import that CHECKPOINT holds"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Import; raises UserError for what is wrong with the folder."""
    from megatron_vlm.release.importing import as_json, describe, import_folder

    summary = import_folder(
        args.source, args.target, dtype=args.dtype, overwrite=args.overwrite, show_progress=True
    )
    print(as_json(summary) if args.json else describe(summary))
    return 0
