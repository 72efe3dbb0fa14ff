"""Which chat format a run's model is asked in: that of the dialogues it trains on."""

from __future__ import annotations

from pathlib import Path

from megatron_vlm.checkpoint.chat import read_template
from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.errors import ConfigError
from megatron_vlm.training.datasets import OpenData


def chat_template(config: RunConfig, data: OpenData, start: Path | None) -> TemplateText | None:
    """The template that checkpoints carry; null: the built-in format.

    It is that of all sources with dialogues, or of `data.chat_source` where they differ. A run
    without dialogues keeps that of the checkpoint from which it starts.

    Args:
        config: the run.
        data: its mixture.
        start: checkpoint that it starts from, if any.

    Raises:
        ConfigError: sources differ and none is named, or the named one has no dialogues.
    """
    named = config.data.chat_source
    sources = [source for source in data.stream.sources if source.samples.index.has_dialogues]
    chosen = [source for source in sources if named in (None, source.name)]
    if named is not None and not chosen:
        others = ", ".join(source.name for source in sources) or "there are none"
        raise ConfigError(
            f"data.chat_source {named}: holds documents, which have no chat format; expected a "
            f"source with dialogues ({others}), or null"
        )
    if not chosen:
        return read_template(start) if start is not None else None
    first = chosen[0].samples.index.template
    for source in chosen[1:]:
        if source.samples.index.template != first:
            raise ConfigError(
                f"data.train.{chosen[0].name} and data.train.{source.name} have dialogues in "
                "different chat formats; set data.chat_source to the one whose format answers are "
                "asked for in"
            )
    return first
