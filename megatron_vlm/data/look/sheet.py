"""One page that shows rows: a single HTML file that loads nothing and runs nothing of the data.

Whatever comes from data is text: signs stand for what cannot be seen, and the rest is escaped. The
page's policy allows its own style and script alone, by their digests, and pictures that it holds.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.look.entries import entry_id
from megatron_vlm.data.look.lines import Line, lines_of
from megatron_vlm.data.look.markup import counted, listed, safe
from megatron_vlm.data.look.row_view import RowView, Segment, ShownSample, Span
from megatron_vlm.data.look.sheet_bar import row_bar
from megatron_vlm.data.look.sheet_pictures import picture_figure

_STYLE = Path(__file__).with_name("sheet.css")
_SCRIPT = Path(__file__).with_name("sheet.js")

_BREAK = "\n"
_OPEN_LINES = (12, 3)
"""Lines of a long sample that are shown at once, at its beginning and end. Our choice."""

_LONGEST_ENTRY = 20_000
"""Characters of an entry that are shown. Our choice."""


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    rows: Iterable[str],
    texts: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole file.

    Args:
        title: stands above.
        facts: names and values: what was asked for.
        rows: from `row_section`.
        texts: names and long texts, folded away below the facts.
    """
    style, script = _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    named = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts)
    folded = "".join(
        f"<details><summary>{safe(name)}</summary><pre>{safe(text, _BREAK)}</pre></details>"
        for name, text in texts
    )
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{safe(title)}</title><style>{style}</style></head>\n",
            f'<body><header><h1>{safe(title)}</h1><dl class="facts">{named}</dl>',
            folded,
            _LEGEND,
            "</header>\n<main>\n",
            *rows,
            '</main>\n<div id="where" role="status" aria-live="polite"></div>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


_LEGEND = (
    '<p class="legend"><b>learned</b> <i>context</i> <i class="s">&lt;|special|&gt;</i> '
    '<b class="s">&lt;|special, learned|&gt;</b> <span class="pad">padding</span>'
    '<label><input type="checkbox" name="edges"> edges of tokens</label>'
    '<label><input type="checkbox" name="grid"> language tokens of pictures</label>'
    '<small class="keys">Keys: j and k go from sample to sample, the arrows from token to token.'
    "</small></p>"
)


def row_section(row: RowView, seq_length: int, quality: int | None = None) -> str:
    """One row as a part of the page.

    Args:
        row: taken apart.
        seq_length: its tokens.
        quality: of JPEG pictures; null: PNG.
    """
    real = sum(span.tokens for s in row.segments for span in s.spans if span.kind != "padding")
    pictures = sum(span.picture is not None for s in row.segments for span in s.spans)
    samples = sum(len(segment.samples) for segment in row.segments)
    told = [
        counted(samples, "sample"),
        f"{real:,} of {seq_length:,} tokens real ({100 * real / seq_length:.1f}%)",
        f"{int(row.learned.sum()):,} learned",
    ]
    told += [counted(pictures, "picture")] if pictures else []
    told += ["untied: one segment, cut and shuffled"] if row.untied else []
    parts = [
        f'<section class="row" id="row-{row.number}" data-row="{row.number}">'
        f"<h2>Row {row.number:,} <small>{listed(told)}</small></h2>",
        row_bar(row, seq_length),
    ]
    parts += [_segment(row, segment, place, quality) for place, segment in enumerate(row.segments)]
    if row.filler:
        parts.append(
            f'<p class="filler" data-first="{seq_length - row.filler}" data-n="{row.filler}">'
            f"{row.filler:,} tokens left over at the end</p>"
        )
    parts.append("</section>\n")
    return "".join(parts)


def _segment(row: RowView, segment: Segment, place: int, quality: int | None) -> str:
    learned = int(row.learned[segment.first : segment.first + segment.padded].sum())
    blank = segment.failure is not None
    last = segment.first + segment.length - 1
    told = f"tokens {segment.first:,}-{last:,} of the row, {learned:,} learned"
    parts = [f'<article id="row-{row.number}-{place}" class="segment{" blank" if blank else ""}">']
    if row.untied:
        documents = "".join(
            f"<li>{_name(sample)}: {_from(sample)}</li>" for sample in segment.samples
        )
        parts.append(
            f"<h3>{counted(len(segment.samples), 'document')} as one segment</h3>"
            f'<p class="from">{told}</p>'
            f"<details><summary>the documents</summary><ol>{documents}</ol></details>"
        )
    else:
        (sample,) = segment.samples
        parts.append(
            f'<h3>{_name(sample)}</h3><p class="from">{_from(sample)}<br>{told}</p>{_entry(sample)}'
        )
    if segment.failure is not None:
        parts.append(f'<p class="failure">Left blank: {safe(segment.failure)}</p>')
    if segment.several and any(s.picture is not None and s.picture.marks for s in segment.spans):
        parts.append(
            '<p class="from">Boxes and points are drawn on the picture before the text that names '
            "them; which of several pictures is meant, the text does not say.</p>"
        )
    parts.append(_tokens(row, segment, quality))
    parts.append("</article>")
    return "".join(parts)


