"""`mvlm data stats`: what data sets hold, and how they fill rows, told without reading a shard."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.cli.arguments import positive
from megatron_vlm.cli.data_source import Opened, add_source, open_source

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_vlm.data.look.stats import RowStats, SourceStats

HELP = "tell what data sets hold and how they fill rows, without reading a shard"

EXAMPLES = """examples:
  mvlm data stats demo data.train=datasets/train
  mvlm data stats datasets/train --model dots-vlm1 --seq-length 16384 --plot train.png"""

_MOST_ROWS = 16384
"""Rows that are planned unless told otherwise. Our choice: some seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source and what is told of it."""
    add_source(parser)
    parser.add_argument(
        "--rows",
        metavar="N",
        type=positive,
        help=f"rows that are planned (default: the run's, at most {_MOST_ROWS:,})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw histograms of lengths, pictures and fill into a .png, .svg or .pdf",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    parser.set_defaults(run_data=_run)


@dataclass(frozen=True)
class _Report:
    opened: Opened
    sources: Sequence[SourceStats]
    rejected: Sequence[int]
    epoch_tokens: Sequence[int]
    rows: RowStats
    held_out: Sequence[SourceStats]

    @property
    def run_rows(self) -> int | None:
        """Rows of the whole run; null where that means nothing."""
        training = self.opened.config.training
        if not self.opened.is_recipe:
            return None
        return training.train_iters * training.global_batch_size

    def rows_per_epoch(self, number: int) -> float:
        return self.rows.rows_per_epoch(number, self.epoch_tokens[number])


def _run(args: argparse.Namespace) -> int:
    from megatron_vlm.data.look.plots import check_plot, write_plots
    from megatron_vlm.data.look.stats import rejected, row_stats, source_stats

    if args.plot is not None:
        check_plot(args.plot)
    opened = open_source(args, refuse_long=False)
    stream, training = opened.data.stream, opened.config.training
    run_rows = training.train_iters * training.global_batch_size if opened.is_recipe else _MOST_ROWS
    report = _Report(
        opened,
        [source_stats(source) for source in stream.sources],
        [rejected(source.samples.index) for source in stream.sources],
        [source.samples.tokens for source in stream.sources],
        row_stats(stream, args.rows or min(run_rows, _MOST_ROWS)),
        [source_stats(data.stream.sources[0]) for data in opened.held_out.values()],
    )
    if args.json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print(report)
    if args.plot is not None:
        write_plots(args.plot, report.sources, report.rows, str(opened.name))
        if not args.json:
            _console().print(f"drawn: {_plain(str(args.plot))}", markup=False)
    return 0


def _as_json(report: _Report) -> dict[str, Any]:
    config, rows = report.opened.config, report.rows
    return {
        "source": report.opened.name,
        "model": config.model.name,
        "seq_length": config.training.seq_length,
        "pad_multiple": config.data.pad_multiple,
        "long_samples": config.data.long_samples,
        "sources": [_source_json(report, number) for number in range(len(report.sources))],
        "held_out": {
            s.name: {
                name: getattr(s, name)
                for name in (
                    "samples",
                    "tokens",
                    "text_tokens",
                    "picture_tokens",
                    "targets",
                    "longest",
                    "too_long",
                    "left_out",
                )
            }
            for s in report.held_out
        },
        "planned": {
            "rows": rows.rows,
            "rows_of_run": report.run_rows,
            "data_end": rows.ended,
            "tokens": int(rows.used.sum()),
            "fill": rows.fill,
            "padding": rows.padding,
            "tails": rows.tails,
        },
    }


def _source_json(report: _Report, number: int) -> dict[str, Any]:
    source, rows = report.sources[number], report.rows
    names = (
        "name", "path", "kind", "samples", "too_long", "left_out", "text_tokens", "picture_tokens",
        "tokens", "targets", "pictures", "frames", "videos", "longest",
    )  # fmt: skip
    per_epoch, batch = report.rows_per_epoch(number), _batch(report)
    finite = math.isfinite(per_epoch)
    return {
        **{name: getattr(source, name) for name in names},
        "rejected": report.rejected[number],
        "planned_samples": int(rows.source_samples[number]),
        "planned_tokens": int(rows.source_tokens[number]),
        "rows_per_epoch": per_epoch if finite else None,
        "steps_per_epoch": per_epoch / batch if finite and batch else None,
        "epochs_of_run": (report.run_rows or 0) / per_epoch if report.run_rows else None,
        "pictures_sampled_every": source.sizes.every,
        "length_histogram": {
            "edges": source.length_edges.tolist(),
            "samples": source.length_counts.tolist(),
        },
        "samples_by_pictures": source.pictures_per_sample.tolist(),
    }


def _batch(report: _Report) -> int | None:
    return report.opened.config.training.global_batch_size if report.opened.is_recipe else None


def _print(report: _Report) -> None:
    console = _console()
    config, rows = report.opened.config, report.rows
    _table(console, "an epoch of each source", ("source", "samples", "tokens", "of text",
           "of pictures", "targets", "longest"), [
        (s.name, _n(s.samples), _n(s.tokens), _n(s.text_tokens), _n(s.picture_tokens),
         _n(s.targets), _n(s.longest))
        for s in report.sources
    ])  # fmt: skip
    if report.held_out:
        _table(console, "held out", ("set", "samples", "tokens", "of text", "of pictures",
               "targets", "longest", "longer than a row"), [
            (s.name, _n(s.samples), _n(s.tokens), _n(s.text_tokens), _n(s.picture_tokens),
             _n(s.targets), _n(s.longest), _n(s.too_long))
            for s in report.held_out
        ])  # fmt: skip
    for source in report.sources:
        if source.kind == "preference":
            _say(
                console,
                f"{source.name}: the chosen answer of each pair; rejected ones do not count",
            )
    if any(source.pictures for source in report.sources):
        columns = ("source", "pictures", "frames of", "videos", "tokens of each: mean", "most")
        _table(console, "its pictures", columns, [_pictures(source) for source in report.sources])
    long_samples = config.data.long_samples
    _table(console, "what is not in it", ("source", "rejected by the build",
           f"longer than a row ({config.training.seq_length:,})", "left out"), [
        (s.name, _n(bad), _n(s.too_long), _n(s.left_out))
        for s, bad in zip(report.sources, report.rejected, strict=True)
    ])  # fmt: skip
    if long_samples == "refuse" and any(s.too_long for s in (*report.sources, *report.held_out)):
        _say(console, "data.long_samples=refuse: a run would stop at those that are too long")
    every = max(source.sizes.every for source in report.sources)
    if every > 1:
        _say(console, f"tokens of each picture: of every {every}th")
    _print_rows(console, report)
    of_run = f" of the run's {report.run_rows:,}" if report.run_rows else ""
    end = "; the data end with them" if rows.ended else ""
    _say(
        console,
        f"\n{rows.rows:,} rows{of_run} planned, of {rows.seq_length:,} tokens{end}: "
        f"{_percent(rows.fill)} full; {_percent(rows.padding)} is padding to data.pad_multiple="
        f"{config.data.pad_multiple}, {_percent(rows.tails)} unused ends",
    )
    schedule = config.data.schedule
    planned = int(rows.used.sum())
    if schedule and schedule[-1].tokens + schedule[-1].ramp_tokens > planned:
        last = schedule[-1].tokens + schedule[-1].ramp_tokens
        _say(
            console,
            f"data.schedule goes on to token {last:,}, beyond the {planned:,} planned; --rows "
            f"{math.ceil(last * rows.rows / planned)} would reach it",
        )


def _print_rows(console: Console, report: _Report) -> None:
    rows = report.rows
    batch, run_rows = _batch(report), report.run_rows
    columns = ["source", "samples", "of all", "tokens", "of all", "rows an epoch"]
    columns += ["steps an epoch", "epochs"] if batch and run_rows else []
    samples, tokens = rows.source_samples, rows.source_tokens
    table = []
    for number, source in enumerate(report.sources):
        per_epoch = report.rows_per_epoch(number)
        line = [
            source.name,
            _n(int(samples[number])),
            _percent(samples[number] / samples.sum()),
            _n(int(tokens[number])),
            _percent(tokens[number] / tokens.sum()),
            _about(per_epoch),
        ]
        if batch and run_rows:
            line += [_about(per_epoch / batch), f"{run_rows / per_epoch:,.2f}"]
        table.append(line)
    _table(console, f"the first {rows.rows:,} rows", columns, table)


def _pictures(source: SourceStats) -> Sequence[str]:
    mean = f"{source.picture_tokens / source.pictures:,.1f}" if source.pictures else "-"
    most = _n(int(source.sizes.tokens.max())) if len(source.sizes.tokens) else "-"
    return (source.name, _n(source.pictures), _n(source.frames), _n(source.videos), mean, most)


def _table(
    console: Console, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"\n{title}", title_justify="left", box=None, padding=(0, 1), pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for line in lines:
        # As Text: a name may hold what rich takes for markup.
        table.add_row(*(Text(_plain(cell)) for cell in line))
    console.print(table)


def _say(console: Console, line: str) -> None:
    console.print(_plain(line, keep="\n"), markup=False)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _plain(text: str, keep: str = "") -> str:
    from megatron_vlm.data.look.characters import visible

    encoding = sys.stdout.encoding or "utf-8"
    return visible(text, keep).encode(encoding, "backslashreplace").decode(encoding)


def _n(number: int) -> str:
    return f"{number:,}"


def _about(number: float) -> str:
    return f"about {number:,.0f}" if math.isfinite(number) else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
