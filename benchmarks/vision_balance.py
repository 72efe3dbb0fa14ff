"""A step's vision work over every rank, against the encoder on the first pipeline stage.

    python benchmarks/vision_balance.py --json result.json

Planned and replayed, since processes on a few cores cannot show it. Pictures have the sizes of real
photographs (JPEG files of installed packages and of `--photographs`) and of pages of paper at 72 to
300 dots an inch, up to the 11.3 megapixels that the encoder takes. They fill `VISUAL` of the tokens
of rows of 32,768.

Balance: the dearest rank over the lower bound (the larger of the mean load and the dearest part
that cannot be cut), for ours, for whole pictures dearest first, and in turn; and the time that the
plan takes.

Replay: seconds of a layer of the encoder and of the decoder, at the published widths, are measured
in this run in float32 on all cores of this machine, as the difference of three layers and one; a
step of all layers is replayed with them. Stages share the decoder evenly. `ratio` is the step of
the classic placement (each replica's pictures on its embedding stage, whole, dearest first over its
ranks) over ours. Messages cost nothing on either side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import parser_of, record, tell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANKS = {8: (4, 2), 64: (8, 8), 1024: (8, 128)}
"""Ranks: pipeline stages and replicas."""
ROW, MICRO_BATCHES = 32_768, 16
VISUAL = 0.6
PAGES = 0.3
"""Share of pages among the pictures."""
PICTURES_A_RANK = 16
MEASURED_TOKENS, MEASURED_PATCHES = 512, 1024
ROUNDS = 3


def main() -> None:
    """Plan, measure, replay, print and, with `--json`, write the result."""
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    result = measure(args)
    tell(result, args.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="dots-vlm-142b", help="a shipped model with vision")
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result tells."""
    from megatron_vlm.config.load import load_values

    values = {
        "model": args.model,
        "training": {
            "train_iters": 1,
            "seq_length": MEASURED_TOKENS,
            "global_batch_size": 1,
            "precision": "fp32",
        },
        "data": {"train": "none"},
    }
    config = load_values(values, "benchmark")
    sizes = picture_sizes(args.photographs)
    costs = measured_costs(config, args.threads)
    steps = {ranks: replayed(config, costs, sizes, ranks) for ranks in RANKS}
    return {
        "ratio": steps[1024]["ratio"],
        "ours": steps[1024]["ours"],
        "peer": steps[1024]["peer"],
        "unit": "seconds of a replayed step on 1,024 ranks",
        "replayed": steps,
        "balance": {ranks: balanced(config, sizes, ranks) for ranks in (8, 256, 1024)},
        "measured": costs,
        "data": f"sizes of {len(sizes['photographs'])} photographs and of pages; synthetic pixels",
        "routing": "natural",
        "model": config.model.name,
        "visual_share": VISUAL,
        **record("torch", "megatron-core", "numpy"),
    }


def picture_sizes(folders: list[Path]) -> dict[str, np.ndarray]:
    """`photographs` and `pages`: [n, 2] heights and widths in pixels."""
    from data_images import photographs
    from PIL import Image

    found = []
    for path in photographs(folders):
        with Image.open(path) as picture:
            found.append((picture.height, picture.width))
    # A4 and letter, upright, and slides, at each resolution.
    inches = [(11.69, 8.27), (11.0, 8.5), (7.5, 13.33)]
    pages = [
        (round(high * dots), round(wide * dots))
        for high, wide in inches
        for dots in (72, 100, 150, 200, 300)
    ]
    return {"photographs": np.array(found), "pages": np.array(pages)}


def drawn(config: Any, sizes: dict[str, np.ndarray], count: int, seed: int) -> np.ndarray:
    """[count, 2] patch grids of so many pictures."""
    from megatron_vlm.data.geometry import target_sizes

    rng = np.random.default_rng(seed)
    vision = config.model.vision
    pages = rng.random(count) < PAGES
    heights, widths = np.where(
        pages[:, None],
        sizes["pages"][rng.integers(len(sizes["pages"]), size=count)],
        sizes["photographs"][rng.integers(len(sizes["photographs"]), size=count)],
    ).T
    high, wide = target_sizes(heights, widths, vision)
    return np.stack([high, wide], axis=1) // vision.patch_size


