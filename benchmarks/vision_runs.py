"""Steps of real processes on this machine, for `vision_balance.py`."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXECUTED = ("parallel.pipeline_model_parallel_size=4", "vision_parallel.exchange_window=2")
"""Layout of the step of 8 processes that is compared with its plan."""
TIMED = ("parallel.pipeline_model_parallel_size=2", "model.language.num_layers=4")
"""Layout of the 4 processes whose wall clock is told."""
WIDE = {
    "model.vision.hidden_size": 512,
    "model.vision.ffn_hidden_size": 1408,
    "model.vision.num_attention_heads": 8,
    "model.vision.num_layers": 4,
    "model.language.hidden_size": 512,
    "model.language.ffn_hidden_size": 1408,
    "model.language.num_attention_heads": 8,
    "model.language.moe_ffn_hidden_size": 704,
    "model.language.moe_shared_expert_intermediate_size": 1408,
}
"""The demo's model, wide enough for matrix products to be what a step takes."""
MOST_PADDING = 0.1
"""Of attention's FLOPs: pictures of nearly one size are padded to go together."""
LAST_STEPS = 3
"""Of a run, which the medians are over; the ones before warm up."""


def real_runs(small: bool) -> dict[str, Any]:
    """What ran as planned, wall clocks, and the use of one process with pictures and without.

    Args:
        small: few steps of the tests' sizes, to see that it works.
    """
    with tempfile.TemporaryDirectory(prefix="vision_runs_") as name:
        folder = Path(name)
        for kind in ("pictures", "text"):
            _build(folder, kind, 48 if small else 200)
        return {
            "executed_on_8": _executed(folder),
            "wall_clock_on_4": _wall_clock(folder, 1 if small else 3),
            "mfu_of_one_process": _use_of_one(folder, 1 if small else 3, {} if small else WIDE),
            "data": "crops of photographs of installed packages, random letters",
        }


def _build(folder: Path, kind: str, count: int) -> None:
    """A set of so many samples: a photograph's crop and a line, or lines alone."""
    from data_images import photographs
    from PIL import Image

    from megatron_vlm.data.build import build_dataset

    rng = np.random.default_rng(0)
    images = [Image.open(path).convert("RGB") for path in photographs([])]
    source = folder / f"{kind}_source"
    source.mkdir()
    entries = []
    for number in range(count):
        letters = "".join(
            chr(97 + int(c)) for c in rng.integers(0, 26, 90 if kind == "pictures" else 300)
        )
        entry: dict[str, Any] = {"id": str(number)}
        if kind == "pictures":
            image = images[number % len(images)]
            width, height = (int(side * rng.uniform(0.3, 1)) for side in image.size)
            image.crop((0, 0, width, height)).save(source / f"{number}.png")
            entry["images"] = [f"{number}.png"]
        question = "<image>?" if kind == "pictures" else "?"
        entry["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": letters},
        ]
        entries.append(entry)
    file = source / "samples.json"
    file.write_text(json.dumps(entries))
    build_dataset(file, folder / kind, workers=1)


def _config(folder: Path, run: str, kind: str, *overrides: str) -> Any:
    from megatron_vlm.config import load_recipe

    return load_recipe(
        str(ROOT / "tests" / "nano.yaml"),
        [
            "model=dots-vlm-demo",
            "training.precision=fp32",
            f"data.train={folder / kind}",
            f"run_dir={folder / run}",
            *overrides,
        ],
    )


