"""The layouts whose training must equal one process: a name, processes, overrides."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """One row of the equality table."""

    world_size: int
    overrides: tuple[str, ...]
    quick: bool
    """Whether `make test` runs it in float64; `make test-all` runs every one."""
    quick_fp32: bool = False
    """Whether `make test` runs its float32 comparison of the two optimizers."""


def _layout(
    world_size: int,
    *extra: str,
    quick: bool = False,
    fp32: bool = False,
    **sizes: int | str | bool,
) -> Layout:
    names = {
        "tp": "parallel.tensor_model_parallel_size",
        "pp": "parallel.pipeline_model_parallel_size",
        "vpp": "parallel.virtual_pipeline_model_parallel_size",
        "cp": "parallel.context_parallel_size",
        "ep": "parallel.expert_model_parallel_size",
        "etp": "parallel.expert_tensor_parallel_size",
        "stages": "parallel.pipeline_model_parallel_layout",
        "overlap": "parallel.overlap_moe_expert_parallel_comm",
        "sp": "parallel.sequence_parallel",
        "mbs": "training.micro_batch_size",
    }
    words = [
        f"{names[key]}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in sizes.items()
    ]
    return Layout(world_size, (*words, *extra), quick, fp32)


DENSE = "model.language.num_moe_experts=null"
TIED = "model.language.share_embeddings_and_output_weights=true"

# DeepSeek-V3's traits: latent attention with YaRN, groups of experts, one more token predicted.
DEEPSEEK = (
    "model.language.kv_lora_rank=16",
    "model.language.q_lora_rank=24",
    "model.language.qk_head_dim=16",
    "model.language.qk_pos_emb_head_dim=8",
    "model.language.v_head_dim=12",
    "model.language.rotary_interleaved=true",
    "model.language.rope_scaling={type: yarn, factor: 8, original_max_position_embeddings: 32, "
    "mscale: 1, mscale_all_dim: 0.7}",
    "model.language.moe_router_num_groups=4",
    "model.language.moe_router_group_topk=2",
    "model.language.mtp_num_layers=1",
    "model.language.mtp_loss_scaling_factor=0.3",
)

# The quick ones are chosen so that every two of TP+SP, PP, VPP, uneven stages, CP, EP, expert TP,
# DP, overlap and micro-batch size 2 that can run together meet in at least one of them.
LAYOUTS: dict[str, Layout] = {
    "tp2_dense": _layout(2, DENSE, tp=2, quick=True),
    "tp2_sp": _layout(2, tp=2),
    "pp2": _layout(2, pp=2),
    "pp2_vpp2": _layout(2, pp=2, vpp=2),
    "pp4": _layout(4, pp=4),
    "pp3_uneven": _layout(3, pp=3, stages="Et|tt|tL", quick=True),
    "pp2_vpp2_uneven": _layout(2, pp=2, vpp=2, stages="Et|t|tt|L"),
    "ep2": _layout(2, ep=2),
    "ep4": _layout(4, ep=4),
    "ep2_etp2": _layout(4, tp=2, ep=2, etp=2),
    "cp2": _layout(2, cp=2),
    "dp2": _layout(2, quick=True, fp32=True),
    "dp4": _layout(4),
    "mbs2": _layout(1, mbs=2),
    "dp2_mbs2": _layout(2, mbs=2),
    "tp2_pp2_ep2": _layout(8, tp=2, pp=2, ep=2, quick=True),
    "pp2_vpp2_ep2": _layout(4, pp=2, vpp=2, ep=2),
    "pp2_vpp2_ep2_overlap": _layout(4, pp=2, vpp=2, ep=2, overlap=True, quick=True, fp32=True),
    "ep2_overlap": _layout(2, ep=2, overlap=True),
    "pp2_cp2_ep2": _layout(8, pp=2, cp=2, ep=2, quick=True),
    # Beyond the table: the pairs that it leaves out.
    "tp2_cp2_etp2_ep2": _layout(8, tp=2, cp=2, ep=2, etp=2, quick=True),
    "tp2_pp2_vpp2_mbs2": _layout(4, tp=2, pp=2, vpp=2, mbs=2, quick=True),
    "cp2_pp2_vpp2_uneven": _layout(4, cp=2, pp=2, vpp=2, stages="Et|t|tt|L", mbs=2, quick=True),
    "tp2_pp2_vpp2_uneven_ep2_overlap": _layout(
        4, tp=2, pp=2, vpp=2, ep=2, overlap=True, stages="Et|t|tt|L", mbs=2
    ),
    "dp2_pp2_mbs2_cp2": _layout(8, pp=2, cp=2, mbs=2),
    # One expert a rank: the combined schedule hands it its input without a copy.
    "ep4_overlap_one_expert": _layout(
        4, "model.language.num_moe_experts=4", ep=4, overlap=True, quick=True
    ),
    # One matrix for the first and the last stage, which holds its own copy of it.
    "tied_dp2_pp2": _layout(4, TIED, pp=2, quick=True),
    "tied_tp2_pp2_vpp2": _layout(4, TIED, tp=2, pp=2, vpp=2),
    "deepseek_tp2_dense": _layout(2, *DEEPSEEK, DENSE, tp=2, quick=True),
    "deepseek_tp2_sp": _layout(2, *DEEPSEEK, tp=2),
    "deepseek_pp2": _layout(2, *DEEPSEEK, pp=2),
    "deepseek_cp2": _layout(2, *DEEPSEEK, cp=2),
    "deepseek_ep2_mbs2": _layout(2, *DEEPSEEK, ep=2, mbs=2),
    "deepseek_tp2_pp2_ep2": _layout(8, *DEEPSEEK, tp=2, pp=2, ep=2),
    "deepseek_pp2_vpp2_ep2_overlap": _layout(
        4, *DEEPSEEK, pp=2, vpp=2, ep=2, overlap=True, stages="Et|t|tt|L", quick=True
    ),
    "deepseek_dp2_pp2_cp2": _layout(8, *DEEPSEEK, pp=2, cp=2),
    # Positions of pictures' tokens in three dimensions, which each rank finds for its part.
    "mrope_tp2_cp2": _layout(4, "model.language.mrope_section=[2,3,3]", tp=2, cp=2, quick=True),
    "mrope_deepseek_cp2_pp2_vpp2": _layout(
        4, *DEEPSEEK, "model.language.mrope_section=[2,1,1]", cp=2, pp=2, vpp=2, quick=True
    ),
    "mrope_ep2_overlap_mbs2": _layout(
        2,
        "model.language.mrope_section=[4,2,2]",
        "model.language.mrope_interleaved=true",
        ep=2,
        overlap=True,
        mbs=2,
    ),
}