def balanced(config: Any, sizes: dict[str, np.ndarray], ranks: int) -> dict[str, Any]:
    """Dearest rank over the lower bound, by method, and seconds that ours takes to plan."""
    from megatron_vlm.data.picture_table import PicturePlan, PictureTable
    from megatron_vlm.data.sharing import Sharing
    from megatron_vlm.training.encoder_cost import flops_cost

    pp, replicas = {8: (4, 2), 256: (8, 32), 1024: (8, 128)}[ranks]
    grids = drawn(config, sizes, PICTURES_A_RANK * ranks, ranks)
    owners = np.arange(len(grids)) % replicas
    table = PictureTable.of(
        [
            PicturePlan(0, 0, 0, 0, high, wide, replica, 0, 0, high * wide // 4)
            for (high, wide), replica in zip(grids.tolist(), owners.tolist(), strict=True)
        ]
    )
    cost = flops_cost(config)
    homes = tuple(np.tile(np.arange(replicas), pp).tolist())
    ways = {
        "ours": Sharing(homes, cost, max_parts=8),
        "whole_pictures": Sharing(homes, cost, max_parts=1),
        "in_turn": Sharing(homes, cost, method="round_robin"),
    }
    # Parts can be as small as a merge block: only the mean bounds what can be cut.
    mean = float(cost.whole(table.patches).sum()) / ranks
    found: dict[str, Any] = {
        name: float(way.loads(table, way.shares(table)).max()) / mean for name, way in ways.items()
    }
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        ways["ours"].shares(table)
        seconds.append(time.perf_counter() - began)
    return found | {"plan_seconds": statistics.median(seconds), "pictures": len(grids)}


def measured_costs(config: Any, threads: int) -> dict[str, float]:
    """Seconds of a layer: of the decoder by token, of the encoder by patch and pair of patches."""
    import torch

    from megatron_vlm.platform import detect_world, start_distributed, stop
    from megatron_vlm.topology.layout import resolve_layout
    from megatron_vlm.topology.mesh import build_topology

    torch.set_num_threads(threads)
    topology = build_topology(
        resolve_layout(shallow(config, 1), 1), start_distributed(detect_world())
    )
    one, three = (towers(shallow(config, layers), topology) for layers in (1, 3))
    stop()
    return {name: (three[name] - one[name]) / 2 for name in one}


def shallow(config: Any, layers: int) -> Any:
    """The configuration with so few layers, all of experts, of which no more than are asked for."""
    model = config.model
    language = model.language.model_copy(
        update={
            "num_layers": layers,
            "first_k_dense_replace": 0,
            "num_moe_experts": model.language.moe_router_topk + 2,
            "vocab_size": 1024,
            "mtp_num_layers": None,
        }
    )
    vision = model.vision.model_copy(update={"num_layers": layers})
    shape = model.model_copy(update={"language": language, "vision": vision})
    return config.model_copy(update={"model": shape})


def towers(config: Any, topology: Any) -> dict[str, float]:
    """Seconds of each tower, as `measured_costs` names them."""
    import torch

    from megatron_vlm.engine.objective import build_objective
    from megatron_vlm.engine.step import TrainStep
    from megatron_vlm.engine.trainable import make_trainable
    from megatron_vlm.models.vlm import build_model
    from tests.dots1_map import text_step

    model = build_model(config, topology)
    trainable = make_trainable(model, config)
    objective = build_objective("next_token", topology, config.model)
    step = TrainStep(config, topology, model, objective, chunks=list(trainable.chunks))
    length = config.training.seq_length
    row = torch.randint(0, 1024, (length,)).tolist()
    data = text_step([[row]], length, 1)
    step.encoder = None
    forward, backward = [], []
    for _ in range(ROUNDS + 1):
        step.train(data)
        forward.append(step.clock.seconds("forward"))
        backward.append(step.clock.seconds("backward"))
    many, large = [(16, 16)] * 8, [(32, 64)]
    own = {}
    for name, trains in (("encode", False), ("encode_both", True)):
        model.encoder.requires_grad_(trains)
        little, much = (timed(model.encoder, grids) for grids in (many, large))
        pair = (much - little) / (2048**2 - 8 * 256**2)
        own |= {f"{name}_pair": pair, f"{name}_patch": little / 2048 - 256 * pair}
    return {
        "forward_token": statistics.median(forward[1:]) / length,
        "backward_token": statistics.median(backward[1:]) / length,
        **own,
    }


def timed(encoder: Any, grids: list[tuple[int, int]]) -> float:
    """Median seconds of a pass; a backward one too where anything is trained."""
    import torch

    sides = torch.tensor(grids)
    vision = encoder.trunk.config
    width = vision.in_channels * vision.patch_size**2
    pixels = torch.zeros(int(sides.prod(dim=1).sum()), width)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    found = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        with torch.set_grad_enabled(bool(trained)):
            out = encoder(pixels, sides)
            if trained:
                torch.autograd.grad(out.sum(), trained, allow_unused=True)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def replayed(
    config: Any, costs: dict[str, float], sizes: dict[str, np.ndarray], ranks: int
) -> dict[str, Any]:
    """Seconds of a step in both placements, and how well the machines are used."""
    from megatron_vlm.data.balance import EncoderCost
    from megatron_vlm.data.picture_table import PicturePlan, PictureTable
    from megatron_vlm.data.sharing import Sharing
    from megatron_vlm.planning.replay import replay
    from megatron_vlm.planning.step_work import StepWork
    from megatron_vlm.topology.layout import Layout

    pp, dp = RANKS[ranks]
    layout = Layout(
        world_size=ranks, tp=1, cp=1, dp=dp, pp=pp, vpp=None, ep=1, etp=1, sequence_parallel=False,
        batch_p2p_comm=True, stages=("Et", *["t"] * (pp - 2), "tL"),
        num_micro_batches=MICRO_BATCHES,
    )  # fmt: skip
    pictures = []
    grids = iter(drawn(config, sizes, 200 * dp * MICRO_BATCHES, ranks).tolist())
    for replica in range(dp):
        for number in range(MICRO_BATCHES):
            start = 0
            while start < VISUAL * ROW:
                high, wide = next(grids)
                if start + high * wide // 4 > ROW:
                    continue
                pictures.append(
                    PicturePlan(0, 0, 0, 0, high, wide, replica, number, start, high * wide // 4)
                )
                start += high * wide // 4
    table = PictureTable.of(pictures)
    layers = config.model.vision.num_layers
    both = EncoderCost(0.0, layers * costs["encode_both_patch"], layers * costs["encode_both_pair"])
    ahead = EncoderCost(0.0, layers * costs["encode_patch"], layers * costs["encode_pair"])
    stage = config.model.language.num_layers / pp * ROW
    passes = np.ones((dp, MICRO_BATCHES, pp))
    common = {
        "forward_seconds": stage * costs["forward_token"] * passes,
        "backward_seconds": stage * costs["backward_token"] * passes,
        "send_seconds": np.zeros(pp - 1),
        "reduce_seconds": np.zeros(ranks),
        "optimizer_seconds": np.zeros(ranks),
    }
    homes = tuple(layout.coordinates(rank).dp for rank in range(ranks))
    first = tuple(layout.coordinates(rank).pp == 0 for rank in range(ranks))
    ours = Sharing(homes, both, max_parts=8)
    classic = Sharing(homes, both, groups=dp, encodes=first)
    seconds = {}
    for name, sharing, size in (("ours", ours, MICRO_BATCHES), ("peer", classic, 1)):
        shares = sharing.shares(table)
        window = table.micro_batch[shares.picture] // size
        whole = table.patches[shares.picture]
        spent = {}
        for kind, cost in (("encode", ahead), ("both", both)):
            spent[kind] = np.zeros((MICRO_BATCHES // size, ranks))
            np.add.at(spent[kind], (window, shares.rank), cost.part(shares.patches, whole))
        work = StepWork(
            **common,
            encode_seconds=spent["encode"],
            encode_backward_seconds=spent["both"] - spent["encode"],
            placement="all_ranks" if name == "ours" else "first_stage",
            window_size=size,
        )
        seconds[name] = replay(layout, work).step_seconds
    text = replay(layout, StepWork(**common)).step_seconds
    decoder = float(common["forward_seconds"].sum() + common["backward_seconds"].sum())
    encoder = float(both.whole(table.patches).sum())
    used = (decoder + encoder) / seconds["ours"]
    return {
        "ratio": seconds["peer"] / seconds["ours"],
        **seconds,
        "text_only": text,
        "use_of_text_only": used / (decoder / text),
        "encoder_share": encoder / (encoder + decoder),
        "pictures": len(table),
        "layout": layout.describe(),
    }


if __name__ == "__main__":
    main()
