"""`mvlm timeline`: a recorded step as a picture and as a trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.cli.arguments import positive

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_vlm.planning.timeline import Timeline

HELP = """Draw a step that a run has recorded: every rank's encoding, exchange, passes and waiting.

A run records a step every training.timeline_interval steps. Beside the record are written a PNG
and a trace for Perfetto or chrome://tracing; the times of each kind of work are printed.

example:
  mvlm timeline runs/demo
  mvlm timeline runs/demo --iteration 200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run folder and the step."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run folder")
    parser.add_argument(
        "--iteration", type=positive, metavar="N", help="a recorded step (default: the last)"
    )


def run(args: argparse.Namespace) -> int:
    """Write both and print the sums; raises UserError where nothing fitting was recorded."""
    import json

    from rich.console import Console

    from megatron_vlm.errors import ConfigError
    from megatron_vlm.planning.drawing import chrome_trace, timeline_png
    from megatron_vlm.planning.recorded import read_timeline, recorded
    from megatron_vlm.planning.timeline import Timeline

    if not args.run_dir.is_dir():
        raise ConfigError(f"{args.run_dir}: no such folder; expected a run folder")
    found = recorded(args.run_dir)
    if not found:
        raise ConfigError(
            f"{args.run_dir}: no step is recorded here; train with training.timeline_interval=N"
        )
    iteration = args.iteration or max(found)
    if iteration not in found:
        known = ", ".join(map(str, found))
        raise ConfigError(f"--iteration {iteration}: the recorded steps are {known}")
    events, layout = read_timeline(found[iteration])
    picture, trace = (found[iteration].with_suffix(suffix) for suffix in (".png", ".json"))
    timeline_png(events, picture, f"Iteration {iteration}, {layout}")
    trace.write_text(json.dumps(chrome_trace(events)))
    Console().print(_table(Timeline.from_events(events)))
    print(f"picture: {picture}\ntrace:   {trace}")
    return 0


def _table(timeline: Timeline) -> Table:
    from rich.table import Table

    from megatron_vlm.planning.timeline import KINDS

    table = Table(title=f"{timeline.step_seconds:.4g} s on {timeline.ranks} ranks")
    for name in ("", "mean s", "most s", "share"):
        table.add_column(name, justify="right" if name else "left")
    shares = timeline.shares()
    rows = [(kind, timeline.kind_seconds(kind)) for kind in KINDS]
    for name, seconds in [*rows, ("wait", timeline.wait_seconds)]:
        table.add_row(
            name.replace("_", " "),
            f"{seconds.mean():.4g}",
            f"{seconds.max():.4g}",
            f"{shares[name]:.1%}",
        )
    return table
