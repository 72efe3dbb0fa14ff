"""From a checkpoint of ours to a folder that transformers loads, a few megabytes at a time.

All is planned from names, shapes and dtypes before the first number is read. Then their tensors
are written one after the other, each put together from the ranges of ours that it consists of,
wherever the layout that trained them has left those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_vlm.checkpoint import folder
from megatron_vlm.checkpoint.stored import StoredTensors
from megatron_vlm.checkpoint.verify import verify_files
from megatron_vlm.config import ModelConfig
from megatron_vlm.errors import CheckpointError, ConversionError
from megatron_vlm.models.hf.families import Family, family_for
from megatron_vlm.models.hf.names import Run, Translation, translate
from megatron_vlm.models.hf.tensors import EXPERT_BIAS
from megatron_vlm.release.dtypes import MAIN_WEIGHTS
from megatron_vlm.release.files import small_files
from megatron_vlm.release.placing import disk_errors
from megatron_vlm.release.progress import Meter
from megatron_vlm.release.safetensors_reader import DTYPES, INDEX, read_errors
from megatron_vlm.release.safetensors_writer import (
    SHARD_BYTES,
    Shard,
    Tensor,
    index_json,
    plan_shards,
    write_shard,
)
from megatron_vlm.release.source import DTYPE_CHOICES
from megatron_vlm.release.targets import new_release
from megatron_vlm.release.values import check_finite, one_thread

_MOST_PART_BYTES = 1 << 23
"""Of a tensor, read at a time. Our choice."""
_LEAST_PART_BYTES = 1 << 16

_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    folder: Path
    family: Family
    model: ModelConfig
    tensors: int
    parameters: int
    bytes: int
    """Of the tensors."""
    dtype: torch.dtype
    """Of the weights, as config.json says."""
    shards: int


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    show_progress: bool = False,
) -> ExportSummary:
    """Write the folder `target` from a checkpoint of any layout.

    Args:
        source: a checkpoint, or a run folder (its newest).
        target: folder to write; it appears when all of it is there.
        dtype: what weights become (`DTYPE_CHOICES`); `float32` takes the optimizer's float32
            weights where the checkpoint has them. Expert biases stay in float32.
        max_shard_bytes: most bytes of tensors in a file.
        overwrite: replace an earlier export in `target`.
        show_progress: draw progress bars on standard error.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConversionError: no Hugging Face class has this model, the checkpoint is not exactly the
            model, holds a number that is not finite, or the target is not to be written; nothing
            is left then.
    """
    with read_errors(source):
        checkpoint = folder.find_checkpoint(source)
    state = folder.read_state(checkpoint)
    model = _model(checkpoint, state)
    family = family_for(model)
    translation = translate(model, family.names)
    with one_thread(), disk_errors(target), new_release(target, overwrite) as release:
        _verify(checkpoint, show_progress)
        with StoredTensors(checkpoint) as stored:
            work = _Work(translation, stored, checkpoint, DTYPE_CHOICES[dtype])
            shards = plan_shards(work.tensors, max_shard_bytes)
            total = sum(tensor.bytes for tensor in work.tensors)
            with Meter(f"export {family.model_type}", total, show_progress) as meter:
                for shard in shards:
                    _write(release.path, shard, work, meter)
        if len(shards) > 1:
            release.write(INDEX, index_json(shards))
        written = work.tensors[0].dtype
        named = str(written).removeprefix("torch.")
        with read_errors(checkpoint):
            small = small_files(checkpoint, model, family, named)
        for name, content in small.items():
            release.write(name, content)
        iteration = state["progress"]["iteration"]
        release.commit({"model": model.name, "iteration": iteration, "dtype": dtype})
    return ExportSummary(
        target,
        family,
        model,
        len(work.tensors),
        sum(math.prod(shape) for shape in translation.ours.values()),
        total,
        written,
        len(shards),
    )


class _Work:
    """Their tensors, and where their numbers come from."""

    def __init__(
        self,
        translation: Translation,
        stored: StoredTensors,
        checkpoint: Path,
        dtype: torch.dtype | None,
    ) -> None:
        self._stored, self._checkpoint, self._dtype = stored, checkpoint, dtype
        _compare(translation, stored, checkpoint)
        # Where each of ours is read: of half precision, the optimizer has the finer weights.
        main = dtype is torch.float32
        self._keys = {
            key: MAIN_WEIGHTS + key if main and MAIN_WEIGHTS + key in stored.tensors else key
            for key in translation.ours
        }
        for key, shape in translation.ours.items():
            if stored.tensors[self._keys[key]].shape != shape:
                raise ConversionError(
                    f"{checkpoint}: {self._keys[key]} and {key} differ in shape; the checkpoint "
                    "is damaged, use another"
                )
        self._runs = translation.by_theirs()
        shapes = dict(translation.theirs)
        for copy in translation.copies:
            if copy.written:
                shapes[copy.name] = shapes[copy.of]
                self._runs[copy.name] = self._runs[copy.of]
        self.tensors = [Tensor(name, shape, self._target(name)) for name, shape in shapes.items()]
        largest = max(tensor.bytes for tensor in self.tensors)
        self._part_bytes = min(_MOST_PART_BYTES, max(_LEAST_PART_BYTES, largest))

    def _target(self, name: str) -> torch.dtype:
        key = self._runs[name][0].ours
        if self._dtype is None:
            return self._stored.tensors[key].dtype
        return torch.float32 if key.endswith(EXPERT_BIAS) else self._dtype

    def values(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        """A tensor's elements, part by part."""
        for run in self._runs[tensor.name]:
            yield from self._values(tensor, run)

    def _values(self, tensor: Tensor, run: Run) -> Iterator[torch.Tensor]:
        key = self._keys[run.ours]
        dtype = self._stored.tensors[key].dtype
        step = self._part_bytes // dtype.itemsize
        for start in range(0, run.size, step):
            part = torch.empty(min(step, run.size - start), dtype=dtype)
            self._stored.read(key, run.our_start + start, part)
            part = part.to(tensor.dtype)
            check_finite(
                part,
                f"{self._checkpoint}: {key} ({tensor.name})",
                "the checkpoint is damaged, use another",
            )
            yield part


