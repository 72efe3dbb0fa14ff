"""Files that a family's release needs besides weights, configuration and tokenizer.

The place for code that transformers loads with a model that it does not know, and for the
preprocessor's settings.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.config import ModelConfig
from megatron_vlm.models.hf.families import Family


def companion_files(model: ModelConfig, family: Family, config: dict[str, Any]) -> dict[str, bytes]:
    """Such files by name.

    Args:
        model: what is released.
        family: as what.
        config: config.json, to which entries (`auto_map`, say) may be added in place.
    """
    return {}
