"""dots.vlm1: DeepSeek-V3 behind dots' encoder, `DotsVLMForCausalLM` of SGLang.

Checked against SGLang's `models/dots_vlm.py` and `configs/dots_vlm.py`: the decoder's names and
fields stand at the top level, the encoder's below `vision_tower` and `vision_config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig
from megatron_vlm.models.hf import deepseek_v3
from megatron_vlm.models.hf.fields import Fields, Traits
from megatron_vlm.models.hf.names import NameMap
from megatron_vlm.models.hf.vision import ROWS, check_released, read_vision, write_vision

ARCHITECTURE = "DotsVLMForCausalLM"

NAMES = NameMap((*deepseek_v3.NAMES.rows, *ROWS), deepseek_v3.NAMES.copies)


def read_config(fields: Fields, pictures: Sequence[Fields]) -> dict[str, Any]:
    """Our sections from a config.json's fields.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    # SGLang gives every norm the model's epsilon, as we do.
    language = deepseek_v3.read_traits(fields)
    width = language["hidden_size"]
    return {"language": language, **read_vision(fields, width, pictures, own=False)}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json's fields from our model.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    check_released(model, ARCHITECTURE)
    _check_rotary(model.language)
    return {
        **deepseek_v3.write_traits(model.language, ARCHITECTURE),
        "vision_config": write_vision(model),
    }


def _check_rotary(language: LanguageConfig) -> None:
    """Refuse a rotary embedding that SGLang does not compute, whatever config.json says of it.

    Its DeepSeek code always pairs neighbouring channels, stretches by YaRN alone, and takes 1 and 0
    for temperatures that are not given, one by one.
    """
    traits = Traits(language, "model.language", ARCHITECTURE)
    traits.need("rotary_interleaved", True)
    scaling = language.rope_scaling
    if scaling is None:
        return
    if scaling.type != "yarn":
        raise traits.refusal("rope_scaling", "null or yarn")
    if (scaling.mscale is None) is not (scaling.mscale_all_dim is None):
        raise traits.refusal("rope_scaling", "both of mscale and mscale_all_dim, or neither")
