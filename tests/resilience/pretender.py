"""A rank that goes through steps without training, beside others, and breaks when told to."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.resilience import attempts, heartbeat


def main(words: Sequence[str]) -> int:
    """One rank; the run's folder stands in for the network and for the checkpoints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fault", default="")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--always", action="store_true")
    args = parser.parse_args(words)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = os.environ[attempts.VARIABLE]
    local = f"{os.environ['LOCAL_RANK']} of {os.environ['LOCAL_WORLD_SIZE']}"
    place = f"{rank} of {world}, {local}, attempt {attempt}"
    (args.run_dir / f"place_{rank}").write_text(place)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    for step in range(1, args.steps + 1):
        heartbeat.enter("forward", step)
        flag = args.run_dir / "broken"
        if (rank, step) == (args.rank, args.step) and (args.always or not flag.exists()):
            flag.touch()
            code = {"kill": _kill, "raise": _raise, "leave": int, "stuck": _stuck,
                    "frozen": _freeze, "refuse": _refuse}[args.fault]()  # fmt: skip
            if code is not None:
                return code
        heartbeat.enter("wait")
        (args.run_dir / f"at_{attempt}_{step}_{rank}").touch()
        met = [args.run_dir / f"at_{attempt}_{step}_{other}" for other in range(world)]
        while not all(path.exists() for path in met):
            time.sleep(0.01)
        if asked:
            (args.run_dir / f"saved_{rank}").touch()
            return 0
        time.sleep(0.1)
    if rank == 0:
        attempts.mark_finished(args.run_dir, args.steps)
    return 0


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("of step 4")


def _stuck() -> None:
    while True:
        time.sleep(0.01)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _refuse() -> int:
    print("mvlm: error: no such thing", file=sys.stderr)
    return 2
