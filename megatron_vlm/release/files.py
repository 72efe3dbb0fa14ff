"""The small files of a release: config.json, the tokenizer's, and those kept from an import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import folder
from megatron_vlm.data.chat import IMAGE_MARK
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, SpecialIds, Tokenizer
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import Family

KEPT_FOLDER = "huggingface"
"""Folder of an imported checkpoint for files that an export gives back as they were."""

MODEL_FILE = "model.yaml"
"""File of an imported checkpoint with its model alone: `mvlm train RECIPE model=FILE`."""

_KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Not code: no .py file is ever kept.
_MOST_KEPT_BYTES = 1 << 26

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id")


def kept_files(source: Path) -> dict[str, bytes]:
    """The small files of a Hugging Face folder that belong to its model."""
    found = {}
    for name in _KEPT:
        file = source / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MOST_KEPT_BYTES:
            raise ConversionError(f"{file}: has more than {_MOST_KEPT_BYTES} bytes; expected text")
        found[name] = file.read_bytes()
    return found


def read_kept(checkpoint: Path) -> dict[str, bytes] | None:
    """What an import kept; nothing if the checkpoint was trained here."""
    if not (checkpoint / KEPT_FOLDER / "config.json").is_file():
        return None
    found = kept_files(checkpoint / KEPT_FOLDER)
    tokenizer = checkpoint / folder.TOKENIZER
    if tokenizer.is_file():
        found[folder.TOKENIZER] = tokenizer.read_bytes()
    return found


def config_json(
    fields: dict[str, Any], family: Family, dtype: str, ids: dict[str, Any]
) -> dict[str, Any]:
    """The whole config.json of a model whose own fields are `fields`."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **fields,
        **ids,
        "torch_dtype": dtype,
    }


def kept_ids(kept: dict[str, bytes]) -> dict[str, Any]:
    """The token ids that an imported config.json names."""
    config = json.loads(kept["config.json"])
    return {name: config[name] for name in _IDS if name in config}


def trained_ids(tokenizer: Tokenizer, family: Family) -> dict[str, Any]:
    """The token ids of a model that was trained here."""
    ids = tokenizer.special_ids
    found: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    return {**found, "image_token_id": ids.image} if family.sees else found


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, bytes]:
    """What transformers needs to encode and decode as we do.

    Args:
        tokenizer: of the data set that the model was trained on.
        longest: the longest sample in tokens.
    """
    template = chat_template()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS["eos"],
        "pad_token": SPECIAL_TOKENS["pad"],
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return {
        folder.TOKENIZER: tokenizer.to_json().encode(),
        "tokenizer_config.json": as_bytes(config),
        "chat_template.jinja": template.encode(),
        "generation_config.json": as_bytes(_generation(tokenizer.special_ids)),
    }


def _generation(ids: SpecialIds) -> dict[str, Any]:
    # An answer ends with its turn; greedy, as `mvlm generate` answers.
    return {"eos_token_id": [ids.end, ids.eos], "pad_token_id": ids.pad, "do_sample": False}


def chat_template() -> str:
    """The chat format of `data/chat.py` for transformers.

    Text may hold `<image>` where a picture goes, as in our data. Pictures given as parts go where
    they stand; those that open the first user's turn are followed by a line break, which is where
    and how our data puts pictures without a mark.
    """
    image = SPECIAL_TOKENS["image"]
    end, eos = SPECIAL_TOKENS["end"], SPECIAL_TOKENS["eos"]
    text = f"replace('{IMAGE_MARK}', '{image}')"
    return (
        "{%- set seen = namespace(user=false, opening=false) -%}"
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>' -}}"
        "{%- if message['content'] is string -%}"
        f"{{{{- message['content'] | {text} -}}}}"
        "{%- else -%}"
        "{%- set seen.opening = false -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] in ('image', 'image_url') -%}"
        f"{{{{- '{image}' -}}}}"
        "{%- if loop.first and message['role'] == 'user' and not seen.user -%}"
        "{%- set seen.opening = true -%}"
        "{%- endif -%}"
        "{%- else -%}"
        "{%- if seen.opening -%}{{- '\\n' -}}{%- set seen.opening = false -%}{%- endif -%}"
        f"{{{{- part['text'] | {text} -}}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{%- if message['role'] == 'user' -%}{%- set seen.user = true -%}{%- endif -%}"
        f"{{{{- '{end}' -}}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
        f"{{%- else -%}}{{{{- '{eos}' -}}}}{{%- endif -%}}"
    )


def as_bytes(value: dict[str, Any]) -> bytes:
    """JSON as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
