"""The loss curve of a run as a picture, with the point of a release marked."""

from __future__ import annotations

import io

from megatron_vlm.release.history import History

FILE = "loss_curve.png"
_MOST_POINTS = 2000
"""Drawn of one line; more are averaged in groups. Our choice."""

Line = list[tuple[float, float]]


def draw(history: History, iteration: int, tokens: int, title: str) -> bytes | None:
    """PNG of training and validation losses over consumed tokens.

    Args:
        history: the run's.
        iteration: the step to mark.
        tokens: its place.
        title: stands above.

    Returns:
        Null where matplotlib is not installed, or nothing is known to draw.
    """
    lines = history.curve()
    if any(name.startswith("validation_loss_") for name in lines):
        # The mean over the sets would hide the one set that there often is.
        lines.pop("validation_loss", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not any(lines.values()):
        return None
    # Not pyplot: it would change what the caller's own figures look like.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line in lines.items():
        points = _thinned(line)
        style = "o--" if name.startswith("validation") else "-"
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, label=name, linewidth=1.2, markersize=3)
    marked = False
    for name, line in history.curve(iteration).items():
        if not name.startswith("validation") and line[-1][0] == tokens:
            axes.plot(*line[-1], "o", color="black", markersize=7, zorder=5)
            marked = True
    axes.axvline(
        tokens, color="black", linewidth=0.8, linestyle=":", label=f"iteration {iteration:,}"
    )
    axes.set_xlabel("consumed tokens")
    axes.set_ylabel("loss")
    axes.set_title(title if marked else f"{title} (its own loss is not known)")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _thinned(line: Line) -> Line:
    if len(line) <= _MOST_POINTS:
        return line
    size = -(-len(line) // _MOST_POINTS)
    groups = [line[start : start + size] for start in range(0, len(line), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
