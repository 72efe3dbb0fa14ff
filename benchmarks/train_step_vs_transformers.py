"""How long a training step takes beside the same decoder in transformers (Dots1ForCausalLM).

    python benchmarks/train_step_vs_transformers.py --json result.json

One process on the CPU, float32, text alone. Both sides hold the same weights at the start, see the
same tokens, and do a whole step: forward, backward, clipping of the global norm at 1, AdamW. Ours
is the engine that `mvlm train` runs (TrainStep and the wrapped, chained optimizer on gloo) and so
also counts the routing, adds the balance loss and moves the router's bias, which the peer does
not have. The peer is as transformers' own Trainer would run it: sdpa attention, grouped_mm
experts, fused AdamW. A row is one document, so packing changes nothing in the work.

Before anything is timed, the numbers of parameters must be equal and the losses must agree to 1e-5.
Steps alternate (ours, peer; peer, ours; ...) so that other load on the machine meets both; the
result is the median over pairs of the peer's seconds over ours.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import parser_of, record, tell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {"small": (2, 128), "medium": (8, 512)}
"""Rows of a step, and tokens of a row."""
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of the two first losses."""
CLIP_GRAD = 1.0
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPSILON = 1e-8

Step = Callable[[Any], float]
"""One optimizer step on token ids `[rows, seq_length]`; returns the loss."""