def _write(path: Path, shard: Shard, work: _Work, meter: Meter) -> None:
    def values(tensor: Tensor) -> Iterator[torch.Tensor]:
        for part in work.values(tensor):
            yield part
            meter.advance(part.nbytes)

    write_shard(path, shard, values)


def _compare(translation: Translation, stored: StoredTensors, checkpoint: Path) -> None:
    there = {name for name in stored.tensors if not name.startswith(_OPTIMIZER)}
    for names, what in (
        (sorted(translation.ours.keys() - there), "is missing"),
        (sorted(there - translation.ours.keys()), "is no tensor of the model"),
    ):
        if names:
            raise ConversionError(
                f"{checkpoint}: {names[0]} {what} ({len(names)} in all), by its state.json; use "
                "another checkpoint"
            )
    known = set(DTYPES.values())
    for key, shape in translation.ours.items():
        found = stored.tensors[key]
        if found.shape != shape or found.dtype not in known:
            raise ConversionError(
                f"{checkpoint}: {key} is {found.dtype} {list(found.shape)}; expected numbers "
                f"{list(shape)}, by its state.json; use another checkpoint"
            )


def _model(checkpoint: Path, state: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(state["model"])
    except (ValidationError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint / folder.STATE}: does not describe a model ({str(error).splitlines()[0]})"
            "; the checkpoint is damaged, use another"
        ) from None


def _verify(checkpoint: Path, show_progress: bool) -> None:
    files_there = sorted(folder.read_manifest(checkpoint))
    # Sizes first: a truncated file is found without reading any.
    verify_files(checkpoint, contents=False)
    total = sum((checkpoint / name).stat().st_size for name in files_there)
    with Meter("verify checkpoint", total, show_progress) as meter:
        for number, name in enumerate(files_there):
            verify_files(checkpoint, number, len(files_there))
            meter.advance((checkpoint / name).stat().st_size)


def describe(summary: ExportSummary) -> str:
    """One line about an export."""
    return (
        f"{summary.folder}: {summary.family.architecture}, {summary.parameters:,} parameters, "
        f"{summary.bytes / 1e9:,.2f} GB in {summary.tensors:,} tensors and {summary.shards:,} "
        "files"
    )


def as_json(summary: ExportSummary) -> str:
    """The same for a program."""
    return json.dumps(
        {
            "folder": str(summary.folder),
            "family": summary.family.model_type,
            "parameters": summary.parameters,
            "tensors": summary.tensors,
            "bytes": summary.bytes,
            "shards": summary.shards,
        }
    )
