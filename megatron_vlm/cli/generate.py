"""`mvlm generate`: one answer from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_vlm.data.template_text import TemplateText

_BUILT_IN = "built-in"

HELP = """Answer a question about pictures from a checkpoint.

Runs in one process, whatever layout trained the checkpoint, and prints the most likely answer. The
question is written in the chat format of the dialogues that the model was trained on.

example:
  mvlm generate --checkpoint runs/demo --image photo.png --prompt "What is shown?"
  mvlm generate --checkpoint runs/mine --prompt "Why?" --system "Be brief." --thinking on
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
    parser.add_argument("--system", metavar="TEXT", help="a system prompt (default: none)")
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="ask for a thinking trace or for none: by the template's own switch, in the built-in "
        "format by the system prompts of mvlm data build --thinking toggle (default: neither)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="PATH",
        help="another chat template than the checkpoint's: a model's folder or a file, or the word "
        f"{_BUILT_IN} for the built-in format",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the answer; raises UserError for what is wrong with the input."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    pictures = tuple(_read(path) for path in args.image)
    chat = _chat(args.chat_template)
    # Imports torch and the engine: after what can fail without them.
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer.from_checkpoint(args.checkpoint, chat) as answerer:
        names = tuple(f"--image {path}" for path in args.image)
        thinks = None if args.thinking is None else args.thinking == "on"
        question = Question(args.prompt, pictures, names, args.system, thinks)
        (answer,) = answerer.answer([question], args.max_new_tokens)
    print(answer)
    return 0


def _chat(given: str | None) -> TemplateText | Literal["recorded", "built-in"]:
    from megatron_vlm.data.template_text import TemplateText

    if given is None:
        return "recorded"
    return "built-in" if given == _BUILT_IN else TemplateText.load(Path(given))


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
