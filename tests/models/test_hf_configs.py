"""config.json as servers read it: the fields they need, and no trait that they would pass over."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_vlm.config.model_schema import RopeScalingConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.families import family_for, read_model
from tests.release.folders import CONFIGS

pytestmark = pytest.mark.unit

# `config.NAME` in vLLM's models/dots1.py and SGLang's of the same name.
DOTS1_READS = (
    "attention_bias first_k_dense_replace head_dim hidden_act hidden_size intermediate_size "
    "max_position_embeddings moe_intermediate_size moe_layer_freq n_group n_routed_experts "
    "n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers "
    "num_key_value_heads rms_norm_eps routed_scaling_factor scoring_func tie_word_embeddings "
    "topk_group topk_method vocab_size"
).split()
# In their code of DeepSeek-V3, which dots.vlm1 runs on too.
DEEPSEEK_READS = (
    "first_k_dense_replace hidden_act hidden_size intermediate_size kv_lora_rank "
    "max_position_embeddings moe_intermediate_size moe_layer_freq n_group n_routed_experts "
    "n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers "
    "num_nextn_predict_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps "
    "rope_scaling rope_theta routed_scaling_factor scoring_func topk_group topk_method v_head_dim "
    "vocab_size"
).split()


def _written(name: str, **changes: Any) -> dict[str, Any]:
    family, model = read_model(dict(CONFIGS[name]) | changes, "config.json")
    return family.write(model)


@pytest.mark.parametrize("name", ["dots1", "megatron_vlm"])
def test_what_servers_read_of_dots1(name: str) -> None:
    from transformers import Dots1Config

    # Early files of dots.llm1 have this name there, which vLLM would refuse.
    written = _written(name, scoring_func="noaux_tc")
    assert written["scoring_func"] == "sigmoid" and written["topk_method"] == "noaux_tc"
    written.pop("vision_config", None)
    # vLLM reads by way of this class, which lacks some of the fields and keeps what is there.
    config = Dots1Config(**written)
    assert [field for field in DOTS1_READS if not hasattr(config, field)] == []


@pytest.mark.parametrize("name", ["deepseek_v3", "dots_vlm", "megatron_vlm_deepseek_v3"])
def test_what_servers_read_of_deepseek(name: str) -> None:
    written = _written(name)
    assert [field for field in DEEPSEEK_READS if field not in written] == []
    assert written["scoring_func"] == "sigmoid"


YARN = CONFIGS["dots_vlm"]["rope_scaling"]
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"rope_scaling": None}, True),
        ({"rope_scaling": YARN | {"mscale": None, "mscale_all_dim": None}}, True),
        ({"rope_interleave": False}, False),
        ({"rope_scaling": LINEAR}, False),
        ({"rope_scaling": YARN | {"mscale": None}}, False),
        ({"rope_scaling": YARN | {"mscale_all_dim": None}}, False),
    ],
)
def test_dots_vlm_is_what_sglang_computes(changes: dict[str, Any], served: bool) -> None:
    """Any other rotary embedding is exported as a class that no server takes for dots.vlm1."""
    family, model = read_model(dict(CONFIGS["dots_vlm"]) | changes, "config.json")
    assert family.model_type == "dots_vlm"
    found = family_for(model)
    assert found.model_type == ("dots_vlm" if served else "megatron_vlm")
    assert found.decoder == "deepseek_v3"
    again = {
        "model_type": found.model_type,
        "architectures": [found.architecture],
        **found.write(model),
    }
    read = read_model(again, "config.json")[1]
    assert read.model_copy(update={"name": model.name}) == model


@pytest.mark.parametrize("field", ["mscale", "mscale_all_dim"])
def test_temperatures_are_yarns(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} is 0.7; expected null unless type is yarn"):
        RopeScalingConfig.model_validate({**LINEAR, field: 0.7})
    with pytest.raises(ConversionError, match=rf"rope_scaling: {field} \(value 0.7\)"):
        read_model(
            dict(CONFIGS["deepseek_v3"]) | {"rope_scaling": {**LINEAR, field: 0.7}}, "config.json"
        )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"num_attention_heads": 0}, "num_attention_heads is 0; expected 1 or more"),
        ("qwen2", {"rope_theta": 10**400}, "rope_theta is 1000.*; expected a number that a float"),
        ("qwen2", {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; expected a number that"),
        ("dots1", {"routed_scaling_factor": float("-inf")}, "scaling_factor is -Infinity; expect"),
        ("deepseek_v3", {"n_group": -4, "topk_group": -1}, "n_group is -4; expected 1 or more"),
        ("deepseek_v3", {"n_group": 1, "topk_group": 0}, "topk_group is 0; expected 1 or more"),
        ("deepseek_v3", {"n_group": None}, "n_group is null; expected a whole number"),
        ("dots1", {"layer_types": ["sliding_attention"] * 3}, '"full_attention" 3 times'),
        ("dots1", {"layer_types": "full"}, '"full_attention" 3 times'),
        (
            "dots1",
            {"layer_types": ["full_attention"], "num_hidden_layers": 10**15},
            '"full_attention" 1000000000000000 times',
        ),
    ],
)
def test_numbers_that_make_no_model(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=rf"config\.json: .*{message}"):
        read_model(dict(CONFIGS[name]) | changes, "config.json")


def test_no_groups_of_experts() -> None:
    """dots.llm1 has none, whether a file says 1, null or nothing."""
    models = [
        read_model(dict(CONFIGS["dots1"]) | groups, "config.json")[1]
        for groups in ({}, {"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": 1})
    ]
    assert models[0] == models[1] == models[2]
    assert models[0].language.moe_router_num_groups is None


@pytest.mark.parametrize("name", ["dots1", "deepseek_v3", "dots_vlm", "dots_ocr"])
def test_no_family_has_multimodal_rotary(name: str) -> None:
    """Not even our own classes: their decoders are transformers'."""
    _, model = read_model(dict(CONFIGS[name]), "config.json")
    pairs = model.language.rotary_channels // 2
    language = model.language.model_copy(update={"mrope_section": (pairs - 2, 1, 1)})
    with pytest.raises(ConversionError, match="model.language.mrope_section is "):
        family_for(model.model_copy(update={"language": language}))
