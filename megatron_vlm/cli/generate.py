"""`mvlm generate`: one answer from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vlm.errors import ConfigError, DataError

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
    """Print the answer; raises UserError for what is wrong with the input."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    pictures = tuple(_read(path) for path in args.image)
    # Imports torch and the engine: after what can fail without them.
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer.from_checkpoint(args.checkpoint) as answerer:
        names = tuple(f"--image {path}" for path in args.image)
        question = Question(args.prompt, pictures, names)
        (answer,) = answerer.answer([question], args.max_new_tokens)
    print(answer)
    return 0


def _read(path: Path) -> bytes:
    from megatron_vlm.data.sources.media import MAX_ENCODED_BYTES

    try:
        size = path.stat().st_size
        # A pipe or a device would block or never end.
        if not path.is_file():
            raise DataError(f"--image {path}: is not a file; expected a picture file")
        if size > MAX_ENCODED_BYTES:
            raise DataError(
                f"--image {path}: {size} bytes; expected a picture file of at most "
                f"{MAX_ENCODED_BYTES}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"--image {path}: cannot be read ({reason}); expected a picture file"
        ) from None
