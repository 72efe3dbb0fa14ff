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
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from megatron_vlm.models.hf import own
from megatron_vlm.models.hf.vision import has_released_encoder, write_vision

HUB = Path(__file__).parent / "hub"
MODELING, PROCESSING = "modeling_megatron_vlm", "processing_megatron_vlm"
PYTHON_FILES = ("vision_megatron_vlm.py", f"{MODELING}.py", f"{PROCESSING}.py")

_OWN = {
    "dots1": ("MegatronVlmConfig", own.ARCHITECTURES["dots1"]),
    "deepseek_v3": ("MegatronVlmDeepseekV3Config", own.ARCHITECTURES["deepseek_v3"]),
    "qwen2": ("MegatronVlmQwen2Config", own.ARCHITECTURES["qwen2"]),
}
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
        **dtype_fields(dtype),
        "bos_token_id": None,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": _generation_config(tokenizer, model.language.vocab_size),
        "tokenizer_config.json": _tokenizer_config(model.language.max_position_embeddings),
    }
    content = {name: as_json(value) for name, value in files.items()}
    content["tokenizer.json"] = tokenizer.to_json().encode()
    content["chat_template.jinja"] = (HUB / "chat_template.jinja").read_bytes()
    if model.vision is not None:
        content["preprocessor_config.json"] = as_json(_preprocessor_config(model.vision))
        content["processor_config.json"] = as_json(_processor_config())
        content |= python_files()
    return content


def vlm_config(
    text_config: dict[str, Any],
    model: ModelConfig,
    image_token_id: int | None,
    video_token_id: int | None = None,
) -> dict[str, Any]:
    """`config.json` of a vision-language model: the decoder's fields, flat, and the encoder's.

    Args:
        text_config: the decoder's `config.json` as transformers has it for the text-only model.
        model: with an encoder.
        image_token_id: of the placeholder that a picture's features take the place of; null if
            nobody has said.
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
        "vision_config": write_vision(model),
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


def _generation_config(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    ids = tokenizer.special_ids
    config = {"eos_token_id": [ids.eos, ids.end], "pad_token_id": ids.pad, "do_sample": False}
    unused = range(tokenizer.vocab_size, vocab_size)
    # Rows of the embedding that no token has are never an answer, as in `mvlm generate`.
    return {**config, "suppress_tokens": list(unused)} if unused else config


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


def dtype_fields(dtype: str) -> dict[str, str]:
    """The dtype for every reader: transformers 4.56 gave the field a new name."""
    return {"dtype": dtype, "torch_dtype": dtype}


def python_files() -> dict[str, bytes]:
    """The code that an exported model with an encoder carries, by its files' names."""
    return {name: (HUB / name).read_bytes() for name in PYTHON_FILES}


def as_json(value: Any) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
