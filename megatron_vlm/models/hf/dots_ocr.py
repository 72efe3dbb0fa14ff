"""dots.ocr: Qwen2 behind dots' encoder, `DotsOCRForCausalLM` (vLLM; its own remote code).

Checked against vLLM's `models/dots_ocr.py` and `configs/dotsocr.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vlm.config.model_schema import ModelConfig
from megatron_vlm.models.hf import qwen2
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.models.hf.names import NameMap
from megatron_vlm.models.hf.vision import ROWS, check_released, read_vision, write_vision

ARCHITECTURE = "DotsOCRForCausalLM"

NAMES = NameMap((*qwen2.NAMES.rows, *ROWS), qwen2.NAMES.copies)


def read_config(fields: Fields, pictures: Sequence[Fields]) -> dict[str, Any]:
    """Our sections from a config.json's fields.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    language = qwen2.read_config(fields)
    width = language["hidden_size"]
    return {"language": language, **read_vision(fields, width, pictures, own=False)}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json's fields from our model.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    check_released(model, ARCHITECTURE)
    return {
        **qwen2.write_config(model.language),
        "attention_bias": True,
        "vision_config": write_vision(model),
    }
