"""The table of our tensors against models really built, and the families' tables against it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.config.load import load_model
from megatron_vlm.models.hf.families import FAMILIES, family_for, read_model
from megatron_vlm.models.hf.names import translate
from megatron_vlm.models.hf.tensors import model_tensors
from megatron_vlm.planning.shapes import model_parameters
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.release.folders import CONFIGS
from tests.training_case import RECIPE

DENSE = "model.language.num_moe_experts=null"
PUBLISHED = ("dots-llm1", "dots-vlm-142b", "deepseek-v3", "dots-vlm1", "dots-ocr", "seed-vlm")
CASES = {
    "nano": (),
    "dense": (DENSE, "model.language.num_query_groups=2", "model.language.kv_channels=24"),
    "tied": (DENSE, "model.language.share_embeddings_and_output_weights=true"),
    "plain": ("model.vision=null", "model.language.qk_layernorm=false"),
    "no_shared": ("model.language.moe_shared_expert_intermediate_size=null",),
    "experts_everywhere": ("model.language.first_k_dense_replace=0",),
    "latent": ("model=deepseek-v3-twin",),
    "latent_queries_whole": ("model=deepseek-v3-twin", "model.language.q_lora_rank=null"),
    "latent_dense": ("model=deepseek-v3-twin", DENSE),
    "dots_vlm1": ("model=dots-vlm1-twin",),
    "dots_ocr": ("model=dots-ocr-twin",),
    "seed_vit": ("model=seed-vlm-twin",),
    "normalised_encoder": ("model.vision.qk_layernorm=true", "model.adapter.hidden_size=20"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_the_built_model(case: str) -> None:
    config = load_recipe(str(RECIPE), list(CASES[case]))
    (built,) = run_ranks(1, _build, config)
    assert built == {name: tuple(shape) for name, shape in model_tensors(config.model).items()}


def _build(world: World, config: RunConfig) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology

    topology = build_topology(resolve_layout(config, 1), start_distributed(world))
    shapes: dict[str, Any] = {}
    for entry in build_model(config, topology).sharded_state_dict().values():
        pieces = nested_values(entry.build()) if hasattr(entry, "build") else [entry]
        shapes |= {piece.key: tuple(piece.global_shape) for piece in pieces}
    stop()
    return shapes


@pytest.mark.unit
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_planned_whole(name: str) -> None:
    """In a moment, every parameter and the expert biases, which are none."""
    model = load_model(name)
    translation = translate(model, family_for(model).names)
    experts, ahead = model.language.num_moe_experts or 0, model.language.mtp_num_layers or 0
    biases = experts * (sum(model.language.moe_layer_freq) + ahead)
    total = sum(math.prod(shape) for shape in translation.ours.values())
    assert total == model_parameters(model).total + biases
    assert total == sum(math.prod(shape) for shape in translation.theirs.values())


@pytest.mark.unit
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_come_back(name: str) -> None:
    family, model = read_model(dict(CONFIGS[name]), "config.json")
    assert family_for(model) is family
    written = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **family.write(model),
    }
    assert read_model(written, "config.json") == (family, model)


@pytest.mark.unit
def test_every_family_is_tried() -> None:
    tried = [read_model(dict(config), "config.json")[0] for config in CONFIGS.values()]
    assert {family.architecture for family in tried} == {f.architecture for f in FAMILIES}
