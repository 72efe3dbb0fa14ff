"""The files of a Hugging Face folder that are not weights.

A vision-language model carries three Python files of its own (`hub/`), which need nothing but
transformers: with `trust_remote_code=True` its Auto classes load the folder where this package is
not installed. Field names are those released with dots.vlm1 and dots.ocr, whose model types are
written wherever the model is one of theirs, so that programs that serve those serve it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import ModelConfig, VisionConfig
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, SpecialIds, Tokenizer

HUB = Path(__file__).parent / "hub"
MODELING, PROCESSING = "modeling_megatron_vlm", "processing_megatron_vlm"
PYTHON_FILES = ("vision_megatron_vlm.py", f"{MODELING}.py", f"{PROCESSING}.py")

_OWN = {
    "dots1": ("MegatronVlmConfig", "MegatronVlmForConditionalGeneration"),
    "deepseek_v3": (
        "MegatronVlmDeepseekV3Config",
        "MegatronVlmDeepseekV3ForConditionalGeneration",
    ),
    "qwen2": ("MegatronVlmQwen2Config", "MegatronVlmQwen2ForConditionalGeneration"),
}
# Fixed in the code released with dots.ocr, and in SGLang's and vLLM's.
_RELEASED_ROTARY_BASE = 10000.0
_RELEASED_MERGER_EPSILON = 1e-6
_RELEASED = {
    "deepseek_v3": ("dots_vlm", "DotsVLMConfig", "DotsVLMForCausalLM"),
    "qwen2": ("dots_ocr", "DotsOCRConfig", "DotsOCRForCausalLM"),
}


def write_hub_files(
    folder: Path, model: ModelConfig, text_config: dict[str, Any], tokenizer_json: str, dtype: str
) -> None:
    """Write what `hub_files` gives into `folder`, which exists."""
    for name, content in hub_files(model, text_config, tokenizer_json, dtype).items():
        (folder / name).write_bytes(content)


def hub_files(
    model: ModelConfig, text_config: dict[str, Any], tokenizer_json: str, dtype: str
) -> dict[str, bytes]:
    """Content of each file beside the weights, by its name.

    Args:
        model: with or without an encoder.
        text_config: the decoder's `config.json` as transformers has it for the text-only model.
        tokenizer_json: text of the `tokenizer.json` that the model was trained with.
        dtype: of the weights in the files, for example `bfloat16`.

    Raises:
        DataError: `tokenizer_json` is no Hugging Face tokenizer.
        ValueError: a decoder that no class is written for.
    """
    tokenizer = Tokenizer.from_json(tokenizer_json)
    ids = tokenizer.special_ids
    config = text_config
    if model.vision is not None:
        config = vlm_config(text_config, model, ids.image)
    config = {
        **config,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": _generation_config(ids),
        "tokenizer_config.json": _tokenizer_config(model.language.max_position_embeddings),
    }
    content = {name: _json(value) for name, value in files.items()}
    content["tokenizer.json"] = tokenizer.to_json().encode()
    content["chat_template.jinja"] = (HUB / "chat_template.jinja").read_bytes()
    if model.vision is not None:
        content["preprocessor_config.json"] = _json(_preprocessor_config(model.vision))
        content["processor_config.json"] = _json(_processor_config())
        content |= {name: (HUB / name).read_bytes() for name in PYTHON_FILES}
    return content


def vlm_config(
    text_config: dict[str, Any],
    model: ModelConfig,
    image_token_id: int,
    video_token_id: int | None = None,
) -> dict[str, Any]:
    """`config.json` of a vision-language model: the decoder's fields, flat, and the encoder's.

    Args:
        text_config: the decoder's `config.json` as transformers has it for the text-only model.
        model: with an encoder.
        image_token_id: of the placeholder that a picture's features take the place of.
        video_token_id: likewise of video; null where the vocabulary has none.

    Raises:
        ValueError: a decoder that no class is written for.
    """
    decoder = str(text_config["model_type"])
    if decoder not in _OWN:
        raise ValueError(f"model_type {decoder!r} of the decoder: expected {', '.join(_OWN)}")
    model_type, (config_class, model_class) = "megatron_vlm", _OWN[decoder]
    if decoder in _RELEASED and has_released_encoder(model):
        model_type, config_class, model_class = _RELEASED[decoder]
    return {
        **text_config,
        "model_type": model_type,
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{config_class}",
            "AutoModelForCausalLM": f"{MODELING}.{model_class}",
            "AutoModelForImageTextToText": f"{MODELING}.{model_class}",
            "AutoProcessor": f"{PROCESSING}.MegatronVlmProcessor",
        },
        "image_token_id": image_token_id,
        "video_token_id": video_token_id,
        "vision_config": _vision_config(model),
    }


def has_released_encoder(model: ModelConfig) -> bool:
    """Whether the encoder is dots.vlm1's and dots.ocr's but for its sizes."""
    vision, adapter = model.vision, model.adapter
    if vision is None:
        return False
    merged, inner = adapter.widths(vision)
    return (
        vision.gated_linear_unit
        and not vision.qk_layernorm
        and vision.in_channels == 3
        and vision.rotary_base == _RELEASED_ROTARY_BASE
        and adapter.merge == "concatenate"
        and inner == merged
        and adapter.layernorm_epsilon == _RELEASED_MERGER_EPSILON
    )


def _vision_config(model: ModelConfig) -> dict[str, Any]:
    vision, adapter = model.vision, model.adapter
    assert vision is not None
    merged, inner = adapter.widths(vision)
    own = {
        "rotary_base": (vision.rotary_base, _RELEASED_ROTARY_BASE),
        "gated_linear_unit": (vision.gated_linear_unit, True),
        "qk_layernorm": (vision.qk_layernorm, False),
        "merge": (adapter.merge, "concatenate"),
        "merger_hidden_size": (inner, merged),
        "merger_norm_eps": (adapter.layernorm_epsilon, _RELEASED_MERGER_EPSILON),
    }
    return {
        "embed_dim": vision.hidden_size,
        "hidden_size": model.language.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": 1,
        "rms_norm_eps": vision.layernorm_epsilon,
        "use_bias": False,
        "is_causal": False,
        "post_norm": True,
        "initializer_range": vision.init_method_std,
        "init_merger_std": adapter.init_method_std,
        # Fields that the released configurations do not have are written where they matter.
        **{name: value for name, (value, released) in own.items() if value != released},
    }


def _preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        # For readers that run no code of the folder; theirs differs in the last bits.
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "MegatronVlmProcessor",
        "auto_map": {
            "AutoImageProcessor": f"{PROCESSING}.MegatronVlmImageProcessor",
            "AutoProcessor": f"{PROCESSING}.MegatronVlmProcessor",
        },
        "min_pixels": vision.min_pixels,
        "max_pixels": vision.max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": 1,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def _processor_config() -> dict[str, Any]:
    return {
        "processor_class": "MegatronVlmProcessor",
        "auto_map": {"AutoProcessor": f"{PROCESSING}.MegatronVlmProcessor"},
        "image_token": SPECIAL_TOKENS["image"],
    }


def _generation_config(ids: SpecialIds) -> dict[str, Any]:
    return {"eos_token_id": [ids.eos, ids.end], "pad_token_id": ids.pad, "do_sample": False}


def _tokenizer_config(longest: int) -> dict[str, Any]:
    named = ("image", "system", "user", "assistant", "end")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS["pad"],
        "eos_token": SPECIAL_TOKENS["eos"],
        "extra_special_tokens": {f"{role}_token": SPECIAL_TOKENS[role] for role in named},
        "model_max_length": longest,
        # Answers follow their prompts directly, whatever the prompts' lengths.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
