"""The chat template that a checkpoint carries, by which its model is asked."""

from __future__ import annotations

from pathlib import Path

from megatron_vlm.checkpoint import folder
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.errors import CheckpointError


def read_template(checkpoint: Path) -> TemplateText | None:
    """The template of a checkpoint's own folder; null: its dialogues have the built-in format.

    Raises:
        CheckpointError: it cannot be read.
        DataError: it is no template.
    """
    file = checkpoint / folder.TEMPLATE
    if not file.exists():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None
    return TemplateText.from_json(text, str(file))
