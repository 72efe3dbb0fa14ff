"""What `mvlm data stats` and `mvlm data show` look at: a recipe's data, or one data set."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.cli.arguments import positive

if TYPE_CHECKING:
    from megatron_vlm.config.schema import RunConfig
    from megatron_vlm.training.datasets import OpenData

_SEQ_LENGTH = 8192
"""Tokens of a row where a data set is looked at alone. Our choice."""


@dataclass(frozen=True)
class Opened:
    """Data to look at."""

    name: str
    """The recipe or folder, as it was given."""
    config: RunConfig
    is_recipe: bool
    """Whether the run's length and batch mean something."""
    data: OpenData
    held_out: dict[str, OpenData]
    """Of a recipe: the sets of `data.validation`, by name."""


def add_source(parser: argparse.ArgumentParser) -> None:
    """Declare `SOURCE [key=value ...]` and the shortcuts of the commonest keys."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a recipe (a YAML file or a shipped one's name), or the folder of a built data set",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example data.pad_multiple=64"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="model=NAME: a shipped model or a YAML file; a folder with pictures needs one",
    )
    parser.add_argument(
        "--seq-length",
        metavar="N",
        type=positive,
        help=f"training.seq_length=N: tokens of a row (of a folder {_SEQ_LENGTH:,})",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="training.seed=N: decides the order of samples"
    )


def open_source(args: argparse.Namespace, refuse_long: bool) -> Opened:
    """Open what the command line names.

    Args:
        args: of a parser with `add_source`.
        refuse_long: whether samples longer than a row stop here where they would stop the run;
            else they are left out.

    Raises:
        UserError: bad input.
    """
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data

    config, is_recipe = _configuration(args)
    opened = config
    if not refuse_long and config.data.long_samples == "refuse":
        skipping = config.data.model_copy(update={"long_samples": "skip"})
        opened = config.model_copy(update={"data": skipping})
    data = open_training_data(opened)
    return Opened(args.source, config, is_recipe, data, open_held_out_data(opened, data))


def _configuration(args: argparse.Namespace) -> tuple[RunConfig, bool]:
    from megatron_vlm.config.load import load_recipe, load_values
    from megatron_vlm.data.format import DATASET_FILE
    from megatron_vlm.data.sources.records import RECORD_EXTENSIONS
    from megatron_vlm.errors import DataError

    shortcuts = {
        "model": args.model,
        "training.seq_length": args.seq_length,
        "training.seed": args.seed,
    }
    overrides = [
        *(f"{key}={value}" for key, value in shortcuts.items() if value is not None),
        *args.overrides,
    ]
    folder = Path(args.source)
    if (folder / DATASET_FILE).is_file():
        named = any(word.startswith("model=") for word in overrides)
        return load_values(_values(folder, named), str(folder), overrides), False
    if folder.is_dir():
        raise DataError(
            f"{folder}: holds no {DATASET_FILE}; expected a recipe, or a folder written by `mvlm "
            "data build`"
        )
    if folder.suffix in RECORD_EXTENSIONS or (not folder.exists() and len(folder.parts) > 1):
        what = "is no recipe" if folder.exists() else "does not exist"
        raise DataError(
            f"{folder}: {what}; expected a recipe, or a folder written by `mvlm data build`"
        )
    return load_recipe(args.source, overrides), True


def _values(folder: Path, has_model: bool) -> dict[str, Any]:
    """One pass over a data set, as a recipe."""
    values: dict[str, Any] = {
        "training": {"train_iters": 1, "seq_length": _SEQ_LENGTH, "global_batch_size": 1},
        "data": {
            "train": {"set": {"path": str(folder), "max_epochs": 1.0}},
            "long_samples": "skip",
        },
    }
    if not has_model:
        values["model"] = _text_model(folder)
    return values


def _text_model(folder: Path) -> dict[str, Any]:
    """What a set of text alone is looked at with: no size of it changes what is shown."""
    from megatron_vlm.data.index import open_dataset
    from megatron_vlm.errors import ConfigError

    index = open_dataset(folder)
    if index.num_pictures:
        raise ConfigError(
            f"{folder} has {index.num_pictures:,} pictures, whose tokens follow from a model's "
            "sizes; add --model NAME"
        )
    return {
        "name": "none",
        "language": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "ffn_hidden_size": 8,
            "vocab_size": index.vocab_size,
        },
    }
