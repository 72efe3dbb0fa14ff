"""dots.vlm1: DeepSeek-V3 behind dots' encoder, `DotsVLMForCausalLM` of SGLang.

Checked against SGLang's `models/dots_vlm.py` and `configs/dots_vlm.py`: the decoder's names and
fields stand at the top level, the encoder's below `vision_tower` and `vision_config`.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.models.hf import deepseek_v3
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.models.hf.names import NameMap
from megatron_vlm.models.hf.vision import ROWS, check_released, read_vision, write_vision

ARCHITECTURE = "DotsVLMForCausalLM"

NAMES = NameMap((*deepseek_v3.NAMES.rows, *ROWS), deepseek_v3.NAMES.copies)


def read_config(fields: Fields, preprocessor: dict[str, Any] | None) -> dict[str, Any]:
    """Our sections from a config.json's fields.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    # SGLang gives every norm the model's epsilon, as we do.
    language = deepseek_v3.read_traits(fields)
    width = language["hidden_size"]
    return {"language": language, **read_vision(fields, width, preprocessor, own=False)}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json's fields from our model.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    check_released(model, ARCHITECTURE)
    return {
        **deepseek_v3.write_traits(model.language, ARCHITECTURE),
        "vision_config": write_vision(model),
    }
