"""Small Hugging Face folders: one model of each family, with random weights of several dtypes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vlm.config import ModelConfig
from megatron_vlm.models.hf.families import family_for, read_model
from megatron_vlm.models.hf.names import translate

_ROPE: dict[str, Any] = {"rope_theta": 10000.0, "rope_scaling": None}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_DOTS1 = _SIZES | _ROPE | _EXPERTS | {"num_key_value_heads": 2, "sliding_window": None}
_DEEPSEEK = (
    _SIZES
    | _EXPERTS
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "num_nextn_predict_layers": 1,
    }
)
_QWEN2 = _SIZES | _ROPE | {"num_key_value_heads": 2}
_VISION: dict[str, Any] = {
    "vision_config": {
        "embed_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "is_causal": False,
        "post_norm": True,
        "initializer_range": 0.02,
        "init_merger_std": 0.02,
    }
}

CONFIGS: dict[str, dict[str, Any]] = {
    "dots1": {"model_type": "dots1", **_DOTS1},
    "deepseek_v3": {"model_type": "deepseek_v3", **_DEEPSEEK},
    "deepseek_v3_plain": {
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
    },
    "qwen2": {"model_type": "qwen2", **_QWEN2},
    "qwen2_tied": {"model_type": "qwen2", **_QWEN2, "tie_word_embeddings": True},
    "dots_vlm": {
        "model_type": "dots_vlm",
        **_DEEPSEEK,
        **_VISION,
        "rms_norm_eps": 1e-5,
        "image_token_id": 58,
        "video_token_id": 59,
    },
    "dots_ocr": {"model_type": "dots_ocr", **_QWEN2, **_VISION, "attention_bias": True},
    "megatron_vlm": {
        "model_type": "megatron_vlm",
        "architectures": ["MegatronVlmForConditionalGeneration"],
        **_DOTS1,
        **_VISION,
    },
    "megatron_vlm_deepseek_v3": {
        "model_type": "megatron_vlm",
        "architectures": ["MegatronVlmDeepseekV3ForConditionalGeneration"],
        **_DEEPSEEK,
        "vision_config": _VISION["vision_config"] | {"gated_linear_unit": False},
    },
    "megatron_vlm_qwen2": {
        "model_type": "megatron_vlm",
        "architectures": ["MegatronVlmQwen2ForConditionalGeneration"],
        **_QWEN2,
        "vision_config": _VISION["vision_config"]
        | {"qk_layernorm": True, "merge": "average", "merger_hidden_size": 20},
    },
}
"""config.json of a small model of each family, and of variants."""


def write_folder(
    path: Path, name: str, *, shards: int = 1, seed: int = 0, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write the folder of `CONFIGS[name]` with random weights and return them.

    Weights are bfloat16, expert biases float32, routers alternately float32 and bfloat16.
    """
    config = CONFIGS[name] | changes
    family, model = read_model(dict(config), "config.json")
    translation = translate(model, family.names)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for tensor, shape in translation.theirs.items():
        values = torch.randn(shape, generator=generator)
        full = tensor.endswith("correction_bias") or tensor.endswith("1.mlp.gate.weight")
        tensors[tensor] = values if full else values.to(torch.bfloat16)
    for copy in translation.copies:
        if copy.written:
            tensors[copy.name] = tensors[copy.of].clone()
    config["architectures"] = [family.architecture]
    write_tensors(path, tensors, shards)
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write tensors by the safetensors library, in one file or several with an index."""
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    listed = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, path / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": listed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        same = torch.equal(found[name].view(torch.uint8), values.contiguous().view(torch.uint8))
        assert same, name


def edit_header(path: Path, change: Any) -> None:
    """Let `change` alter the header of a safetensors file, in place of what it says."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def write_small_files(path: Path, model: ModelConfig, tokenizer_json: str, dtype: str) -> None:
    """Write what an export of a model trained here has beside its weights."""
    from megatron_vlm.release.hub_files import hub_files

    for name, content in hub_files(model, family_for(model), tokenizer_json, dtype).items():
        (path / name).write_bytes(content)
