"""Open a run's data sets and check them against its model, before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.mixture import Phase, Weights, phases
from megatron_vlm.data.ordered import usable_cores
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.stream import RowStream, Source
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.data.untie import UntieSettings
from megatron_vlm.errors import ConfigError, DataError

_MOST_WORKERS = 8
# As torchrun, mpirun and srun (with --ntasks-per-node) set them.
_PROCESSES_PER_MACHINE = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


@dataclass
class OpenData:
    """Data sets ready to plan from and to read."""

    stream: RowStream
    readers: Sequence[SampleReader]
    """Of the stream's sources, in their order."""


def open_training_data(config: RunConfig) -> OpenData:
    """The mixture of `data.train`.

    Raises:
        ConfigError: none is named.
        DataError: a set is missing, damaged, or does not fit the model or the others.
    """
    settings = config.data
    if not settings.train:
        raise ConfigError(
            "data.train names no data set; expected the folder of one built with `mvlm data "
            "build`, or several by name"
        )
    # In the order of their names, so that the order of lines in a recipe means nothing.
    named = sorted(settings.train.items())
    sources = []
    for name, given in named:
        samples = _open(config, given.path)
        untie = None if given.untie is None else UntieSettings(**given.untie.model_dump())
        if untie is not None:
            _check_untied(name, samples)
        sources.append(Source(name, samples, given.max_epochs, untie))
    first = sources[0].samples.index
    for source in sources:
        if source.limit == 0:
            raise ConfigError(
                f"data.train.{source.name}.max_epochs {source.max_epochs}: of "
                f"{source.samples.num_items} samples that is not one; raise it, or leave the "
                "source out"
            )
        _check_tokenizer(source.samples.index, first)
    return _opened(config, sources, _phases(config, sources), shuffle=settings.shuffle)


def open_held_out_data(config: RunConfig, training: OpenData) -> dict[str, OpenData]:
    """One pass over each set of `data.validation`, in the order of the recipe, never shuffled.

    Args:
        config: the run.
        training: what it trains on, whose tokenizer is that of the model.

    Raises:
        DataError: a set is missing, damaged, or does not fit the model or its tokenizer.
    """
    found = {}
    for name, path in config.data.validation.items():
        sources = [Source(name, _open(config, path), max_epochs=1.0)]
        _check_tokenizer(sources[0].samples.index, training.stream.sources[0].samples.index)
        found[name] = _opened(config, sources, [Phase(0, (1.0,))], shuffle=False)
    return found


def data_stream(config: RunConfig, data: OpenData) -> dict[str, str | int | float | bool | None]:
    """What, beside the cursor, decides which rows come next."""
    settings, vision = config.data, config.model.vision
    found: dict[str, str | int | float | bool | None] = {
        "model.vision.min_pixels": vision.min_pixels if vision is not None else None,
        "model.vision.max_pixels": vision.max_pixels if vision is not None else None,
        "sources of data.train": ", ".join(source.name for source in data.stream.sources),
    }
    for source in data.stream.sources:
        name, index = f"data.train.{source.name}", source.samples.index
        given = settings.train[source.name]
        found |= {
            f"samples of {name}": index.num_samples,
            f"content_sha256 of {name}": index.content_sha256,
            f"tokenizer of {name}": index.tokenizer_sha256,
            f"{name}.weight": given.weight,
            f"{name}.repeat": given.repeat,
            f"{name}.max_epochs": given.max_epochs,
            f"{name}.untie": str(given.untie) if given.untie is not None else None,
        }
    schedule = "; ".join(str(point) for point in settings.schedule)
    return found | {
        "data.mixture_unit": settings.mixture_unit,
        "data.schedule": schedule or None,
        "training.seed": config.training.seed,
        "training.seq_length": config.training.seq_length,
        "data.pad_multiple": settings.pad_multiple,
        "data.packing_rows": settings.packing_rows,
        "data.shuffle": settings.shuffle,
        "data.long_samples": settings.long_samples,
    }


