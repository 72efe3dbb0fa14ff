"""Open a run's data sets and check them against its model, before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.ordered import usable_cores
from megatron_vlm.data.rows import RowSource
from megatron_vlm.errors import ConfigError, DataError

_MOST_DECODE_THREADS = 8
# As torchrun, mpirun and srun (with --ntasks-per-node) set them.
_PROCESSES_PER_MACHINE = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


@dataclass
class OpenDataset:
    """A data set ready to plan from and to read."""

    source: RowSource
    reader: SampleReader


def open_training_set(config: RunConfig) -> OpenDataset:
    """The set of `data.train`.

    Raises:
        ConfigError: none is named.
        DataError: it is missing, damaged, or does not fit the model.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train is null; expected the folder of a data set built with `mvlm data build`"
        )
    return _open(config, config.data.train, shuffle=config.data.shuffle)


def open_held_out_sets(config: RunConfig) -> dict[str, OpenDataset]:
    """The sets of `data.validation`, in the order of the recipe, never shuffled."""
    return {
        name: _open(config, path, shuffle=False) for name, path in config.data.validation.items()
    }


def data_stream(config: RunConfig, training_set: OpenDataset) -> dict[str, str | int | bool | None]:
    """What, beside the number of consumed rows, decides which rows come next."""
    index, vision = training_set.source.index, config.model.vision
    return {
        "model.vision.min_pixels": vision.min_pixels if vision is not None else None,
        "model.vision.max_pixels": vision.max_pixels if vision is not None else None,
        "samples of data.train": index.num_samples,
        "content_sha256 of data.train": index.content_sha256,
        "tokenizer of data.train": index.tokenizer_sha256,
        "training.seed": config.training.seed,
        "training.seq_length": config.training.seq_length,
        "data.pad_multiple": config.data.pad_multiple,
        "data.packing_window": config.data.packing_window,
        "data.shuffle": config.data.shuffle,
        "data.skip_too_long": config.data.skip_too_long,
    }


def left_out(training_set: OpenDataset, held_out: Mapping[str, OpenDataset]) -> list[str]:
    """One line for each data set of which `data.skip_too_long` leaves out samples."""
    named = {"data.train": training_set}
    named |= {f"data.validation.{name}": data for name, data in held_out.items()}
    return [
        f"{name}: data.skip_too_long leaves out {source.num_skipped:,} of "
        f"{source.index.num_samples:,} samples, which are longer than training.seq_length "
        f"{source.seq_length}"
        for name, source in ((name, data.source) for name, data in named.items())
        if source.num_skipped
    ]


def decode_threads(config: RunConfig) -> int:
    """Threads that decode this process's pictures: `data.decode_threads`, or what that defaults to.

    Launchers either bind each process to its own cores or tell how many processes share the
    machine.
    """
    if config.data.decode_threads is not None:
        return config.data.decode_threads
    told = (os.environ.get(name, "") for name in _PROCESSES_PER_MACHINE)
    processes = next((int(text) for text in told if text.isdigit() and int(text)), 1)
    bound = usable_cores() < (os.cpu_count() or 1)
    share = usable_cores() if bound else usable_cores() // processes
    return max(1, min(_MOST_DECODE_THREADS, share - 1))


def _open(config: RunConfig, path: str, shuffle: bool) -> OpenDataset:
    index = open_dataset(Path(path))
    vocabulary, rows = index.vocab_size, config.model.language.vocab_size
    if vocabulary > rows:
        raise DataError(
            f"{path}: its tokenizer has {vocabulary} tokens, model.language.vocab_size is {rows}; "
            "expected at least as many rows: choose another model or rebuild the data set"
        )
    settings = config.data.model_copy(update={"shuffle": shuffle})
    source = RowSource(
        index, config.training.seq_length, settings, config.training.seed, config.model.vision
    )
    return OpenDataset(source, SampleReader(index))
