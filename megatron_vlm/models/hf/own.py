"""Classes of our own, `model_type: megatron_vlm`: an encoder like dots' before a decoder.

dots.llm1 behind dots' encoder (`dots-vlm-142b`) is one: nobody has released that pair. Names and
fields are those of the two parts, laid out as dots.vlm1 and dots.ocr are. The classes themselves
are in `release/hub`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf import deepseek_v3, dots1, qwen2
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.models.hf.names import NameMap
from megatron_vlm.models.hf.vision import ROWS, read_vision, write_vision

MODEL_TYPE = "megatron_vlm"

ARCHITECTURES = {
    "dots1": "MegatronVlmForConditionalGeneration",
    "deepseek_v3": "MegatronVlmDeepseekV3ForConditionalGeneration",
    "qwen2": "MegatronVlmQwen2ForConditionalGeneration",
}
"""The class of each decoder."""

NAMES = {
    decoder: NameMap((*names.rows, *ROWS), names.copies)
    for decoder, names in (
        ("dots1", dots1.NAMES),
        ("deepseek_v3", deepseek_v3.NAMES),
        ("qwen2", qwen2.NAMES),
    )
}
"""The table of each decoder with its encoder."""


def read_config(decoder: str, fields: Fields, pictures: Sequence[Fields]) -> dict[str, Any]:
    """Our sections from a config.json's fields.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    # Our class of DeepSeek-V3 gives every norm the model's epsilon.
    readers = {
        "dots1": dots1.read_config,
        "deepseek_v3": deepseek_v3.read_traits,
        "qwen2": qwen2.read_config,
    }
    language = readers[decoder](fields)
    width = language["hidden_size"]
    return {"language": language, **read_vision(fields, width, pictures, own=True)}


def write_config(decoder: str, model: ModelConfig) -> dict[str, Any]:
    """A config.json's fields from our model.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    if model.vision is None:
        raise ConversionError(f"model.vision is null; {ARCHITECTURES[decoder]} needs an encoder")
    return {**_write(decoder, model.language), "vision_config": write_vision(model)}


def _write(decoder: str, language: LanguageConfig) -> dict[str, Any]:
    if decoder == "dots1":
        return dots1.write_config(language)
    if decoder == "qwen2":
        return qwen2.write_config(language)
    return deepseek_v3.write_traits(language, ARCHITECTURES[decoder])
