"""dots.llm1 behind dots' encoder (`dots-vlm-142b`): a class of our own, `model_type: megatron_vlm`.

Nobody has released this pair. Names and fields are those of the two parts, laid out as dots.vlm1
and dots.ocr are: the decoder's at the top level, the encoder's below `vision_tower` and
`vision_config`.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.models.hf import dots1
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.models.hf.names import NameMap
from megatron_vlm.models.hf.vision import ROWS, read_vision, write_vision

ARCHITECTURE = "MegatronVLMForConditionalGeneration"

NAMES = NameMap((*dots1.NAMES.rows, *ROWS), dots1.NAMES.copies)


def read_config(fields: Fields, preprocessor: dict[str, Any] | None) -> dict[str, Any]:
    """Our sections from a config.json's fields.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    language = dots1.read_config(fields)
    return {"language": language, **read_vision(fields, language["hidden_size"], preprocessor)}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json's fields from our model.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    return {
        **dots1.write_config(model.language),
        "vision_config": write_vision(model, ARCHITECTURE),
    }
