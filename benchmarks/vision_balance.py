"""A step's vision work over every rank, against the encoder on the first pipeline stage.

    python benchmarks/vision_balance.py --json result.json

Balance, planned: the dearest rank over the mean of all (no bound is lower), for ours, for whole
pictures dearest first, and in turn; and the time that the plan takes.

Replay, from costs that are measured in this run: seconds of a layer of either tower at the
published widths, in float32 on all cores of this machine; a step of all layers is replayed with
them. Stages share the decoder evenly. `ratio` is the step of the classic placement (each replica's
pictures on its embedding stage, whole, dearest first over its ranks) over ours; messages cost
nothing on either side. `mfu_of_text_only` counts the FLOPs of both towers.

Real processes (`vision_runs.py`): a step of 8 against its plan and its replay, the wall clock of
both placements on 4, and the use of one process with pictures and without.

Sizes are those of `PHOTOGRAPHS` or of JPEG files in `--photographs`, and of `PAGES`, resized as in
training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from record import parser_of, record, tell

if TYPE_CHECKING:
    from vision_costs import LayerCosts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RANKS = {8: (4, 2), 64: (8, 8), 256: (8, 32), 1024: (8, 128)}
"""Ranks: pipeline stages and replicas."""
BALANCED, REPLAYED = (8, 256, 1024), (8, 64, 1024)
ROW, MICRO_BATCHES = 32_768, 16
VISUAL = 0.6
"""Share of pictures' tokens in a row, at least."""
PAGE_SHARE = 0.3
"""Of the pictures, where photographs and pages are mixed. Our choice."""
MIXTURES = {
    # name: share of pages, longest side of photographs, pictures a rank
    "photographs": (0.0, 6000, 16),
    "pages": (1.0, 6000, 16),
    "mixed": (PAGE_SHARE, 6000, 16),
    # Here a page costs more than twice what a rank has on average.
    "small_photographs_and_few_pages": (0.003, 1024, 30),
}
PHOTOGRAPHS = {
    # The web's: 640 on the longer side, as COCO's.
    (480, 640): 20, (427, 640): 15, (640, 480): 10, (640, 427): 5,
    # 1024 on the longer side, as photo sites show them.
    (683, 1024): 10, (768, 1024): 8, (1024, 768): 5, (1024, 683): 2,
    # Full HD and 3 megapixels.
    (1080, 1920): 8, (1536, 2048): 5,
    # Telephones' 12 megapixels, cameras' 24.
    (3024, 4032): 4, (4032, 3024): 4, (4000, 6000): 4,
}  # fmt: skip
"""Height and width in pixels: how many of a hundred. Formats in common use, shares our choice."""
PAGES = tuple(
    (round(high * dots), round(wide * dots))
    # A4 and letter, upright, and slides.
    for high, wide in ((11.69, 8.27), (11.0, 8.5), (7.5, 13.33))
    for dots in (72, 100, 150, 200, 300)
)
"""Pages at dots an inch, up to more than the encoder's 11.3 megapixels."""
MEASURED = {"full": (512, 64, 3), "small": (64, 8, 1)}
"""Tokens, patches a side, and rounds, of `measured_costs`."""


