"""From a Hugging Face folder to a checkpoint of ours, a few megabytes at a time.

All is planned from names, shapes and dtypes before the first number is read: every tensor of
theirs is used once, every element of ours is filled once. Then our tensors are written one after
the other, each put together from the ranges of theirs that it consists of.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import megatron_vlm
from megatron_vlm.checkpoint import folder
from megatron_vlm.checkpoint.checkpointer import Progress
from megatron_vlm.checkpoint.streamed import FILE_BYTES, Box, StreamedCheckpoint, boxes
from megatron_vlm.config import ModelConfig, RunConfig, TrainingConfig, dump_yaml
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import Family, read_model
from megatron_vlm.models.hf.names import Run, Translation, translate
from megatron_vlm.release.collection import FILE as COLLECTION
from megatron_vlm.release.files import KEPT_FOLDER, kept_files, picture_settings
from megatron_vlm.release.placing import disk_errors
from megatron_vlm.release.progress import Meter
from megatron_vlm.release.safetensors_reader import SafetensorsFolder, read_errors, read_json
from megatron_vlm.release.source import DTYPE_CHOICES, Source, check_counts
from megatron_vlm.release.targets import ITERATION, checkpoint_folder
from megatron_vlm.release.values import check_finite, one_thread

_MOST_PART_BYTES = 1 << 26
"""Of a tensor, written at a time: also what a rank that loads it reads at least. Our choice."""
_LEAST_PART_BYTES = 1 << 16


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote."""

    checkpoint: Path
    family: Family
    model: ModelConfig
    tensors: int
    """Of the Hugging Face folder."""
    parameters: int
    bytes: int
    """Of our tensors."""


def import_folder(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    show_progress: bool = False,
    file_bytes: int = FILE_BYTES,
) -> ImportSummary:
    """Write the checkpoint `target/iter_0000000` from a folder that transformers can load.

    Args:
        source: holds config.json and safetensors files.
        target: folder to write; made if missing.
        dtype: what weights become (`DTYPE_CHOICES`); `keep` multiplies float8 out to bfloat16.
        overwrite: replace an earlier import in `target`.
        show_progress: draw a progress bar on standard error.
        file_bytes: size after which the next data file begins.

    Raises:
        ConversionError: the folder is not exactly the model that its config.json describes, holds
            a number that is not finite, or the target is not to be written; nothing is left then.
        DataError: its chat template cannot be read.
    """
    config_file = source / "config.json"
    with read_errors(source):
        _refuse_ours(source)
    config = read_json(config_file)
    with read_errors(source):
        kept = kept_files(source)
        template = TemplateText.of_model(source)
    family, model = read_model(config, str(config_file), picture_settings(source, kept))
    with (
        one_thread(),
        disk_errors(target),
        checkpoint_folder(target, overwrite),
        SafetensorsFolder(source) as tensors,
    ):
        check_counts(model, tensors, str(config_file))
        translation = translate(model, family.names)
        weights = Source(tensors, translation, config, config_file.name)
        work = list(_work(translation, weights, DTYPE_CHOICES[dtype]))
        weights.check_copies()
        total = sum(item.bytes for item in work)
        most = min(_MOST_PART_BYTES, max(_LEAST_PART_BYTES, _largest(translation, weights)))
        with StreamedCheckpoint(target, ITERATION, file_bytes) as checkpoint:
            with Meter(f"import {family.model_type}", total, show_progress) as meter:
                for item in work:
                    for box, values in _parts(item, weights, most):
                        checkpoint.write(item.key, item.shape, box, values)
                        meter.advance(values.nbytes)
            written = checkpoint.commit(
                _state(model, family, dtype, work), _files(kept, model, work, template)
            )
    return ImportSummary(
        written,
        family,
        model,
        len(translation.theirs),
        sum(math.prod(shape) for shape in translation.ours.values()),
        total,
    )


