"""What is known about a checkpoint: the content of a release's `training_state.json`.

The model card is written from this alone, so what people and programs are told cannot differ.
Folders are told by their last name: a release should not publish how a machine is laid out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.config.schema import OptimizerConfig
from megatron_vlm.data.format import DATASET_FILE
from megatron_vlm.planning.shapes import active_parameters, model_parameters
from megatron_vlm.release.choosing import Candidate
from megatron_vlm.release.history import History
from megatron_vlm.training.schedule import learning_rate


def training_facts(candidate: Candidate, history: History) -> dict[str, Any]:
    """Everything about the training up to a checkpoint, as plain values for JSON.

    Raises:
        ConfigError: the configuration that the checkpoint carries cannot be read.
    """
    config = load_recipe(candidate.path / "config.yaml")
    state, iteration = candidate.state, candidate.iteration
    progress = state["progress"]
    published = with_short_paths(config)
    return {
        "iteration": iteration,
        "stage": config.training.stage,
        "consumed": {
            "tokens": candidate.tokens,
            "documents": progress.get("consumed_documents"),
            "rows": progress.get("consumed_samples"),
            "optimizer_steps": progress.get("optimizer_steps"),
            "skipped_iterations": progress.get("skipped_iterations"),
            "nan_iterations": progress.get("nan_iterations"),
        },
        "train_iters": config.training.train_iters,
        "learning_rate": _learning_rate(config, iteration, history),
        "batch": {
            "rows": config.training.global_batch_size,
            # No recipe can have one: each step of a run has as many rows.
            "ramp": None,
            "seq_length": config.training.seq_length,
            "tokens_at_most": config.training.global_batch_size * config.training.seq_length,
            "tokens_mean": candidate.tokens / iteration if iteration else None,
            "micro_batch_size": config.training.micro_batch_size,
        },
        "losses": {
            "metrics_found": history.found,
            "training": {name: _finite(value) for name, value in history.losses(iteration).items()},
            "validation": {
                name: {"value": _finite(value), "iteration": step}
                for name, (value, step) in history.validation(iteration).items()
            },
        },
        "objective": config.training.objective,
        "precision": state.get("precision"),
        "frozen": state.get("frozen", []),
        "seed": config.training.seed,
        "data": {
            "train": [
                {"source": name, **_data_set(source.path, state.get("data", {}), name)}
                for name, source in config.data.train.items()
            ],
            "validation": {name: _data_set(path) for name, path in config.data.validation.items()},
        },
        "optimizer": config.optimizer.model_dump(mode="json"),
        "model": _model(config),
        "layout": state.get("layout", {}),
        "versions": state.get("versions", {}),
        "started_from": config.checkpoint.load and Path(config.checkpoint.load).name,
        "started_with_optimizer": config.checkpoint.load_optimizer,
        "config": published.model_dump(mode="json"),
    }


def with_short_paths(config: RunConfig) -> RunConfig:
    """The same run with each path cut to its last name."""
    data, checkpoint = config.data, config.checkpoint
    return config.model_copy(
        update={
            "run_dir": Path(config.run_dir).name,
            "data": data.model_copy(
                update={
                    "train": {
                        name: source.model_copy(update={"path": Path(source.path).name})
                        for name, source in data.train.items()
                    },
                    "validation": {name: Path(path).name for name, path in data.validation.items()},
                }
            ),
            "checkpoint": checkpoint.model_copy(
                update={"load": checkpoint.load and Path(checkpoint.load).name}
            ),
        }
    )


def _learning_rate(config: RunConfig, iteration: int, history: History) -> dict[str, Any]:
    written = history.learning_rate(iteration)
    settings = config.optimizer
    return {
        "value": learning_rate(config, iteration) if written is None else written,
        "from": "the schedule" if written is None else "metrics.jsonl",
        "schedule": {
            "lr": settings.lr,
            "min_lr": settings.min_lr,
            "lr_warmup_iters": settings.lr_warmup_iters,
            "lr_decay_style": settings.lr_decay_style,
            "lr_decay_iters": settings.lr_decay_iters,
        },
        "in_words": _schedule(settings, config.training.train_iters),
    }


def _schedule(settings: OptimizerConfig, train_iters: int) -> str:
    count = settings.lr_warmup_iters
    warmup = f"{count:,} step{'s' * (count != 1)} of linear warm-up to {settings.lr:g}, then "
    start = warmup if count else ""
    if settings.lr_decay_style == "constant":
        return f"{start}constant" if start else f"constant at {settings.lr:g}"
    end = settings.lr_decay_iters or train_iters
    decay = f"{settings.lr_decay_style} to {settings.min_lr:g} at step {end:,}"
    return start + decay if start else f"from {settings.lr:g}, {decay}"


def _model(config: RunConfig) -> dict[str, Any]:
    model = config.model
    counts = model_parameters(model)
    return {
        **model.model_dump(mode="json"),
        "parameters": {
            "total": counts.total,
            "decoder_and_experts": counts.decoder + counts.experts,
            "decoder_active": active_parameters(model.language),
            "encoder": counts.trunk,
            "adapter": counts.adapter,
        },
    }


def _data_set(
    path: str | None, trained_on: dict[str, Any] | None = None, source: str = ""
) -> dict[str, Any]:
    """What a data set is, from its dataset.json as far as that is still the one used.

    Args:
        path: its folder.
        trained_on: `data` of the checkpoint's state, which knows the sets it was trained on.
        source: the set's name among them.
    """
    record = _record(path)
    found: dict[str, Any] = {
        "name": Path(path).name if path else None,
        "content_sha256": record.get("content_sha256"),
        "samples": record.get("samples"),
        "pictures": record.get("pictures"),
        "text_tokens": record.get("text_tokens"),
        "loss_tokens": record.get("loss_tokens"),
        "licence": record.get("licence", record.get("license")),
        "known_from": DATASET_FILE if record else None,
    }
    used = (trained_on or {}).get(f"content_sha256 of data.train.{source}")
    if used is not None and used != found["content_sha256"]:
        # It was built again, or is not here any more.
        return {
            **dict.fromkeys(found),
            "name": found["name"],
            "content_sha256": used,
            "samples": (trained_on or {}).get(f"samples of data.train.{source}"),
            "known_from": "the checkpoint",
        }
    return found


def _record(path: str | None) -> dict[str, Any]:
    try:
        record = json.loads((Path(path or "") / DATASET_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
