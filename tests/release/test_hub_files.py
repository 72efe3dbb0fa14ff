"""The files beside the weights: released names where the model is a released one."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_tokenizer
from megatron_vlm.models.hf.families import family_for
from megatron_vlm.release.hub_files import HUB, PYTHON_FILES, hub_files

pytestmark = pytest.mark.unit

SIZES: dict[str, Any] = {
    "num_layers": 42,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "ffn_hidden_size": 4224,
}


DECODERS: dict[str, dict[str, Any]] = {
    "dots1": {},
    "deepseek_v3": {"qk_layernorm": False, "kv_lora_rank": 16, "rotary_interleaved": True},
    "qwen2": {"qk_layernorm": False, "add_qkv_bias": True},
}


def _model(
    vision: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    decoder: str = "dots1",
) -> Any:
    language = LanguageConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=384,
        max_position_embeddings=777,
        rotary_base=5.0,
        **DECODERS[decoder],
    )
    return ModelConfig.model_validate(
        {"vision": SIZES | (vision or {}), "adapter": adapter or {}, "language": language}
    )


def _files(model: ModelConfig) -> dict[str, Any]:
    content = hub_files(model, family_for(model), byte_tokenizer().to_json(), "bfloat16")
    return {
        name: json.loads(value) if name.endswith(".json") else value.decode()
        for name, value in content.items()
    }


@pytest.mark.parametrize(
    "decoder, changes, model_type, architecture",
    [
        ("dots1", {}, "megatron_vlm", "MegatronVlmForConditionalGeneration"),
        ("deepseek_v3", {}, "dots_vlm", "DotsVLMForCausalLM"),
        ("qwen2", {}, "dots_ocr", "DotsOCRForCausalLM"),
        (
            "deepseek_v3",
            {"vision": {"gated_linear_unit": False}},
            "megatron_vlm",
            "MegatronVlmDeepseekV3ForConditionalGeneration",
        ),
        (
            "qwen2",
            {"adapter": {"merge": "average"}},
            "megatron_vlm",
            "MegatronVlmQwen2ForConditionalGeneration",
        ),
    ],
)
def test_classes(decoder: str, changes: Any, model_type: str, architecture: str) -> None:
    config = _files(_model(**changes, decoder=decoder))["config.json"]
    assert (config["model_type"], config["architectures"]) == (model_type, [architecture])
    defined = {
        f"{Path(name).stem}.{node.name}"
        for name in PYTHON_FILES
        for node in ast.parse((HUB / name).read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert set(config["auto_map"].values()) <= defined
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith(f".{architecture}")


@pytest.mark.parametrize(
    "vision, adapter",
    [
        ({"gated_linear_unit": False}, {}),
        ({"qk_layernorm": True}, {}),
        ({"rotary_base": 1e6}, {}),
        ({"in_channels": 1}, {}),
        ({}, {"merge": "average"}),
        ({}, {"hidden_size": 64}),
        ({}, {"layernorm_epsilon": 1e-5}),
    ],
)
def test_departures_from_the_released_encoder(vision: Any, adapter: Any) -> None:
    for sizes in ({}, {"hidden_size": 48, "num_layers": 1}):
        assert family_for(_model(sizes, decoder="qwen2")).model_type == "dots_ocr"
    assert family_for(_model(vision, adapter, "qwen2")).model_type == "megatron_vlm"


def test_config() -> None:
    """Fields that SGLang's and vLLM's configurations of dots.vlm1 and dots.ocr read."""
    config = _files(_model(decoder="deepseek_v3"))["config.json"]
    assert config["rope_theta"] == 5.0 and config["dtype"] == "bfloat16"
    ids = byte_tokenizer().special_ids
    assert (config["image_token_id"], config["video_token_id"]) == (ids.image, None)
    assert (config["eos_token_id"], config["pad_token_id"]) == (ids.eos, ids.pad)
    assert config["bos_token_id"] is None
    expected = {
        "embed_dim": 1536,
        "hidden_size": 64,
        "intermediate_size": 4224,
        "num_hidden_layers": 42,
        "num_attention_heads": 12,
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
    assert config["vision_config"] == expected
    options = {"vision": {"qk_layernorm": True}, "adapter": {"merge": "average", "hidden_size": 9}}
    own = {"qk_layernorm": True, "merge": "average", "merger_hidden_size": 9}
    assert _files(_model(**options))["config.json"]["vision_config"] == expected | own


def test_pictures_and_tokens() -> None:
    files = _files(_model({"min_pixels": 784, "max_pixels": 50176}))
    pictures = files["preprocessor_config.json"]
    published = VisionConfig(**SIZES)
    assert pictures["image_mean"] == list(published.image_mean)
    assert pictures["image_std"] == list(published.image_std)
    sizes = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size")
    assert [pictures[name] for name in sizes] == [784, 50176, 14, 1, 2]
    assert files["processor_config.json"]["image_token"] == "<|image|>"
    ids = byte_tokenizer().special_ids
    assert files["generation_config.json"]["eos_token_id"] == [ids.eos, ids.end]
    tokens = files["tokenizer_config.json"]
    assert (tokens["pad_token"], tokens["eos_token"]) == ("<|pad|>", "<|eos|>")
    assert tokens["extra_special_tokens"]["image_token"] == "<|image|>"
    assert tokens["model_max_length"] == 777
    again = Tokenizer.from_json(json.dumps(files["tokenizer.json"]))
    assert again.special_ids == ids
    for token in set(SPECIAL_TOKENS.values()) - {"<|pad|>"}:
        role = token.strip("<|>")
        roles = "['system', 'user', 'assistant']" in files["chat_template.jinja"]
        assert token in files["chat_template.jinja"] or (roles and role in SPECIAL_TOKENS)


def test_text_alone() -> None:
    files = _files(_model().model_copy(update={"vision": None}))
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    config = files["config.json"]
    assert (config["model_type"], config["architectures"]) == ("dots1", ["Dots1ForCausalLM"])
    assert not config.keys() & {"auto_map", "image_token_id", "vision_config"}


def test_python_files_need_transformers_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "numpy", "PIL"}
    assert {path.name for path in HUB.glob("*.py")} == set(PYTHON_FILES)
    for name in PYTHON_FILES:
        for node in ast.walk(ast.parse((HUB / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in PYTHON_FILES
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and node.module.split(".")[0] in allowed, name
