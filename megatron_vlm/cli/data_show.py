"""`mvlm data show`: some rows of a run on one page, token by token, as they are trained on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.arguments import positive
from megatron_vlm.cli.data_source import Opened, add_source, open_source

if TYPE_CHECKING:
    from megatron_vlm.data.index import DatasetIndex
    from megatron_vlm.data.rows import Cursor
from megatron_vlm.data.stream import RowStream

HELP = "show rows of a run on one HTML page: tokens, what is learned, positions, pictures"

EXAMPLES = """examples:
  mvlm data show demo data.train=datasets/train --rows 2
  mvlm data show datasets/train --model dots-vlm1 --start 1000 --out train.html

The file needs no network and runs nothing of the data; any browser opens it."""

_ROWS_AT_ONCE = 1024
_MOST_ROWS = 256
"""More would make a page that no browser opens. Our choice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source and the rows."""
    add_source(parser)
    parser.add_argument(
        "--rows",
        metavar="N",
        type=positive,
        default=2,
        help=f"rows to show, at most {_MOST_ROWS} (default: %(default)s)",
    )
    parser.add_argument(
        "--start", metavar="ROW", type=int, default=0, help="the first one (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("rows.html"),
        help="file to write; it is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--jpeg",
        metavar="QUALITY",
        type=positive,
        help="write pictures as JPEG of a quality from 1 to 95: a smaller file, not exact to the "
        "pixel (default: PNG)",
    )
    parser.set_defaults(run_data=_run)


def _run(args: argparse.Namespace) -> int:
    from megatron_vlm.data.build_progress import printable
    from megatron_vlm.data.format import write_atomic
    from megatron_vlm.data.look.sheet import page
    from megatron_vlm.errors import ConfigError, DataError

    if args.rows > _MOST_ROWS:
        raise ConfigError(f"--rows {args.rows}: at most {_MOST_ROWS} fit on a page")
    if args.start < 0:
        raise ConfigError(f"--start {args.start}: expected the number of a row, from 0")
    if args.jpeg is not None and args.jpeg > 95:
        raise ConfigError(f"--jpeg {args.jpeg}: expected a quality from 1 to 95")
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {args.out}: expected a name that ends in .html")
    opened = open_source(args, refuse_long=True)
    cursor = _skip(opened.data.stream, args.start)
    sections = list(_sections(opened, cursor, args.rows, args.jpeg))
    title = f"{opened.name}: " + (
        f"row {args.start:,}"
        if len(sections) == 1
        else f"rows {args.start:,} to {args.start + len(sections) - 1:,}"
    )
    content = page(title, _facts(opened), sections, _templates(opened)).encode()
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, content)
    except OSError as error:
        raise DataError(
            f"{args.out}: cannot be written ({error.strerror or error}); choose another file"
        ) from error
    print(printable(f"{args.out}: {len(sections)} rows, {len(content) / 1e6:,.1f} MB", None))
    return 0


def _skip(stream: RowStream, count: int) -> Cursor:
    """The place behind so many rows."""
    from megatron_vlm.errors import ConfigError

    cursor = stream.start()
    while cursor.rows < count:
        rows, cursor = stream.take(cursor, min(count - cursor.rows, _ROWS_AT_ONCE))
        if not rows:
            break
    if not stream.take(cursor, 1)[0]:
        raise ConfigError(f"--start {count}: the data end after {cursor.rows:,} rows; lower it")
    return cursor


def _sections(opened: Opened, cursor: Cursor, count: int, quality: int | None) -> Iterator[str]:
    from megatron_vlm.data.decoders import CpuDecoder
    from megatron_vlm.data.loader import RankView, StepLoader
    from megatron_vlm.data.look.row_view import view_row
    from megatron_vlm.data.look.sheet import row_section
    from megatron_vlm.data.tokenizer import Tokenizer
    from megatron_vlm.training.datasets import num_workers

    config, data = opened.config, opened.data
    vision = config.model.vision
    tokenizer = Tokenizer.load(data.readers[0].index.tokenizer_path)
    # One row at a time, by one process: what a row holds depends on neither.
    loader = StepLoader(
        data.stream,
        data.readers,
        RankView.alone(),
        cursor,
        global_batch_size=1,
        micro_batch_size=1,
        vision=vision,
        decoder=CpuDecoder(),
        prefetch_steps=0,
        num_workers=num_workers(config),
        max_rows=count,
        warn_seconds=config.data.warn_seconds,
        timeout_seconds=config.data.timeout_seconds,
    )
    with loader:
        for step in islice(loader, count):
            row = view_row(step, data.stream, data.readers, tokenizer, vision)
            yield row_section(row, config.training.seq_length, quality)


def _chat(index: DatasetIndex) -> str:
    if not index.has_dialogues:
        return ""
    return f", {'built-in chat format' if index.template is None else 'written by a chat template'}"


def _templates(opened: Opened) -> list[tuple[str, str]]:
    """The chat templates of the sources, as text; what they write by name stands above."""
    found = []
    for source in opened.data.stream.sources:
        template = source.samples.index.template
        if template is not None:
            named = [f"{name}: {text}\n" for name, text in template.special_tokens.items()]
            text = "".join([*named, "\n" if named else "", template.source])
            found.append((f"chat template of {source.name}", text))
    return found


def _facts(opened: Opened) -> list[tuple[str, str]]:
    config = opened.config
    sources = [
        f"{source.name} ({source.samples.index.path}, {source.samples.index.kind}s, coordinates "
        f"{source.samples.index.coordinates['convention']}{_chat(source.samples.index)})"
        for source in opened.data.stream.sources
    ]
    return [
        ("data", "; ".join(sources)),
        ("model", config.model.name),
        (
            "rows",
            f"{config.training.seq_length:,} tokens, samples padded to multiples of "
            f"{config.data.pad_multiple}, {'shuffled' if config.data.shuffle else 'in order'}, "
            f"seed {config.training.seed}",
        ),
    ]