def main() -> None:
    """Compare, print and, with `--json`, write the result."""
    args = parse()
    # Read when the libraries are loaded.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    result = compare(args)
    tell(result, args.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="dots-llm-bench", help="a shipped model without vision")
    parser.add_argument("--size", choices=SIZES, default="medium", help="rows and their length")
    parser.add_argument("--repetitions", type=int, default=11, help="timed pairs of steps")
    parser.add_argument("--warm-up", type=int, default=2, help="pairs before the timed ones")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--seconds", type=float, default=150, help="stop repeating after these")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write tables of operators")
    return parser.parse_args()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Build both sides, check that they are the same model, and time them in turn."""
    import torch

    from megatron_vlm.platform import stop

    torch.set_num_threads(args.threads)
    rows, seq_length = SIZES[args.size]
    config = run_config(args.model, rows, seq_length)
    language = config.model.language
    tokens = torch.Generator().manual_seed(config.training.seed)

    def batch() -> Any:
        return torch.randint(language.vocab_size, (rows, seq_length), generator=tokens)

    ours, weights = build_ours(config)
    peer, parameters = build_peer(config, weights)
    first = batch()
    losses = ours(first), peer(first)
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE * abs(losses[1]):
        raise SystemExit(f"the two models differ: losses {losses[0]:.8f} and {losses[1]:.8f}")
    for _ in range(args.warm_up):
        data = batch()
        ours(data), peer(data)
    if args.profile is not None:
        write_profiles(args.profile, {"ours": ours, "peer": peer}, batch())
    pairs = time_pairs(ours, peer, batch, args.repetitions, args.seconds)
    stop()
    return {
        "ratio": round(statistics.median(theirs / mine for mine, theirs in pairs), 3),
        "ours": round(statistics.median(mine for mine, _ in pairs), 4),
        "peer": round(statistics.median(theirs for _, theirs in pairs), 4),
        "unit": "seconds per step",
        "data": "synthetic tokens",
        "routing": "natural",
        "model": config.model.name,
        "parameters": parameters,
        "tokens_per_step": rows * seq_length,
        "rows": rows,
        "threads": args.threads,
        "precision": config.training.precision,
        "pairs": [[round(mine, 4), round(theirs, 4)] for mine, theirs in pairs],
        "first_loss": {"ours": losses[0], "peer": losses[1]},
        **record("torch", "megatron-core", "transformers"),
    }


def time_pairs(
    ours: Step, peer: Step, batch: Callable[[], Any], repetitions: int, limit: float
) -> list[tuple[float, float]]:
    """Seconds of (our step, the peer's step) on the same tokens, the order changing each time."""
    pairs: list[tuple[float, float]] = []
    ends = time.perf_counter() + limit
    for repetition in range(repetitions):
        data = batch()
        seconds = {}
        for side in (ours, peer) if repetition % 2 == 0 else (peer, ours):
            started = time.perf_counter()
            side(data)
            seconds[side] = time.perf_counter() - started
        pairs.append((seconds[ours], seconds[peer]))
        if time.perf_counter() > ends:
            break
    return pairs


def run_config(model: str, rows: int, seq_length: int) -> Any:
    """Our run: one micro-batch of all rows, as the peer takes them."""
    from megatron_vlm.config import OptimizerConfig, RunConfig, TrainingConfig
    from megatron_vlm.config.load import load_model

    return RunConfig(
        model=load_model(model),
        training=TrainingConfig(
            train_iters=1,
            seq_length=seq_length,
            micro_batch_size=rows,
            global_batch_size=rows,
            precision="fp32",
        ),
        optimizer=OptimizerConfig(
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPSILON,
            clip_grad=CLIP_GRAD,
        ),
    )


def build_ours(config: Any) -> tuple[Step, dict[str, Any]]:
    """Our step as the training loop takes it, and the decoder's starting weights by name."""
    from megatron_vlm.platform import detect_world, install, seed_step, start_distributed

    install()
    from megatron_vlm.engine.objective import build_objective
    from megatron_vlm.engine.routers import update_bias
    from megatron_vlm.engine.step import TrainStep
    from megatron_vlm.engine.trainable import make_trainable
    from megatron_vlm.models.initialize import initialize
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.layout import resolve_layout
    from megatron_vlm.topology.mesh import build_topology
    from tests.dots1_map import text_step

    topology = build_topology(resolve_layout(config, 1), start_distributed(detect_world()))
    seed_step(config.training.seed, 0)
    model = build_model(config, topology)
    initialize(model.sharded_state_dict(), config.model, config.training.seed)
    (chunk,) = model.chunks
    weights = {name: value.detach().clone() for name, value in chunk.named_parameters()}
    trainable = make_trainable(model, config)
    engine = TrainStep(
        config,
        topology,
        model,
        build_objective("next_token", topology, config.model),
        chunks=list(trainable.chunks),
    )
    bias_rate = config.model.language.moe_router_bias_update_rate

    def step(tokens: Any) -> float:
        data = text_step([[row] for row in tokens.tolist()], config.training.seq_length, 1)
        trainable.optimizer.zero_grad()
        result = engine.train(data)
        trainable.step(LEARNING_RATE, CLIP_GRAD)
        update_bias(model.chunks, bias_rate)
        return result.losses["lm_loss"]

    return step, weights


def build_peer(config: Any, weights: dict[str, Any]) -> tuple[Step, int]:
    """transformers' step from the same weights, and the number of parameters of both."""
    import torch
    from transformers import Dots1ForCausalLM

    from tests.dots1_map import dots1_config, to_dots1

    language = config.model.language
    model = Dots1ForCausalLM(dots1_config(language, attn_implementation="sdpa"))
    model.load_state_dict(to_dots1(weights, language) | dict(model.named_buffers()), strict=False)
    count = sum(value.numel() for value in model.parameters())
    if count != sum(value.numel() for value in weights.values()):
        raise SystemExit(f"the two models differ: the peer has {count} parameters")
    model.train()
    matrices = [value for value in model.parameters() if value.dim() > 1]
    vectors = [value for value in model.parameters() if value.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )

    def step(tokens: Any) -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        return float(loss.detach())

    return step, count


def write_profiles(folder: Path, sides: dict[str, Step], data: Any) -> None:
    """One table of operators by their own time for each side."""
    from torch.profiler import ProfilerActivity, profile

    folder.mkdir(parents=True, exist_ok=True)
    for name, step in sides.items():
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            step(data)
        table = found.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=60, max_name_column_width=40
        )
        (folder / f"{name}.txt").write_text(table)


if __name__ == "__main__":
    main()
