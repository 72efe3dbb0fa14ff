"""`mvlm data`: builds data sets, and shows what is in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from megatron_vlm.cli import data_show, data_stats, data_verify
from megatron_vlm.data.format import DEFAULT_SHARD_MB, DEFAULT_VIDEO_FPS, DEFAULT_VIDEO_TOKENS
from megatron_vlm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_vlm.data.chat import ThinkingSettings
    from megatron_vlm.data.geometry import PictureRule
    from megatron_vlm.data.pdf.settings import PdfSettings

HELP = """\
Build data sets from conversations, documents, tars, text or preferences; look at and verify them.

example:
  mvlm data build conversations.json datasets/train
  mvlm data stats demo data.train=datasets/train
  mvlm data show demo data.train=datasets/train --rows 2 --out rows.html
  mvlm data verify datasets/train
"""

_BUILD_HELP = "turn a source into a data set: tars, an index, a tokenizer"

_EXAMPLES = """examples:
  mvlm data build conversations.json datasets/train
  mvlm data build 'tars/{000..127}.tar' datasets/captions --workers 16
  mvlm data build chats.jsonl datasets/chats --tokenizer qwen/tokenizer.json --chat-template qwen
  mvlm data build grounding.jsonl datasets/grounding --coordinates absolute --model dots-vlm1

A build that was ended early goes on after its last complete shard when the same command is run
again."""

_LONGEST_ID = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `data`'s subcommands to its parser."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build",
        help=_BUILD_HELP,
        description=f"{_BUILD_HELP[0].upper()}{_BUILD_HELP[1:]}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "source", metavar="SOURCE", type=Path, help="a file, a folder, or a quoted pattern of tars"
    )
    build.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    build.add_argument(
        "--overwrite", action="store_true", help="replace the data set that OUT holds"
    )
    _add_reading(build.add_argument_group("how SOURCE is read"))
    _add_encoding(build.add_argument_group("what becomes of it"))
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
    build.set_defaults(run_data=_build)
    for name, module in (("stats", data_stats), ("show", data_show), ("verify", data_verify)):
        module.add_arguments(
            commands.add_parser(
                name,
                help=module.HELP,
                description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
                epilog=module.EXAMPLES,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; returns the exit status.

    Raises:
        UserError: bad input.
    """
    return int(args.run_data(args))


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--form",
        default="auto",
        help="conversations, trajectories, interleaved, webdataset, energon, text, pdf, megatron "
        "or preference (default: auto, by its names and its first entries)",
    )
    group.add_argument(
        "--image-root",
        metavar="DIR",
        type=Path,
        help="folder that paths of pictures and videos start from and stay in (default: SOURCE's)",
    )
    group.add_argument(
        "--split", default="train", help="part of an Energon folder (default: %(default)s)"
    )
    group.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="field of JSON lines that holds a document (default: %(default)s)",
    )
    group.add_argument(
        "--text-unit",
        choices=("file", "line", "paragraph"),
        default="file",
        help="what is a document in a .txt file (default: %(default)s)",
    )
    group.add_argument(
        "--end-of-document",
        metavar="ID",
        type=int,
        help="token id that ends documents in .bin files (default: the one they end with, if any)",
    )
    group.add_argument(
        "--thinking",
        choices=("keep", "drop", "toggle"),
        default="keep",
        help="thinking traces: keep them, drop them, or put them under a system prompt that asks "
        "for them, or with --chat-template under its own switch (default: %(default)s)",
    )
    for which, what in (("thinking", "asks for a trace"), ("plain", "asks for none")):
        group.add_argument(
            f"--{which}-prompt",
            metavar="TEXT",
            help=f"with --thinking toggle: the system prompt that {what} (default: ours)",
        )
    group.add_argument(
        "--learn-thoughts",
        action="store_true",
        help="learn the thoughts of trajectories too, not the actions alone",
    )
    group.add_argument(
        "--pdf-mode",
        choices=("interleaved", "masked"),
        default="interleaved",
        help="PDF files: documents of text and pictures, or pages with covered text to read "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--pdf-setting",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="how PDF files are read, for example dpi=200, max_pages=50 or seed=1; may be repeated "
        "(docs/data.md lists all)",
    )


