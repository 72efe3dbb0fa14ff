"""Open a run's data sets and check them against its model, before any process group exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import open_dataset
from megatron_vlm.data.rows import RowSource
from megatron_vlm.errors import ConfigError, DataError


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
        "tokenizer of data.train": index.tokenizer_sha256,
        "training.seed": config.training.seed,
        "training.seq_length": config.training.seq_length,
        "data.pad_multiple": config.data.pad_multiple,
        "data.packing_window": config.data.packing_window,
        "data.shuffle": config.data.shuffle,
        "data.skip_too_long": config.data.skip_too_long,
    }


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