def _refuse_ours(source: Path) -> None:
    """Say what a folder of ours is that is named in place of a Hugging Face folder."""
    if (source / "config.json").exists() or not source.is_dir():
        return
    roots = (source, source / "checkpoints")
    if (source / folder.MANIFEST).is_file() or any(map(folder.list_iterations, roots)):
        raise ConversionError(
            f"{source}: is a checkpoint or a run of megatron-vlm already; expected a Hugging Face "
            f"folder: train from it with checkpoint.load={source}, or make such a folder of it "
            f"with mvlm export {source} HF_DIR"
        )
    if (source / COLLECTION).is_file():
        below = sorted(path.parent for path in source.glob("*/config.json"))
        named = f", for example {below[0]}" if below else ""
        raise ConversionError(f"{source}: is a folder of releases; name one of those in it{named}")


@dataclass(frozen=True)
class _Item:
    """One of our tensors, and what it is made of."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: list[Run]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _work(translation: Translation, weights: Source, dtype: torch.dtype | None) -> Iterator[_Item]:
    grouped = translation.by_ours()
    for key, shape in translation.ours.items():
        names = list(dict.fromkeys(run.theirs for run in grouped[key]))
        yield _Item(key, shape, weights.our_dtype(key, names, dtype), grouped[key])


def _largest(translation: Translation, weights: Source) -> int:
    """Bytes of their largest tensor, as it is kept."""
    return max(
        math.prod(shape) * weights.dtype(name).itemsize
        for name, shape in translation.theirs.items()
    )


def _parts(item: _Item, weights: Source, most: int) -> Iterator[tuple[Box, torch.Tensor]]:
    """The tensor in parts that follow each other, each with a storage of its own."""
    place, number = 0, 0
    for box in boxes(item.shape, item.dtype.itemsize, most):
        values = torch.empty(box[1], dtype=item.dtype)
        flat, end = values.view(-1), place + values.numel()
        while number < len(item.runs) and item.runs[number].our_start < end:
            run = item.runs[number]
            low = max(place, run.our_start)
            high = min(end, run.our_start + run.size)
            out = flat[low - place : high - place]
            weights.read(run.theirs, run.their_start + low - run.our_start, out)
            check_finite(out, weights.place(run.theirs), "the model is damaged, take another copy")
            if run.our_start + run.size > end:
                break
            number += 1
        place = end
        yield box, values


def _state(model: ModelConfig, family: Family, dtype: str, work: list[_Item]) -> dict[str, Any]:
    return {
        "progress": asdict(Progress()),
        "model": model.model_dump(mode="json"),
        "precision": _precision(work),
        # Nothing was trained: no data, no optimizer, no layout.
        "data": {},
        "frozen": [],
        "layout": {},
        "imported": {"family": family.model_type, "dtype": dtype},
        "versions": {
            "megatron_vlm": megatron_vlm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _precision(work: list[_Item]) -> str:
    """The training precision that the first tensor, the embedding, is kept in."""
    return {torch.float64: "fp64", torch.float32: "fp32"}.get(work[0].dtype, "bf16")


def _files(
    kept: dict[str, bytes], model: ModelConfig, work: list[_Item], template: TemplateText | None
) -> dict[str, bytes]:
    # A run of one sample: what `mvlm generate` needs, and a place to read the model from.
    training = TrainingConfig(
        train_iters=1,
        seq_length=model.language.max_position_embeddings,
        global_batch_size=1,
        precision=_precision(work),
    )
    files = {
        "config.yaml": dump_yaml(RunConfig(model=model, training=training)).encode(),
        folder.MODEL: dump_yaml(model).encode(),
    }
    if template is not None:
        files[folder.TEMPLATE] = template.to_json().encode()
    for name, content in kept.items():
        files[folder.TOKENIZER if name == folder.TOKENIZER else f"{KEPT_FOLDER}/{name}"] = content
    return files


def describe(summary: ImportSummary) -> str:
    """One line about an import."""
    return (
        f"{summary.checkpoint}: {summary.family.architecture}, {summary.parameters:,} parameters, "
        f"{summary.bytes / 1e9:,.2f} GB, from {summary.tensors:,} tensors"
    )


def as_json(summary: ImportSummary) -> str:
    """The same for a program."""
    return json.dumps(
        {
            "checkpoint": str(summary.checkpoint),
            "family": summary.family.model_type,
            "parameters": summary.parameters,
            "tensors": summary.tensors,
            "bytes": summary.bytes,
        }
    )