def _executed(folder: Path) -> dict[str, Any]:
    """A step of 8 processes: every rank's FLOPs as planned, its work in the replay's order.

    Raises:
        SystemExit: they are not.
    """
    from megatron_vlm.models.vision.flops import flops_terms
    from megatron_vlm.planning.recorded import read_timeline, timeline_path
    from megatron_vlm.planning.replay import replay
    from megatron_vlm.topology.layout import resolve_layout
    from tests.ranks import run_ranks

    cost = folder / "cost.json"
    # Messages cost nothing here, so that pictures of a few hundred patches are shared.
    cost.write_text('{"per_picture": 0, "per_patch": 1, "per_pair": 0.01, "per_shared_patch": 0}')
    config = _config(
        folder, "executed", "pictures", *EXECUTED, "training.train_iters=2",
        "training.timeline_interval=1", "training.seq_length=512", "training.global_batch_size=8",
        "model.language.num_layers=4", f"vision_parallel.cost={cost}",
    )  # fmt: skip
    ranks = run_ranks(8, _steps, config, True)
    layout = resolve_layout(config, 8)
    model, unit = config.model, config.model.vision.spatial_merge_size**2
    per_patch, per_pair = flops_terms(model.vision, model.adapter, model.language.hidden_size)
    linear, padded, shared = 0.0, 0.0, 0
    for number, columns in enumerate(ranks[0]["plans"]):
        plan = {name: np.array(column) for name, column in columns.items()}
        patches, pairs = np.zeros((2, 8))
        np.add.at(patches, plan["rank"], plan["own"])
        np.add.at(pairs, plan["rank"], plan["own"] * plan["patches"][plan["picture"]])
        # Who has no picture encodes a blank one.
        pairs[patches == 0], patches[patches == 0] = unit**2, unit
        found = np.array([rank["flops"][number] for rank in ranks])
        linear = max(linear, float(np.abs(found[:, 0] / (patches * per_patch) - 1).max()))
        of_attention = found[:, 1] / (pairs * per_pair)
        if (of_attention < 1 - 1e-9).any():
            raise SystemExit(f"attention's FLOPs are {of_attention} of those planned, by rank")
        padded = max(padded, float(of_attention.max() - 1))
        shared += int((np.bincount(plan["picture"]) > 1).sum())
    if linear > 1e-9 or padded > MOST_PADDING:
        raise SystemExit(
            f"FLOPs differ from the plan: {linear:.1e} of products, {padded:.1e} of attention"
        )
    work = _unit_work(layout, window_size=2)
    orders = [_order(replay(layout, work).events(), rank) for rank in range(8)]
    for number in range(1, 3):
        events, _ = read_timeline(timeline_path(Path(config.run_dir), number))
        for rank, expected in enumerate(orders):
            found = _order(events, rank)
            if found != expected:
                raise SystemExit(f"step {number}, rank {rank}: ran {found}, replayed {expected}")
    return {
        "layout": layout.describe(),
        "steps": 2,
        "products_off_by": linear,
        "attention_padded_by": padded,
        "order": "as replayed, on every rank",
        "shared_pictures": shared,
    }


