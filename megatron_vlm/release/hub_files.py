"""The files of a Hugging Face folder that are not weights.

A vision-language model carries three Python files of its own (`hub/`), which need nothing but
transformers: with `trust_remote_code=True` its Auto classes load the folder where this package is
not installed.

Names of fields and weights are those released with dots.vlm1 and dots.ocr, and a model of that
architecture has their model type. That is all that agrees: programs that serve those also need
their special tokens (`<|img|>`, `<|imgpad|>`, `<|endofimg|>`) and their form of a prompt. The
tokenizer that a model is trained with here has others, so what was trained here is served by
transformers; an imported model keeps its tokenizer and can still be served by the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_vlm.config.model_schema import ModelConfig, VisionConfig
from megatron_vlm.data.chat_template import ChatTemplate, end_ids
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from megatron_vlm.models.hf.families import Family

HUB = Path(__file__).parent / "hub"
MODELING, PROCESSING = "modeling_megatron_vlm", "processing_megatron_vlm"
PYTHON_FILES = ("vision_megatron_vlm.py", f"{MODELING}.py", f"{PROCESSING}.py")

PROCESSOR = f"{PROCESSING}.MegatronVlmProcessor"
"""Our processor, as an `auto_map` names it."""


def hub_files(
    model: ModelConfig,
    family: Family,
    tokenizer_json: str,
    dtype: str,
    template: TemplateText | None = None,
) -> dict[str, bytes]:
    """Content of each file beside the weights, by its name.

    Args:
        model: with or without an encoder.
        family: what it is released as.
        tokenizer_json: text of the `tokenizer.json` that the model was trained with.
        dtype: of the weights in the files, for example `bfloat16`.
        template: what it is asked by; null: the built-in format.

    Raises:
        ConversionError: the model has a trait that the family lacks.
        DataError: `tokenizer_json` is no Hugging Face tokenizer, or the template cannot serve.
    """
    tokenizer = Tokenizer.from_json(tokenizer_json)
    ids = tokenizer.special_ids
    chat = None if template is None else ChatTemplate(template, tokenizer)
    ends = sorted(end_ids(tokenizer, chat))
    # Where one is asked for, the token that ends a template's answers; ours ends the sample too.
    eos = ids.eos if chat is None else min(chat.end_ids)
    config = model_config(model, family, dtype)
    if family.sees:
        config |= {"image_token_id": ids.image, "video_token_id": None}
    config |= {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": ids.pad}
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": _generation_config(tokenizer, ends, model.language.vocab_size),
        "tokenizer_config.json": _tokenizer_config(
            model.language.max_position_embeddings, tokenizer.spelling(eos), template
        ),
    }
    content = {name: as_json(value) for name, value in files.items()}
    content["tokenizer.json"] = tokenizer.to_json().encode()
    content["chat_template.jinja"] = _chat_template(template, family.sees)
    if model.vision is not None:
        content["preprocessor_config.json"] = as_json(_preprocessor_config(model.vision))
        content["processor_config.json"] = as_json(_processor_config())
        content |= python_files()
    return content


def model_config(model: ModelConfig, family: Family, dtype: str) -> dict[str, Any]:
    """`config.json` without the tokenizer's ids: the decoder's fields, flat, and the encoder's.

    Raises:
        ConversionError: the model has a trait that the family lacks.
    """
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **family.write(model),
        # For every reader: transformers 4.56 gave the field a new name.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family.sees:
        model_class = f"{MODELING}.{family.architecture}"
        config["auto_map"] = {
            # Each class of models has one of configurations, named alike.
            "AutoConfig": re.sub(r"For[A-Z]\w*$", "Config", model_class),
            "AutoModelForCausalLM": model_class,
            "AutoModelForImageTextToText": model_class,
            "AutoProcessor": PROCESSOR,
        }
    return config


def _preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        # For readers that run no code of the folder; theirs differs in the last bits.
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "MegatronVlmProcessor",
        "auto_map": {
            "AutoImageProcessor": f"{PROCESSING}.MegatronVlmImageProcessor",
            "AutoProcessor": PROCESSOR,
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
        "auto_map": {"AutoProcessor": PROCESSOR},
        "image_token": SPECIAL_TOKENS["image"],
    }


def _generation_config(tokenizer: Tokenizer, ends: list[int], vocab_size: int) -> dict[str, Any]:
    config = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_id, "do_sample": False}
    unused = range(tokenizer.vocab_size, vocab_size)
    # Rows of the embedding that no token has are never an answer, as in `mvlm generate`.
    return {**config, "suppress_tokens": list(unused)} if unused else config


def _tokenizer_config(longest: int, eos: str, template: TemplateText | None) -> dict[str, Any]:
    named = ("image", "system", "user", "assistant", "end")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS["pad"],
        "eos_token": eos,
        # What a template writes by name is spelled here.
        **(template.special_tokens if template is not None else {}),
        "extra_special_tokens": {f"{role}_token": SPECIAL_TOKENS[role] for role in named},
        "model_max_length": longest,
        # Answers follow their prompts directly, whatever the prompts' lengths.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _chat_template(template: TemplateText | None, sees: bool) -> bytes:
    """What transformers renders: the built-in format, or another model's template.

    That knows nothing of our placeholder, so before it messages with pictures become texts.
    """
    if template is None:
        return (HUB / "chat_template.jinja").read_bytes()
    before = (HUB / "pictures.jinja").read_text() if sees else ""
    return (before + template.source).encode()


def python_files() -> dict[str, bytes]:
    """The code that an exported model with an encoder carries, by its files' names."""
    return {name: (HUB / name).read_bytes() for name in PYTHON_FILES}


def as_json(value: Any) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
