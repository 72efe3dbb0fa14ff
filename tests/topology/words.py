"""Short words for the fields that decide a layout, so that a test reads as one line."""

from __future__ import annotations

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.topology.layout import Layout, resolve_layout
from tests.training_case import RECIPE

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "stages": "parallel.pipeline_model_parallel_layout",
    "sp": "parallel.sequence_parallel",
    "batch_p2p": "parallel.batch_p2p_comm",
    "overlap": "parallel.overlap_moe_expert_parallel_comm",
    "mbs": "training.micro_batch_size",
    "gbs": "training.global_batch_size",
    "seq": "training.seq_length",
    "precision": "training.precision",
    "pad": "data.pad_multiple",
    "layers": "model.language.num_layers",
    "experts": "model.language.num_moe_experts",
    "heads": "model.language.num_attention_heads",
    "groups": "model.language.num_query_groups",
    "vocab": "model.language.vocab_size",
    "longest": "model.language.max_position_embeddings",
    "dispatcher": "model.language.moe_token_dispatcher_type",
    "sharded": "optimizer.use_distributed_optimizer",
    "gather": "optimizer.overlap_param_gather",
    "reduce": "optimizer.overlap_grad_reduce",
    "warmup": "optimizer.lr_warmup_iters",
    "placement": "vision_parallel.placement",
    "group": "vision_parallel.balance_group_size",
    "recompute": "recompute.language",
    "modules": "recompute.language_modules",
}


def config(text: str = "") -> RunConfig:
    """The tests' recipe, eight rows a step, with `short=value` words over it."""
    words = [word.split("=", 1) for word in ("gbs=8", *text.split())]
    return load_recipe(str(RECIPE), [f"{SHORT.get(key, key)}={value}" for key, value in words])


def resolved(text: str = "", world_size: int = 1) -> Layout:
    return resolve_layout(config(text), world_size)