def left_out(data: OpenData, held_out: Iterable[OpenData]) -> list[str]:
    """One line for each data set of which `data.long_samples` leaves out samples."""
    return [
        f"{source.samples.index.path}: data.long_samples leaves out "
        f"{source.samples.num_skipped:,} of {source.samples.num_items:,} samples, which are longer "
        f"than training.seq_length {source.samples.seq_length}"
        for each in (data, *held_out)
        for source in each.stream.sources
        if source.samples.num_skipped
    ]


def num_workers(config: RunConfig) -> int:
    """Threads that fetch in this process: `data.num_workers`, or what that defaults to.

    Launchers either bind each process to its own cores or tell how many processes share the
    machine.
    """
    if config.data.num_workers is not None:
        return config.data.num_workers
    told = (os.environ.get(name, "") for name in _PROCESSES_PER_MACHINE)
    processes = next((int(text) for text in told if text.isdigit() and int(text)), 1)
    bound = usable_cores() < (os.cpu_count() or 1)
    share = usable_cores() if bound else usable_cores() // processes
    return max(1, min(_MOST_WORKERS, share - 1))


def _open(config: RunConfig, path: str) -> SampleSet:
    index = open_dataset(Path(path))
    vocabulary, rows = index.vocab_size, config.model.language.vocab_size
    if vocabulary > rows:
        raise DataError(
            f"{path}: its tokenizer has {vocabulary} tokens, model.language.vocab_size is {rows}; "
            "expected at least as many rows: choose another model or rebuild the data set"
        )
    return SampleSet(
        index, config.training.seq_length, config.model.vision, config.data.long_samples
    )


def _check_tokenizer(index: DatasetIndex, first: DatasetIndex) -> None:
    if index.tokenizer_sha256 != first.tokenizer_sha256:
        raise DataError(
            f"{index.path}: built with another tokenizer than {first.path}; token ids would "
            "mean different text in one run: build one of them again with the other's "
            f"tokenizer ({first.tokenizer_path})"
        )


def _check_untied(name: str, samples: SampleSet) -> None:
    """Raises DataError unless documents can be cut anywhere and their targets be counted."""
    index, columns = samples.index, samples.index.columns
    whole = columns.sample_loss_tokens == columns.sample_text_tokens - 1
    if index.num_pictures or not whole.all():
        found = f"{index.num_pictures} pictures" if index.num_pictures else "other samples"
        raise DataError(
            f"data.train.{name}.untie: {index.path} holds {found}; expected documents of text, "
            "learned throughout: take untie away or name another set"
        )
    try:
        _ = Tokenizer.load(index.tokenizer_path).knots
    except DataError as error:
        raise DataError(f"data.train.{name}.untie: {index.path}: {error}") from error


def _opened(
    config: RunConfig, sources: Sequence[Source], rates: Sequence[Phase], shuffle: bool
) -> OpenData:
    settings, length = config.data, config.training.seq_length
    if length % settings.pad_multiple:
        raise ConfigError(
            f"training.seq_length {length} is not a multiple of data.pad_multiple "
            f"{settings.pad_multiple}; change one of them"
        )
    stream = RowStream(
        sources,
        rates,
        seq_length=length,
        pad_multiple=settings.pad_multiple,
        packing_rows=settings.packing_rows,
        shuffle=shuffle,
        seed=config.training.seed,
    )
    readers = [SampleReader(s.samples.index, settings.retry_seconds) for s in sources]
    return OpenData(stream, readers)


def _phases(config: RunConfig, sources: Sequence[Source]) -> list[Phase]:
    settings = config.data
    mean_tokens = [source.samples.tokens / source.samples.num_items for source in sources]
    first = []
    for source, mean in zip(sources, mean_tokens, strict=True):
        given = settings.train[source.name]
        if given.weight is not None:
            first.append(given.weight)
        else:
            # As many draws as the set has samples, whatever weights are counted in.
            draws = given.repeat * source.samples.num_items
            first.append(draws * mean if settings.mixture_unit == "tokens" else draws)
    schedule = [Weights(0, tuple(first))]
    for point in settings.schedule:
        weights = tuple(point.weights.get(source.name, 0.0) for source in sources)
        schedule.append(Weights(point.tokens, weights, point.ramp_tokens))
    return phases(schedule, settings.mixture_unit, mean_tokens)