def _tokens(row: RowView, segment: Segment, quality: int | None) -> str:
    lines = [
        _heading(segment, line) + _line(row, line, quality)
        for line in lines_of(segment.spans, row.positions, segment.headings)
    ]
    first, last = _OPEN_LINES
    if len(lines) > first + last + 1:
        middle = "".join(lines[first:-last])
        hidden = len(lines) - first - last
        lines = [
            *lines[:first],
            f"<details><summary>{counted(hidden, 'line')} more</summary>{middle}</details>",
            *lines[-last:],
        ]
    label = f"tokens of row {row.number} from {segment.first}"
    return (
        f'<div class="tokens" tabindex="0" role="group" aria-label="{label}">{"".join(lines)}</div>'
    )


def _heading(segment: Segment, line: Line) -> str:
    heading = segment.headings.get(line.first)
    return f"<h4>{safe(heading)}</h4>" if heading is not None else ""


def _line(row: RowView, line: Line, quality: int | None) -> str:
    tokens = sum(span.tokens for span in line.spans)
    ids = _ids(row.tokens[line.first : line.first + tokens])
    position = int(row.positions[line.first])
    shown = "".join(_span(span, quality) for span in line.spans)
    kind = "line shot" if line.is_frame else "line"
    return (
        f'<div class="{kind}" data-first="{line.first}" data-position="{position}" '
        f'data-ids="{ids}">'
        f'<span class="at">{position}</span><div class="text">{shown}</div></div>'
    )


def _span(span: Span, quality: int | None) -> str:
    n = f' data-n="{span.tokens}"' if span.tokens > 1 else ""
    if span.picture is not None:
        return picture_figure(span.picture, span.tokens, quality)
    if span.kind == "padding":
        n = f'data-n="{span.tokens}" data-kind="padding"'
        return f'<i class="pad" {n}>padding: {span.tokens:,}</i>'
    tag = "b" if span.learned else "i"
    kind = ' class="s"' if span.kind == "special" else ""
    return f"<{tag}{kind}{n}>{_token_text(span.text)}</{tag}>"


def _token_text(text: str) -> str:
    """A line break is shown, and breaks the line."""
    if not text:
        return "<u>[nothing]</u>"
    return "<u>\u21b5</u>\n".join(safe(part, "\t") for part in text.split("\n"))


def _ids(ids: NDArray[np.int64]) -> str:
    """For example `12 258*64 7`: what follows itself is counted."""
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    times = np.diff(starts, append=len(ids))
    return " ".join(
        f"{ids[start]}*{count}" if count > 1 else f"{ids[start]}"
        for start, count in zip(starts.tolist(), times.tolist(), strict=True)
    )


def _name(sample: ShownSample) -> str:
    found = entry_id(sample.entry)
    identity = "" if found is None else f" <small>id {safe(_short(found))}</small>"
    return f"{safe(sample.source)}, sample {sample.number:,}{identity}"


def _from(sample: ShownSample) -> str:
    told = f"from {sample.origin}; {sample.member}.json in {sample.shard} of {sample.path}"
    if sample.length != sample.total:
        last = sample.offset + sample.length - 1
        told += f"; its tokens {sample.offset:,}-{last:,} of {sample.total:,}"
    return safe(told)


def _entry(sample: ShownSample) -> str:
    if sample.entry is None:
        return ""
    text = sample.entry.decode("utf-8", "replace")
    try:
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        pass  # shown as it is
    cut = len(text) - _LONGEST_ENTRY
    more = f"\n... and {cut:,} characters more" if cut > 0 else ""
    return (
        "<details><summary>the entry as it came</summary>"
        f"<pre>{safe(text[:_LONGEST_ENTRY], chr(10))}{more}</pre></details>"
    )


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _digest(content: str) -> str:
    return "sha256-" + b64encode(sha256(content.encode()).digest()).decode()
