"""`mvlm generate`: one answer from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vlm.errors import DataError

HELP = """Answer a question about pictures from a checkpoint.

Runs in one process, whatever layout trained the checkpoint, and prints the most likely answer.

example:
  mvlm generate --checkpoint runs/demo --image photo.png --prompt "What is shown?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run folder (its newest checkpoint) or a checkpoint",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture; repeat for several, in the order of their <image> marks",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the answer."""
    pictures = tuple(_read(path) for path in args.image)
    # Imports torch and the engine: after what can fail without them.
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer.from_checkpoint(args.checkpoint) as answerer:
        (answer,) = answerer.answer([Question(args.prompt, pictures)], args.max_new_tokens)
    print(answer)
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"--image {path}: cannot be read ({error.strerror}); expected a picture file"
        ) from None