def _add_encoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="a Hugging Face tokenizer.json (default: byte-level)",
    )
    group.add_argument(
        "--chat-template",
        metavar="PATH",
        type=Path,
        help="write dialogues as another model does: its folder, its tokenizer_config.json, or a "
        "file of its Jinja template; with its --tokenizer (default: the built-in format)",
    )
    group.add_argument(
        "--knots",
        action="store_true",
        help="add the special tokens that untied rows need (data.train.NAME.untie)",
    )
    group.add_argument(
        "--video-fps",
        metavar="X",
        type=float,
        default=DEFAULT_VIDEO_FPS,
        help="frames a second taken from videos that name none (default: %(default)g)",
    )
    group.add_argument(
        "--video-max-tokens",
        metavar="N",
        type=int,
        default=DEFAULT_VIDEO_TOKENS,
        help="most language tokens of a video (default: %(default)s)",
    )
    group.add_argument(
        "--coordinates",
        choices=("relative", "absolute"),
        default="relative",
        help="of objects in text: 0 to 999 along each side, or pixels of the picture as a model "
        "sees it, which --model or --min-pixels and --max-pixels tell (default: %(default)s)",
    )
    group.add_argument(
        "--model", metavar="NAME", help="a shipped model or a YAML file, for absolute coordinates"
    )
    group.add_argument(
        "--min-pixels", metavar="N", type=int, help="smaller pictures are enlarged to so many"
    )
    group.add_argument(
        "--max-pixels", metavar="N", type=int, help="larger pictures are reduced to so many"
    )
    group.add_argument(
        "--count-points", action="store_true", help="counts list their objects' points first"
    )


def _build(args: argparse.Namespace) -> int:
    # Imported here, so that `mvlm --help` stays fast.
    from megatron_vlm.data.build import build_dataset
    from megatron_vlm.data.format import REJECTED_FILE
    from megatron_vlm.data.sources.options import SourceOptions
    from megatron_vlm.data.template_text import TemplateText
    from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer

    seen = _seen(args)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else byte_tokenizer()
    options = SourceOptions(
        image_root=args.image_root,
        split=args.split,
        text_field=args.text_field,
        text_unit=args.text_unit,
        thinking=_thinking(args),
        learn_thoughts=args.learn_thoughts,
        pdf_mode=args.pdf_mode,
        pdf=_pdf(args.pdf_setting),
        end_of_document=args.end_of_document,
    )
    summary = build_dataset(
        args.source,
        args.out,
        form=args.form,
        options=options,
        tokenizer=tokenizer.with_knots() if args.knots else tokenizer,
        template=TemplateText.load(args.chat_template) if args.chat_template else None,
        seen=seen,
        count_points=args.count_points,
        video_fps=args.video_fps,
        video_max_tokens=args.video_max_tokens,
        shard_mb=args.shard_size_mb,
        overwrite=args.overwrite,
        workers=args.workers,
        show_progress=True,
        inputs=[path for path in (args.tokenizer, args.chat_template) if path],
    )
    pairs = f" ({summary.samples // 2:,} pairs)" if summary.kind == "preference" else ""
    # A picture's placeholder is a token of the text as it is stored, and none of what it says.
    text_tokens = summary.text_tokens - summary.pictures
    _tell(
        f"{args.out}: {summary.samples:,} samples{pairs}, {summary.pictures:,} pictures, "
        f"{text_tokens:,} text tokens ({summary.loss_tokens:,} targets), {summary.shards:,} shards"
    )
    if summary.rejected:
        _tell(f"{summary.rejected:,} samples rejected; see {summary.folder / REJECTED_FILE}")
        for rejection in summary.first_rejected:
            _tell(f"  {_name(rejection)}: {rejection['reason']}")
        if summary.rejected > len(summary.first_rejected):
            _tell(f"  and {summary.rejected - len(summary.first_rejected):,} more")
    return 0


