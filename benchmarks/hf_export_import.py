"""How fast a checkpoint goes to Hugging Face and back, and how much memory that takes.

    python benchmarks/hf_export_import.py --json result.json
    python benchmarks/hf_export_import.py --parameters 10e9 --folder /scratch --json result.json

A checkpoint of random bfloat16 weights is exported, the exported folder is copied tensor by tensor
with the safetensors library (safe_open and save_file, the peer), and it is imported again. What
comes back is compared with what was made, number by number. Each phase is a process of its own, so
that its peak memory (ru_maxrss) is its own; folders are deleted as soon as the next phase can do
without. All sides flush their files to the disk. Export digests what it reads and import what it
writes, both check that every number is finite; the peer does neither.

The model is dots.llm1 with fewer layers from 5e9 parameters on, and below that one with
dots-llm-bench's widths and a larger vocabulary. `memory` is the larger peak above the imports over
the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import parser_of, record, tell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PUBLISHED_FROM = 5e9
"""Parameters from which on layers have dots.llm1's own sizes."""
VOCABULARY = 65536
"""Least rows of the embedding: as in a real model, it is the largest tensor."""
PART_BYTES = 1 << 26
"""Random numbers made at a time."""


def main() -> None:
    """Measure, print and, with `--json`, write the result; or run one phase."""
    args = parse()
    if args.phase is not None:
        # Told to the process that started this one.
        print(json.dumps(PHASES[args.phase](args)))
        return
    result = measure(args)
    tell(result, args.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--parameters", type=float, default=1e8, help="of the model, about")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--repetitions", type=int, default=1, help="rounds of all phases")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All phases in turn."""
    # Nothing large is imported here: a process starts with the memory of the one that made it.
    with tempfile.TemporaryDirectory(prefix="hf_", dir=args.folder) as folder:
        place = Path(folder)
        made = run(args, "make", place)
        rounds = []
        for _ in range(args.repetitions):
            found = {"export": run(args, "export", place)}
            shutil.rmtree(place / "ours")
            found["copy"] = run(args, "copy", place)
            shutil.rmtree(place / "copy")
            found["import"] = run(args, "import", place)
            shutil.rmtree(place / "theirs")
            rounds.append(found)
        if not run(args, "check", place)["same"]:
            raise SystemExit("what was imported is not what was exported")
    size, largest = made["bytes"] / 1e9, made["largest_tensor_bytes"]
    seconds = {
        phase: statistics.median(found[phase]["seconds"] for found in rounds) / size
        for phase in ("export", "import", "copy")
    }
    peaks = {
        phase: max(found[phase]["peak_bytes"] for found in rounds) for phase in ("export", "import")
    }
    ours = (seconds["export"] + seconds["import"]) / 2
    return {
        "ratio": round(seconds["copy"] / ours, 3),
        "ours": round(ours, 3),
        "peer": round(seconds["copy"], 3),
        "unit": "seconds per GB, export and import on average",
        "memory": round(max(peaks.values()) / largest, 3),
        "export": round(seconds["export"], 3),
        "import": round(seconds["import"], 3),
        "peak_bytes": peaks,
        "largest_tensor_bytes": largest,
        "parameters": made["parameters"],
        "gigabytes": round(size, 3),
        "tensors": made["tensors"],
        "data": "random weights",
        "routing": "none",
        "rounds": rounds,
        **record("torch", "megatron-core", "safetensors"),
    }


def run(args: argparse.Namespace, phase: str, place: Path) -> dict[str, Any]:
    """One phase in a process of its own."""
    words = ["--phase", phase, "--folder", str(place), "--parameters", str(args.parameters)]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"phase {phase} failed")
    return json.loads(done.stdout.splitlines()[-1])


def model_config(parameters: float) -> Any:
    """A decoder of about that many parameters."""
    from megatron_vlm.config.load import load_model
    from megatron_vlm.planning.shapes import model_parameters

    model = load_model("dots-llm1" if parameters >= PUBLISHED_FROM else "dots-llm-bench")

    vocab = max(model.language.vocab_size, VOCABULARY)

    def with_layers(count: int) -> Any:
        changes = {"num_layers": count, "vocab_size": vocab}
        language = model.language.model_copy(update=changes)
        return model.model_copy(update={"language": language})

    few, more = (model_parameters(with_layers(count)).total for count in (2, 3))
    return with_layers(max(2, 2 + round((parameters - few) / (more - few))))


def parts(model: Any) -> Any:
    """(name, shape, box, numbers) of every part of every tensor; always the same ones."""
    import numpy as np
    import torch

    from megatron_vlm.checkpoint.streamed import boxes
    from megatron_vlm.models.hf.tensors import EXPERT_BIAS, model_tensors

    for order, (name, shape) in enumerate(model_tensors(model).items()):
        for number, box in enumerate(boxes(shape, 2, PART_BYTES)):
            random = np.random.default_rng([order, number])
            bits = np.frombuffer(bytearray(random.bytes(2 * _size(box))), dtype=np.int16)
            # Without the highest bit of the exponent every pattern is a number below 2.
            bits &= np.int16(-0x4001)
            values = torch.from_numpy(bits).view(torch.bfloat16).view(box[1])
            yield name, shape, box, values.float() if name.endswith(EXPERT_BIAS) else values


def _size(box: Any) -> int:
    total = 1
    for size in box[1]:
        total *= size
    return total


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint."""
    import math

    from megatron_vlm.checkpoint.streamed import StreamedCheckpoint
    from megatron_vlm.models.hf.families import family_for
    from megatron_vlm.models.hf.names import translate

    model = model_config(args.parameters)
    total = 0
    with StreamedCheckpoint(args.folder / "ours", 0) as checkpoint:
        for name, shape, box, values in parts(model):
            checkpoint.write(name, shape, box, values.clone())
            total += values.nbytes
        state = {
            "model": model.model_dump(mode="json"),
            "progress": {"iteration": 0},
            "precision": "bf16",
            "data": {},
            "frozen": [],
        }
        checkpoint.commit(state, {})
    translation = translate(model, family_for(model).names)
    return {
        "bytes": total,
        "parameters": sum(math.prod(shape) for shape in translation.ours.values()),
        "tensors": len(translation.theirs),
        # As Hugging Face has them: ours hold all experts of a layer.
        "largest_tensor_bytes": 2 * max(map(math.prod, translation.theirs.values())),
    }


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, to Hugging Face."""
    from megatron_vlm.release.exporting import export_checkpoint

    return timed(lambda: export_checkpoint(args.folder / "ours", args.folder / "theirs"))


def import_(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, from Hugging Face."""
    from megatron_vlm.release.importing import import_folder

    return timed(lambda: import_folder(args.folder / "theirs", args.folder / "ours"))