def _unit_work(layout: Any, window_size: int) -> Any:
    from megatron_vlm.planning.step_work import StepWork

    passes = np.ones((layout.dp, layout.num_micro_batches, len(layout.stages)))
    windows = np.ones((-(-layout.num_micro_batches // window_size), layout.world_size))
    nothing = np.zeros(layout.world_size)
    return StepWork(
        forward_seconds=passes,
        backward_seconds=passes,
        send_seconds=np.zeros(len(layout.stages) - 1),
        reduce_seconds=nothing,
        optimizer_seconds=nothing,
        encode_seconds=windows,
        encode_backward_seconds=windows,
        exchange_seconds=0 * windows,
        exchange_back_seconds=0 * windows,
        window_size=window_size,
    )


def _order(events: list[Any], rank: int) -> dict[str, list[tuple]]:
    """What a rank began after what: its work, and beside it the windows of features and back."""
    # A stable order: events that take no time stay as they were told.
    mine = sorted((e for e in events if e.rank == rank), key=lambda e: e.start)
    own = ("encode", "forward", "backward", "encode_backward", "optimizer")
    # What interrupts a pass cuts it in two; the engine does not tell an encoding's windows.
    work = dict.fromkeys((e.kind, e.micro_batch, e.chunk) for e in mine if e.kind in own)
    out, back = (
        dict.fromkeys((e.kind, e.window) for e in mine if e.kind == kind)
        for kind in ("exchange", "exchange_back")
    )
    return {"work": list(work), "out": sorted(out), "back": sorted(back)}


def _steps(world: Any, config: Any, count_flops: bool = False) -> dict[str, Any]:
    """One rank's run: metrics, and on request FLOPs of its encoding and the plans."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from megatron_vlm.platform import start_distributed, stop
    from megatron_vlm.topology.layout import resolve_layout
    from megatron_vlm.topology.mesh import build_topology, destroy_topology
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data
    from megatron_vlm.training.loop import Run

    data = open_training_data(config)
    topology = build_topology(resolve_layout(config, world.world_size), start_distributed(world))
    run = Run(config, topology, data, open_held_out_data(config, data))
    metrics: list[dict[str, Any]] = []
    flops: list[list[int]] = []
    plans: list[dict[str, list[int]]] = []
    encode = run.step._encode

    # Not among those that the counter knows.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(queries, keys, values))

    def counted(loaded: Any, encoder: Any, grad: bool) -> Any:
        plan = loaded.plan
        shares = plan.shares
        plans.append(
            {
                "patches": plan.pictures.patches.tolist(),
                "picture": shares.picture.tolist(),
                "rank": shares.rank.tolist(),
                "own": shares.patches.tolist(),
            }
        )
        with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
            encoded = encode(loaded, encoder, grad)
        counts = counter.get_flop_counts()["Global"]
        flops.append([counter.get_total_flops() - counts.get(fused, 0), counts.get(fused, 0)])
        return encoded

    if count_flops:
        run.step._encode = counted  # type: ignore[method-assign]
    run.run(on_step=lambda entry: metrics.append(dict(entry)))
    destroy_topology()
    stop()
    return {"metrics": metrics, "flops": flops, "plans": plans}


def _wall_clock(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds of a step of 4 processes in both placements, which alternate."""
    from tests.ranks import run_ranks

    seconds: dict[str, list[float]] = {"all_ranks": [], "first_stage": []}
    for turn in range(repetitions):
        for placement in sorted(seconds, reverse=turn % 2 == 1):
            config = _config(
                folder, f"{placement}_{turn}", "pictures", *TIMED, "training.seq_length=1024",
                "training.global_batch_size=8", f"training.train_iters={LAST_STEPS + 2}",
                f"vision_parallel.placement={placement}", "checkpoint.save_interval=100",
            )  # fmt: skip
            metrics = run_ranks(4, _steps, config)[0]["metrics"]
            seconds[placement].append(_median(metrics, "step_time_s"))
    pairs = zip(seconds["first_stage"], seconds["all_ranks"], strict=True)
    return {
        "ratio": statistics.median(first / ours for first, ours in pairs),
        "ours": statistics.median(seconds["all_ranks"]),
        "peer": statistics.median(seconds["first_stage"]),
        "unit": "seconds of a step; four processes share the cores, so that waiting costs nothing",
    }


def _use_of_one(folder: Path, repetitions: int, widths: dict[str, int]) -> dict[str, Any]:
    """FLOPs a second of one process with pictures, over the same without any, in turn."""
    from tests.ranks import run_ranks

    rates: dict[str, list[float]] = {"pictures": [], "text": []}
    share, pixels = 0.0, 0.0
    for turn in range(repetitions):
        for kind in sorted(rates, reverse=turn % 2 == 1):
            wide = [f"{name}={size}" for name, size in widths.items()]
            config = _config(
                folder, f"{kind}_{turn}", kind, *wide, "training.seq_length=1024",
                "training.global_batch_size=4",
                f"training.train_iters={LAST_STEPS + 2}",
            )  # fmt: skip
            (only,) = run_ranks(1, _steps, config)
            rates[kind].append(_median(only["metrics"], "tflops_per_device"))
            if kind == "pictures":
                last = only["metrics"][-LAST_STEPS:]
                vision = config.model.vision
                patches = statistics.mean(entry["image_patches"] for entry in last)
                share = patches / vision.spatial_merge_size**2 / (4 * 1024)
                pixels = patches * vision.patch_size**2 / statistics.mean(e["images"] for e in last)
    pairs = zip(rates["pictures"], rates["text"], strict=True)
    return {
        "ratio": statistics.median(with_them / without for with_them, without in pairs),
        "tflops_with_pictures": statistics.median(rates["pictures"]),
        "tflops_text_only": statistics.median(rates["text"]),
        "visual_share_of_tokens": share,
        "mean_pixels": round(pixels),
    }


def _median(metrics: list[dict[str, Any]], key: str) -> float:
    return statistics.median(entry[key] for entry in metrics[-LAST_STEPS:])