def _thinking(args: argparse.Namespace) -> ThinkingSettings:
    from megatron_vlm.data.chat import ThinkingSettings

    prompts = {
        name: value
        for name in ("thinking_prompt", "plain_prompt")
        if (value := getattr(args, name)) is not None
    }
    if prompts and args.thinking != "toggle":
        name = next(iter(prompts)).replace("_", "-")
        raise ConfigError(f"--{name}: only --thinking toggle has prompts; add it or leave this out")
    return replace(ThinkingSettings(args.thinking), **prompts)


def _pdf(given: Sequence[str]) -> PdfSettings:
    from megatron_vlm.data.pdf.settings import PdfSettings

    settings = PdfSettings()
    kinds = get_type_hints(PdfSettings)
    changes: dict[str, Any] = {}
    for setting in given:
        name, equals, text = setting.partition("=")
        if not equals or name not in kinds:
            raise ConfigError(
                f"--pdf-setting {setting}: expected NAME=VALUE with one of {', '.join(kinds)}"
            )
        kind = next(
            kind for kind in (str, float, int) if kind in (kinds[name], *get_args(kinds[name]))
        )
        try:
            changes[name] = kind(text)
        except ValueError:
            raise ConfigError(
                f"--pdf-setting {setting}: {text!r} is not of the type {kind.__name__}"
            ) from None
    return replace(settings, **changes)


@dataclass(frozen=True, slots=True)
class _GivenRule:
    """A picture rule from the command line, for the patches of dots.vlm1."""

    min_pixels: int
    max_pixels: int
    patch_size: int = 14
    spatial_merge_size: int = 2


def _seen(args: argparse.Namespace) -> PictureRule | None:
    """What the model makes of pictures, for absolute coordinates; null for relative ones."""
    pixels = [args.min_pixels, args.max_pixels]
    given = sum(value is not None for value in pixels)
    if args.coordinates == "relative":
        if args.model or given:
            raise ConfigError(
                "--model, --min-pixels and --max-pixels are for absolute coordinates; add "
                "--coordinates absolute or leave them out"
            )
        return None
    if args.model and given:
        raise ConfigError("--model tells --min-pixels and --max-pixels too; leave one or the other")
    if args.model:
        from megatron_vlm.config.load import load_model

        vision = load_model(args.model).vision
        if vision is None:
            raise ConfigError(f"--model {args.model}: has no vision tower; choose one that sees")
        return vision
    if given < 2:
        raise ConfigError(
            "--coordinates absolute: what the model sees is not known; add --model NAME, or "
            "--min-pixels and --max-pixels"
        )
    rule = _GivenRule(*pixels)
    unit = (rule.patch_size * rule.spatial_merge_size) ** 2
    if not 0 < rule.min_pixels <= rule.max_pixels or rule.max_pixels < unit:
        raise ConfigError(
            f"--min-pixels {rule.min_pixels}, --max-pixels {rule.max_pixels}: expected 1 or more, "
            f"the second no less than the first and than {unit}"
        )
    return rule


def _name(rejection: Mapping[str, Any]) -> str:
    draft = f", sample {rejection['draft']}" if rejection["draft"] else ""
    given = rejection["id"]
    if given is None:
        return f"entry {rejection['entry']}{draft}"
    text = str(given)
    shown = text if len(text) <= _LONGEST_ID else text[:_LONGEST_ID] + "..."
    return f"entry {rejection['entry']}{draft} (id {shown})"


def _tell(line: str) -> None:
    """Print what may hold anything that stands in a user's list or names a file."""
    from megatron_vlm.data.build_progress import printable

    print(printable(line, sys.stdout.encoding))