def main() -> None:
    """Plan, measure, replay, run, print and, with `--json`, write the result."""
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
    parser.add_argument("--size", choices=MEASURED, default="full", help="of what is measured")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result tells."""
    # Forked before torch has threads.
    from vision_runs import real_runs

    runs = real_runs(args.size == "small")

    import torch
    from vision_costs import measured_costs

    from megatron_vlm.config.load import load_values

    torch.set_num_threads(args.threads)
    tokens, side, rounds = MEASURED[args.size]
    values = {
        "model": args.model,
        "training": {
            "train_iters": 1,
            "seq_length": tokens,
            "global_batch_size": 1,
            "precision": "fp32",
        },
        "data": {"train": "none"},
    }
    config = load_values(values, "benchmark")
    costs = measured_costs(config, tokens, side, rounds)
    equal = flop_costs(config, tokens)
    photographs = photograph_sizes(args.photographs)
    steps = {ranks: replayed(config, costs, tokens, photographs, ranks) for ranks in REPLAYED}
    at_equal_rates = {
        ranks: replayed(config, equal, tokens, photographs, ranks) for ranks in REPLAYED
    }
    return {
        "ratio": steps[1024]["ratio"],
        "ours": steps[1024]["ours"],
        "peer": steps[1024]["peer"],
        "unit": "seconds of a replayed step on 1,024 ranks",
        "balance": {
            name: {ranks: balanced(config, photographs, ranks, *mixture) for ranks in BALANCED}
            for name, mixture in MIXTURES.items()
        },
        "measured": {"seconds_of_a_layer": asdict(costs), "tokens": tokens, "patches": side**2},
        "replayed": steps,
        "mfu_of_text_only": {
            "every_flop_as_dear": {r: s["mfu_of_text_only"] for r, s in at_equal_rates.items()},
            "as_measured": {r: s["mfu_of_text_only"] for r, s in steps.items()},
        },
        "real_processes": runs,
        "data": "planned: sizes alone; real processes: " + runs["data"],
        "routing": "natural",
        "model": config.model.name,
        "visual_share": VISUAL,
        **record("torch", "megatron-core", "numpy"),
    }


def photograph_sizes(folders: list[Path]) -> np.ndarray:
    """[n, 2] heights and widths in pixels, each as often as it is to be drawn."""
    if not folders:
        return np.repeat(np.array(list(PHOTOGRAPHS)), list(PHOTOGRAPHS.values()), axis=0)
    from data_images import jpeg_files
    from PIL import Image

    found = []
    for path in jpeg_files(folders):
        with Image.open(path) as picture:
            found.append((picture.height, picture.width))
    return np.array(found)


def drawn(
    config: Any, photographs: np.ndarray, page_share: float, count: int, seed: int
) -> np.ndarray:
    """[count, 2] patch grids of so many pictures."""
    from megatron_vlm.data.geometry import target_sizes

    rng = np.random.default_rng(seed)
    vision, pages = config.model.vision, np.array(PAGES)
    heights, widths = np.where(
        rng.random((count, 1)) < page_share,
        pages[rng.integers(len(pages), size=count)],
        photographs[rng.integers(len(photographs), size=count)],
    ).T
    high, wide = target_sizes(heights, widths, vision)
    return np.stack([high, wide], axis=1) // vision.patch_size


def balanced(
    config: Any,
    photographs: np.ndarray,
    ranks: int,
    page_share: float,
    longest: int,
    pictures_a_rank: int,
) -> dict[str, Any]:
    """Dearest rank over the mean, by method, and seconds that ours takes to plan."""
    from megatron_vlm.data.picture_table import PicturePlan, PictureTable
    from megatron_vlm.data.sharing import Sharing
    from megatron_vlm.training.encoder_cost import flops_cost

    pp, replicas = RANKS[ranks]
    small = photographs[photographs.max(axis=1) <= longest]
    grids = drawn(config, small, page_share, pictures_a_rank * ranks, ranks)
    owners = np.arange(len(grids)) % replicas
    table = PictureTable.of(
        [
            PicturePlan(0, 0, 0, 0, high, wide, replica, 0, 0, high * wide // 4)
            for (high, wide), replica in zip(grids.tolist(), owners.tolist(), strict=True)
        ]
    )
    # In half precision, as such runs are: messages count.
    training = config.training.model_copy(update={"precision": "bf16"})
    cost = flops_cost(config.model_copy(update={"training": training}))
    homes = tuple(np.tile(np.arange(replicas), pp).tolist())
    ways = {
        "ours": Sharing(homes, cost, max_parts=8),
        "differencing": Sharing(homes, cost, method="karmarkar_karp", max_parts=8),
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
    dearest = float(cost.whole(table.patches).max()) / mean
    told = {"dearest_picture": dearest, "pictures": len(grids)}
    return found | {"plan_seconds": statistics.median(seconds)} | told


def replayed(
    config: Any, costs: LayerCosts, measured_tokens: int, photographs: np.ndarray, ranks: int
) -> dict[str, Any]:
    """Seconds of a step in both placements, and how well the machines are used."""
    from megatron_vlm.data.balance import EncoderCost
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
    table = filled_rows(config, photographs, dp)
    vision, language = config.model.vision, config.model.language
    both = EncoderCost(
        0.0, vision.num_layers * costs.both_patch, vision.num_layers * costs.both_pair
    )
    ahead = EncoderCost(
        0.0, vision.num_layers * costs.encode_patch, vision.num_layers * costs.encode_pair
    )
    tokens = language.num_layers / pp * ROW
    passes = np.ones((dp, MICRO_BATCHES, pp))
    common: dict[str, Any] = {
        "forward_seconds": tokens * costs.forward_token * passes,
        "backward_seconds": tokens * costs.backward_token * passes,
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
            # Measured apart: a noisy machine must not make work of less than nothing.
            encode_backward_seconds=np.maximum(spent["both"] - spent["encode"], 0),
            placement="all_ranks" if name == "ours" else "first_stage",
            window_size=size,
        )
        seconds[name] = replay(layout, work).step_seconds
    text = replay(layout, StepWork(**common)).step_seconds
    decoder = float(common["forward_seconds"].sum() + common["backward_seconds"].sum())
    encoder = float(both.whole(table.patches).sum())
    flops = step_flops(config, table, measured_tokens, dp)
    with_pictures = (flops["decoder"] + flops["encoder"]) / seconds["ours"]
    pixels = (table.patches * vision.patch_size**2).astype(float)
    return {
        "ratio": seconds["peer"] / seconds["ours"],
        **seconds,
        "text_only": text,
        "mfu_of_text_only": with_pictures / (flops["decoder"] / text),
        "busy_of_text_only": (decoder + encoder) / seconds["ours"] / (decoder / text),
        "encoder_share_of_seconds": encoder / (encoder + decoder),
        "encoder_share_of_flops": flops["encoder"] / (flops["encoder"] + flops["decoder"]),
        "visual_share_of_tokens": float(table.tokens.sum()) / (dp * MICRO_BATCHES * ROW),
        "megapixels": {
            "mean": float(pixels.mean()) / 1e6,
            "largest": float(pixels.max()) / 1e6,
        },
        "pictures": len(table),
        "layout": layout.describe(),
    }


def filled_rows(config: Any, photographs: np.ndarray, dp: int) -> Any:
    """The pictures of a step: each row has `VISUAL` of its tokens from them, or a little more."""
    from megatron_vlm.data.picture_table import PicturePlan, PictureTable

    rows = dp * MICRO_BATCHES
    grids = iter(drawn(config, photographs, PAGE_SHARE, 200 * rows, dp).tolist())
    pictures = []
    for row in range(rows):
        replica, number = divmod(row, MICRO_BATCHES)
        start = 0
        while start < VISUAL * ROW:
            high, wide = next(grids)
            tokens = high * wide // config.model.vision.spatial_merge_size**2
            if start + tokens <= ROW:
                pictures.append(PicturePlan(0, 0, 0, 0, high, wide, replica, number, start, tokens))
                start += tokens
    return PictureTable.of(pictures)


def step_flops(config: Any, table: Any, measured_tokens: int, dp: int) -> dict[str, float]:
    """FLOPs of all layers of either tower, forward and backward, as the seconds are of them."""
    layer, patches = flop_costs(config, measured_tokens), table.patches.astype(float)
    token = layer.forward_token + layer.backward_token
    pictures = patches * (layer.both_patch + layer.both_pair * patches)
    return {
        "decoder": config.model.language.num_layers * token * dp * MICRO_BATCHES * ROW,
        "encoder": config.model.vision.num_layers * float(pictures.sum()),
    }


def flop_costs(config: Any, measured_tokens: int) -> LayerCosts:
    """As if every FLOP took a second; samples are as long as those that were measured."""
    from vision_costs import LayerCosts, of_depth

    from megatron_vlm.models.language.flops import attention_flops, linear_flops_per_token
    from megatron_vlm.models.vision.flops import flops_terms

    found = []
    for layers in (1, 2):
        model = of_depth(config, layers).model
        token = linear_flops_per_token(model.language)
        token += attention_flops(model.language, float(measured_tokens**2)) / measured_tokens
        found.append((token, *flops_terms(model.vision, model.adapter, model.language.hidden_size)))
    token, patch, pair = (two - one for one, two in zip(*found, strict=True))
    return LayerCosts(token, 2 * token, patch, pair, 3 * patch, 3 * pair)


if __name__ == "__main__":
    main()
