"""`mvlm status`: how a supervised run is doing."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vlm.resilience.summary import Summary

HELP = """Show where a run is: its step, its nodes and ranks, its newest checkpoint, what failed.

The effective training time is the share of the time since the first start that went into steps that
still count; what restarts threw away does not. Everything is read from the run folder.

example:
  mvlm status runs/first --watch
"""

_CAUSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run folder, `--watch` and `--json`."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run folder")
    parser.add_argument("--watch", action="store_true", help="again every two seconds, to the end")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print it, once or until the run is over.

    Raises:
        ConfigError: no run folder.
    """
    import json
    from dataclasses import asdict

    from megatron_vlm.errors import ConfigError
    from megatron_vlm.resilience.summary import summarize

    if not args.run_dir.is_dir():
        raise ConfigError(f"{args.run_dir}: no such folder; expected a run folder")
    while True:
        summary = summarize(args.run_dir)
        if args.json:
            told = json.dumps({**asdict(summary), "effective": summary.effective})
        else:
            told = "\n".join(_lines(summary))
        if args.watch and not args.json:
            print("\033[2J\033[H", end="")
        print(told, flush=True)
        if not args.watch or summary.state in ("finished", "refused", "gave up"):
            return 0
        time.sleep(2.0)


def _lines(summary: Summary) -> list[str]:
    rate = summary.seconds_per_step
    speed = f", {rate:.3g} s a step" if rate is not None else ""
    job = f"job {summary.job} on {summary.host}" if summary.job else "no Slurm job"
    lines = [
        f"state        {summary.state} ({job}, attempt {summary.attempt})",
        f"step         {summary.iteration}{speed}",
    ]
    if summary.checkpoint is None:
        lines.append("checkpoint   none yet")
    else:
        age = _duration(summary.checkpoint_age or 0.0)
        lines.append(f"checkpoint   iteration {summary.checkpoint}, {age} ago")
    for number, (name, node) in enumerate(sorted(summary.nodes.items())):
        lines.append(f"{'nodes' if number == 0 else '':<13}{name}: {_node(node)}")
    if summary.avoided:
        lines.append(f"avoided      {', '.join(summary.avoided)}")
    if summary.effective is not None:
        share, whole = 100 * summary.effective, _duration(summary.elapsed)
        lines.append(f"effective    {share:.1f}% of {whole} went into steps that count")
    failures = [cause for cause in summary.causes if cause["event"] == "failed"]
    lines.append(f"failures     {len(failures)}")
    lines += [f"  {_cause(cause)}" for cause in summary.causes[-_CAUSES:]]
    return lines


def _node(node: dict[str, Any]) -> str:
    ranks = node["ranks"]
    if not ranks:
        return "spare, ready" if node["ready"] else "getting ready"
    told = [f"rank {rank} step {at['step']} {at['phase']}" for rank, at in sorted(ranks.items())]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")


def _cause(event: dict[str, Any]) -> str:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
    about = {k: v for k, v in event.items() if k not in ("time", "event", "last_lines", "job")}
    if "culprits" in about:
        found = about.pop("culprits")
        about["culprits"] = [f"rank {c['rank']} on {c['node']} in {c['phase']}" for c in found]
    shown = ", ".join(f"{name} {value}" for name, value in about.items() if value not in ("", []))
    return f"{when} {event['event']}: {shown}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"