def copy(args: argparse.Namespace) -> dict[str, Any]:
    """The peer: every shard through the safetensors library."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def every_shard() -> None:
        (args.folder / "copy").mkdir()
        for file in sorted((args.folder / "theirs").glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}
            save_file(tensors, args.folder / "copy" / file.name, metadata={"format": "pt"})
            with open(args.folder / "copy" / file.name, "rb") as stream:
                os.fsync(stream.fileno())

    return timed(every_shard)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Whether the checkpoint holds what was made."""
    import torch

    from megatron_vlm.checkpoint.folder import find_checkpoint
    from megatron_vlm.checkpoint.stored import StoredTensors

    place, last = 0, ""
    with StoredTensors(find_checkpoint(args.folder / "ours")) as stored:
        for name, _, _, values in parts(model_config(args.parameters)):
            place, last = (place if name == last else 0), name
            found = torch.empty(values.numel(), dtype=values.dtype)
            stored.read(name, place, found)
            place += values.numel()
            if not torch.equal(found, values.view(-1)):
                return {"same": False}
    return {"same": True}


def timed(work: Any) -> dict[str, Any]:
    """Seconds, and the peak of memory above what there was before."""
    before = _peak()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "peak_bytes": _peak() - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PHASES = {"make": make, "export": export, "copy": copy, "import": import_, "check": check}
"""What one process does, by name."""


if __name__ == "__main__":
    main()
