"""Drawings of what `stats` counts: one figure, its panels only of what there is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from megatron_vlm.data.look.characters import visible
from megatron_vlm.data.look.stats import RowStats, SourceStats
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
"""What a drawing may be written as, by the end of its file's name."""

_COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8d6a9f", "#d19a2a", "#4f9da6", "#7f7f7f")
_INK = "#333333"
_LONGEST_NAME = 28

Panel: TypeAlias = "Callable[[Axes], None]"


def check_plot(path: Path) -> None:
    """Refuse what `write_plots` could not write, before anything is counted.

    Raises:
        DataError: an unknown format, or no matplotlib.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise DataError(
            f"{path}: drawings end in {', '.join(f'.{name}' for name in FORMATS)}; rename it"
        )
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DataError(
            "drawings need matplotlib: pip install 'megatron-vlm[demo]', or leave out --plot"
        ) from error


def write_plots(path: Path, sources: Sequence[SourceStats], rows: RowStats, title: str) -> None:
    """Draw lengths, pictures, the fill of rows and, of a mixture, the shares of its sources.

    Args:
        path: ends in one of `FORMATS`.
        sources: of the run.
        rows: its first ones.
        title: stands above.

    Raises:
        DataError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(sources, rows)
    columns = 2 if len(panels) <= 4 else 3
    lines = -(-len(panels) // columns)
    # Names are data: a dollar sign in them is no formula. Not pyplot: it is the caller's.
    settings: Any = {
        "text.parse_math": False, "svg.hashsalt": "megatron-vlm", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "text.color": _INK,
        "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=(4.6 * columns, 3.2 * lines + 0.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(visible(title), x=0.01, ha="left", fontsize=12)
        for number, panel in enumerate(panels, 1):
            panel(figure.add_subplot(lines, columns, number))
        content = io.BytesIO()
        kind = path.suffix[1:].lower()
        stamp = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}[kind]
        figure.savefig(content, format=kind, metadata={stamp: None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); choose another file"
        ) from error


def _panels(sources: Sequence[SourceStats], rows: RowStats) -> list[Panel]:
    panels: list[Panel] = [lambda axes: _lengths(axes, sources, rows.seq_length)]
    if any(source.pictures for source in sources):
        panels += [
            lambda axes: _picture_sizes(axes, sources),
            lambda axes: _picture_tokens(axes, sources),
            lambda axes: _pictures_per_sample(axes, sources),
        ]
    panels.append(lambda axes: _fill(axes, rows))
    if len(sources) > 1:
        panels.append(lambda axes: _shares(axes, sources, rows))
    return panels


def _lengths(axes: Axes, sources: Sequence[SourceStats], seq_length: int) -> None:
    for number, source in enumerate(sources):
        axes.stairs(
            source.length_counts, source.length_edges, label=_label(source), color=_colour(number)
        )
    axes.axvline(seq_length, color=_INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="tokens of a sample", ylabel="samples")
    _log(axes, x=True, y=True)
    axes.set_title(f"Lengths (dotted: a row, {seq_length:,})")
    _legend(axes, sources)


def _picture_sizes(axes: Axes, sources: Sequence[SourceStats]) -> None:
    height = np.concatenate([source.sizes.height for source in sources])
    width = np.concatenate([source.sizes.width for source in sources])
    # Each point stands for as many pictures as its set was thinned by.
    weight = np.concatenate(
        [np.full(len(source.sizes.height), source.sizes.every) for source in sources]
    )
    low = max(1, min(int(height.min()), int(width.min())))
    high = max(int(height.max()), int(width.max()))
    drawn = axes.hexbin(
        width, height, C=weight, reduce_C_function=np.sum, gridsize=36, bins="log",
        xscale="log", yscale="log", cmap="viridis", linewidths=0.2,
    )  # fmt: skip
    axes.plot([low, high], [low, high], color=_INK, linewidth=0.6, linestyle=":")
    assert axes.figure is not None
    bar = axes.figure.colorbar(drawn, ax=axes, label="pictures")
    bar.ax.yaxis.set_major_formatter(_number)
    bar.ax.yaxis.set_minor_formatter("")
    axes.set(xlabel="width in pixels", ylabel="height in pixels")
    _log(axes, x=True, y=True)
    axes.set_title("Sizes of pictures, as stored" + _sampled(sources))


def _picture_tokens(axes: Axes, sources: Sequence[SourceStats]) -> None:
    most = max(int(source.sizes.tokens.max(initial=1)) for source in sources)
    edges = np.geomspace(1, most + 1, 48)
    for number, source in enumerate(sources):
        if source.pictures:
            counts = np.histogram(source.sizes.tokens, edges)[0] * source.sizes.every
            axes.stairs(counts, edges, label=_label(source), color=_colour(number))
    axes.set(xlabel="language tokens of a picture", ylabel="pictures")
    _log(axes, x=True)
    axes.set_title("Tokens of pictures" + _sampled(sources))
    _legend(axes, sources)


def _pictures_per_sample(axes: Axes, sources: Sequence[SourceStats]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, source in enumerate(sources):
        counts = source.pictures_per_sample
        axes.stairs(
            counts, np.arange(len(counts) + 1) - 0.5, label=_label(source), color=_colour(number)
        )
    axes.set(xlabel="pictures of a sample, frames included", ylabel="samples")
    axes.set_ylim(bottom=0.7)
    _log(axes, y=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Pictures per sample")
    _legend(axes, sources)


def _fill(axes: Axes, rows: RowStats) -> None:
    share = 100 * rows.used / rows.seq_length
    # Where all rows are full, the bins still have a width.
    low = min(float(np.floor(share.min())), 99.0)
    axes.hist(share, bins=np.linspace(low, 100, 51).tolist(), color=_colour(0))
    axes.set(xlabel="per cent of a row that is real tokens", ylabel="rows")
    _log(axes, y=True)
    axes.set_title(f"Fill of {rows.rows:,} planned rows: {100 * rows.fill:.1f}%")


def _shares(axes: Axes, sources: Sequence[SourceStats], rows: RowStats) -> None:
    totals = rows.part_tokens.sum(axis=1, keepdims=True)
    share = 100 * rows.part_tokens / np.maximum(totals, 1)
    # A step for each stretch; the last value closes the last one.
    steps = np.concatenate([share, share[-1:]])
    axes.stackplot(
        rows.part_rows,
        steps.T,
        step="post",
        labels=[_label(source) for source in sources],
        colors=[_colour(number) for number in range(len(sources))],
    )
    axes.set(xlabel="row of the run", ylabel="per cent of the tokens", ylim=(0, 100))
    axes.set_xlim(0, rows.rows)
    axes.set_title(f"Sources of {rows.rows:,} planned rows")
    axes.legend(fontsize="x-small", loc="lower left")


def _log(axes: Axes, x: bool = False, y: bool = False) -> None:
    """Logarithmic axes whose numbers are plain: powers are formulas, which are off."""
    from matplotlib.ticker import LogLocator

    for axis, wanted, scale in (
        (axes.xaxis, x, axes.set_xscale),
        (axes.yaxis, y, axes.set_yscale),
    ):
        if wanted:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0,), numticks=7))
            low, high = axis.get_view_interval()
            if high / max(low, 1e-9) < 10:
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
            axis.set_major_formatter(_number)
            axis.set_minor_formatter("")


def _number(value: float, _: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def _legend(axes: Axes, sources: Sequence[SourceStats]) -> None:
    if len(sources) > 1:
        axes.legend(fontsize="x-small", frameon=False)


def _label(source: SourceStats) -> str:
    name = visible(source.name)
    # A leading underscore would keep it out of the legend.
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026"
    return f"\u200b{name}" if name.startswith("_") else name


def _sampled(sources: Sequence[SourceStats]) -> str:
    every = max(source.sizes.every for source in sources)
    return f" (every {every}th)" if every > 1 else ""


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
