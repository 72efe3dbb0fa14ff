"""The files of a release that are not weights: those kept from an import, or `hub_files`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import folder
from megatron_vlm.checkpoint.chat import read_template
from megatron_vlm.config import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import Family
from megatron_vlm.models.hf.fields import Fields
from megatron_vlm.release.hub_files import (
    PROCESSOR,
    as_json,
    hub_files,
    model_config,
    python_files,
)
from megatron_vlm.release.safetensors_reader import read_json

KEPT_FOLDER = "huggingface"
"""Folder of an imported checkpoint for files that an export gives back as they were."""

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
    """The small files of a Hugging Face folder that belong to its model.

    Raises:
        ConversionError: one is no text, or settings that cannot be read.
    """
    found = {}
    for name in _KEPT:
        file = source / name
        if not file.is_file():
            continue
        if file.stat().st_size > _MOST_KEPT_BYTES:
            raise ConversionError(f"{file}: has more than {_MOST_KEPT_BYTES} bytes; expected text")
        if _has_fields(name):
            read_json(file)
        found[name] = file.read_bytes()
    return found


def picture_settings(source: Path, kept: dict[str, bytes]) -> list[Fields]:
    """What the kept files of a folder say of pictures: a file of its own or, since transformers 5,
    a part of the processor's."""
    found = []
    if "preprocessor_config.json" in kept:
        values = json.loads(kept["preprocessor_config.json"])
        found.append(Fields(values, str(source / "preprocessor_config.json")))
    if "processor_config.json" in kept:
        whole = Fields(
            json.loads(kept["processor_config.json"]), str(source / "processor_config.json")
        )
        if whole.take("image_processor", None) is not None:
            found.append(whole.section("image_processor"))
    return found


def _has_fields(name: str) -> bool:
    """Whether a kept file is a JSON object of settings; others are kept without a look at them."""
    return name.endswith("config.json")


def read_kept(checkpoint: Path) -> dict[str, bytes] | None:
    """What an import kept; nothing if the checkpoint was trained here."""
    if not (checkpoint / KEPT_FOLDER / "config.json").is_file():
        return None
    found = kept_files(checkpoint / KEPT_FOLDER)
    tokenizer = checkpoint / folder.TOKENIZER
    if tokenizer.is_file():
        found[folder.TOKENIZER] = tokenizer.read_bytes()
    return found


def small_files(
    checkpoint: Path, model: ModelConfig, family: Family, dtype: str
) -> dict[str, bytes]:
    """Every file of a release but the weights.

    Args:
        checkpoint: what is released.
        model: its model.
        family: what it is released as.
        dtype: of the weights, for example `bfloat16`.
    """
    kept = read_kept(checkpoint)
    if kept is None:
        tokenizer = checkpoint / folder.TOKENIZER
        if tokenizer.is_file():
            template = read_template(checkpoint)
            return hub_files(model, family, tokenizer.read_text(), dtype, template)
        return {"config.json": as_json(model_config(model, family, dtype))}
    before = json.loads(kept["config.json"])
    code = python_files() if family.sees else {}
    config = model_config(model, family, dtype)
    config |= {name: before[name] for name in _IDS if name in before}
    if family.sees:
        config = {"image_token_id": None, "video_token_id": None} | config
        if _auto_map(before).get("AutoProcessor") != PROCESSOR:
            # Its tokenizer is not ours, and our processor knows no other.
            del config["auto_map"]["AutoProcessor"]
    return {**_without_lost_code(kept, code), **code, "config.json": as_json(config)}


def _without_lost_code(kept: dict[str, bytes], code: dict[str, bytes]) -> dict[str, bytes]:
    """Kept files that name no class of a Python file but those in `code`.

    A file that names none comes back byte for byte. Of another, those entries of `auto_map` are
    taken out, and the fields that call the same classes by their names: transformers then does
    what it does for a folder without code.
    """
    modules = {name.removesuffix(".py") for name in code}

    def there(value: Any) -> bool:
        return all(reference.partition(".")[0] in modules for reference in _references(value))

    settings = {name: json.loads(text) for name, text in kept.items() if _has_fields(name)}
    lost = {
        reference.rpartition(".")[2]
        for values in settings.values()
        for value in _auto_map(values).values()
        for reference in _references(value)
        if not there(value)
    }
    found = dict(kept)
    for name, values in settings.items():
        left = {key: value for key, value in _auto_map(values).items() if there(value)}
        rest = {
            key: value
            for key, value in values.items()
            if key != "auto_map" and not (key in _CLASS_FIELDS and str(value) in lost)
        }
        rest |= {"auto_map": left} if left else {}
        if rest != values:
            found[name] = as_json(rest)
    return found


_CLASS_FIELDS = (
    "processor_class",
    "image_processor_type",
    "feature_extractor_type",
    "video_processor_type",
    "tokenizer_class",
)


def _references(value: Any) -> list[str]:
    """What an entry of `auto_map` names: a class, or of tokenizers the slow and the fast one."""
    values = value if isinstance(value, list) else [value]
    return [reference for reference in values if isinstance(reference, str)]


def _auto_map(values: dict[str, Any]) -> dict[str, Any]:
    found = values.get("auto_map")
    return found if isinstance(found, dict) else {}
