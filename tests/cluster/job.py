"""A training run on the cluster of a test: sent, watched, disturbed, and compared in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_vlm.checkpoint.stored import StoredTensors
from megatron_vlm.resilience import events

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 60
SAVE_INTERVAL = 10
NODES, RANKS_PER_NODE, SPARES = 2, 2, 1
_MVLM = Path(sys.executable).parent / "mvlm"
_TEMPLATE = "megatron_vlm.resilience.template"


def words(data: Path, run_dir: Path, *more: str) -> list[str]:
    """The recipe of all these tests and its overrides: 4 ranks, pipeline and experts over both."""
    return [
        str(REPOSITORY / "tests" / "nano.yaml"),
        f"data.train={data / 'train'}",
        f"run_dir={run_dir}",
        f"training.train_iters={STEPS}",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.expert_model_parallel_size=2",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        "resilience.beat_s=0.5",
        "resilience.node_timeout_s=6",
        "resilience.hang_timeout_s=6",
        "resilience.start_timeout_s=120",
        *more,
    ]


def launched(data: Path, run_dir: Path, *more: str) -> Result:
    """The same run without Slurm, supervisor or fault."""
    command = [str(_MVLM), "launch", *words(data, run_dir, *more), "--nproc", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return Result(run_dir)


class Job:
    """One run under `mvlm submit`."""

    def __init__(self, cluster: Any, data: Path, run_dir: Path, *more: str) -> None:
        """Nothing is sent yet; `more` overrides the recipe."""
        self.cluster, self._data, self._more = cluster, data, more
        self.number = ""
        self.move_to(run_dir)

    def move_to(self, run_dir: Path) -> None:
        """Have it run in another folder; before it is sent."""
        self.run_dir = run_dir
        self.words = words(self._data, run_dir, *self._more)

    def submit(
        self, *options: str, fault: str = "", nodes: int = NODES, spares: int = SPARES
    ) -> subprocess.CompletedProcess[str]:
        """Send it; what `mvlm submit` said."""
        environment = os.environ | self.cluster.environment | {"OMP_NUM_THREADS": "1"}
        if fault:
            environment["PYTHONPATH"] = str(Path(__file__).parent / "faults")
            environment["MVLM_TEST_FAULT"] = f"{fault} {self.run_dir}/broken"
        command = [
            str(_MVLM), "submit", *self.words, "--nodes", str(nodes), "--ranks-per-node",
            str(RANKS_PER_NODE), "--spares", str(spares), *options,
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode == 0:
            self.number = done.stdout.split()[1].rstrip(":")
        return done

    def sent(self, *options: str, **how: Any) -> Job:
        """Send it; fails unless it was taken."""
        done = self.submit(*options, **how)
        assert done.returncode == 0, done.stderr
        return self

    # What happened

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """All events so far, or those of a name."""
        return [e for e in events.read(self.run_dir) if name in ("", e["event"])]

    def iteration(self) -> int:
        """The newest step in the metrics."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["iteration"]) if lines else 0

    def until(self, happened: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait for something; fails with what the run said."""
        deadline = time.monotonic() + seconds
        while True:
            found = happened()
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {seconds:.0f} s\n{self.told()}")
            time.sleep(0.05)

    def until_step(self, step: int, seconds: float = 90.0) -> None:
        """Wait until a step is done."""
        self.until(lambda: self.iteration() >= step, seconds, f"step {step}")

    def until_event(self, name: str, count: int = 1, seconds: float = 60.0) -> dict[str, Any]:
        """Wait for an event for the `count`-th time; it."""
        enough = self.until(
            lambda: len(self.events(name)) >= count, seconds, f"event {name!r} number {count}"
        )
        assert enough
        return self.events(name)[count - 1]

    def until_training_again(self, since: float, seconds: float) -> float:
        """Wait until ranks train that were started after a moment; seconds since that moment."""

        def again() -> float:
            later = [e["time"] for e in self.events("training") if e["time"] > since]
            return later[0] - since if later else 0.0

        # Twice the bound, so that a failure tells how long it took.
        took = float(self.until(again, 2 * seconds, "training after the fault"))
        print(f"training again after {took:.1f} s")
        assert took <= seconds, f"training again after {took:.1f} s, not {seconds:.0f}"
        return took

    def until_finished(self, seconds: float = 120.0) -> None:
        """Wait until the job has ended, and its run with it."""
        self.until(lambda: (self.run_dir / "finished.json").exists(), seconds, "end of the run")
        self.until(lambda: self.state() == "COMPLETED", 30, "end of the job")

    def state(self) -> str:
        """Slurm's word for the job."""
        shown = self.cluster.slurm("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T")
        return shown.strip()

    def told(self) -> str:
        """The events, and the end of the job's output."""
        lines = [json.dumps(event) for event in self.events()]
        for output in sorted((self.run_dir / "logs").glob("slurm-*.out")):
            lines += output.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(lines)

    # What runs where

    def host(self) -> str:
        """The node of the batch script."""
        shown = self.cluster.slurm("squeue", "-h", "-j", self.number, "-o", "%B")
        return shown.strip()

    def nodes(self) -> list[str]:
        """Nodes of the newest attempt, in the order of ranks."""
        return list(self.events("attempt")[-1]["nodes"])

    def process(self, rank: int) -> psutil.Process:
        """The process of a rank of the newest attempt."""
        node = self.nodes()[rank // RANKS_PER_NODE]
        network = self.cluster.run_in(node, "readlink", "/proc/self/ns/net").strip()
        found = []
        for process in psutil.process_iter():
            try:
                parent = process.parent()
                forked = parent is not None and _TEMPLATE in " ".join(parent.cmdline())
                if forked and os.readlink(f"/proc/{process.pid}/ns/net") == network:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        # Forked in the order of ranks.
        return sorted(found, key=lambda process: process.pid)[rank % RANKS_PER_NODE]

    # What came out

    def result(self) -> Result:
        """Losses, norms and parameters of the finished run."""
        return Result(self.run_dir)


class Result:
    """What a run came to."""

    def __init__(self, run_dir: Path) -> None:
        """Of a run folder."""
        text = (run_dir / "metrics.jsonl").read_text()
        self.metrics = [json.loads(line) for line in text.splitlines()]
        self.parameters = _tensors(run_dir / "checkpoints" / f"iter_{STEPS:07d}")

    def assert_equal(self, other: Result, but: int = 0) -> None:
        """Every step once, and the same losses, gradient norms and tensors, to the bit.

        Of the step `but`, which either run has not taken, losses and norm are not compared.
        """
        assert [e["iteration"] for e in self.metrics] == list(range(1, STEPS + 1))
        for name in ("lm_loss", "grad_norm", "load_balancing_loss", "consumed_tokens"):
            mine, theirs = (
                [e[name] for e in r.metrics if e["iteration"] != but] for r in (self, other)
            )
            assert mine == theirs, name
        assert self.parameters.keys() == other.parameters.keys()
        for name, tensor in self.parameters.items():
            assert torch.equal(tensor, other.parameters[name]), name


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    with StoredTensors(checkpoint) as stored:
        for name, tensor in stored.tensors.items():
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if found[name].numel():
                stored.read(name, 0, found[name].view(-1))
    return found
