"""The files of a release that are not weights: those kept from an import, or `hub_files`."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vlm.checkpoint import folder
from megatron_vlm.config import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import Family
from megatron_vlm.release.hub_files import (
    as_json,
    dtype_fields,
    hub_files,
    python_files,
    vlm_config,
)

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
    decoder = family.write(model)
    decoder.pop("vision_config", None)
    text = {"model_type": family.decoder, "architectures": [family.architecture], **decoder}
    kept = read_kept(checkpoint)
    if kept is None:
        tokenizer = checkpoint / folder.TOKENIZER
        if tokenizer.is_file():
            return hub_files(model, text, tokenizer.read_text(), dtype)
        return {"config.json": as_json({**text, **dtype_fields(dtype)})}
    before = json.loads(kept["config.json"])
    ids = {name: before[name] for name in _IDS if name in before}
    if family.sees:
        text = vlm_config(text, model, ids.get("image_token_id"), ids.get("video_token_id"))
        if "AutoProcessor" not in before.get("auto_map", {}):
            # Its tokenizer is not ours, and our processor knows no other.
            del text["auto_map"]["AutoProcessor"]
        kept |= python_files()
    return {**kept, "config.json": as_json({**text, **ids, **dtype_fields(dtype)})}
