"""No layout starts that cannot run: each refusal names the field, its value and what would do."""

from __future__ import annotations

import ast
import inspect
import traceback
from typing import NamedTuple

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.topology import layout as layout_module
from tests.topology.words import resolved

pytestmark = pytest.mark.unit


class Refusal(NamedTuple):
    """What is refused, what the message must say, and changes it offers, each of which runs."""

    world_size: int
    text: str
    said: list[str]
    offers: list[str] = []


REFUSALS = {
    "world": Refusal(
        6,
        "tp=2 pp=2 gbs=12",
        [
            "6 processes",
            "tensor_model_parallel_size 2",
            "pipeline_model_parallel_size 2",
            "= 4",
            "multiple of 4",
            "2 or 3 or 6",
        ],
        ["pp=1", "tp=1"],
    ),
    "heads": Refusal(
        3,
        "tp=3 experts=null gbs=9",
        ["tensor_model_parallel_size 3", "num_attention_heads 4", "2 or 4"],
        ["tp=1"],
    ),
    "groups": Refusal(
        4,
        "tp=4 groups=2 experts=null",
        ["tensor_model_parallel_size 4", "num_query_groups 2", "1 or 2"],
        ["tp=2", "tp=1"],
    ),
    "ffn": Refusal(
        2, "tp=2 model.language.ffn_hidden_size=129", ["ffn_hidden_size 129", "1 or 3"], ["tp=1"]
    ),
    "vocab": Refusal(2, "tp=2 vocab=385", ["vocab_size 385", "1 or 5 or 7"], ["tp=1"]),
    "shared": Refusal(
        2,
        "tp=2 model.language.moe_shared_expert_intermediate_size=33",
        ["moe_shared_expert_intermediate_size 33", "1 or 3"],
        ["tp=1"],
    ),
    "sp_without_tp": Refusal(
        1,
        "sp=true",
        ["sequence_parallel true", "tensor_model_parallel_size above 1", "false or null"],
        ["sp=false", "sp=null"],
    ),
    "tp_without_sp": Refusal(
        2,
        "tp=2 sp=false",
        ["sequence_parallel false", "tensor_model_parallel_size 2", "true or null"],
        ["sp=true", "sp=null"],
    ),
    "experts": Refusal(
        3,
        "ep=3 gbs=9",
        ["expert_model_parallel_size 3", "num_moe_experts 8", "1 or 2 or 4"],
        ["ep=1"],
    ),
    "expert_width": Refusal(
        4,
        "tp=4 model.language.moe_ffn_hidden_size=34",
        ["expert_tensor_parallel_size 4", "moe_ffn_hidden_size 34", "2"],
        ["tp=2"],
    ),
    "expert_ranks": Refusal(
        4,
        "ep=8",
        [
            "expert_model_parallel_size 8 x expert_tensor_parallel_size 1",
            "the 4 processes",
            "1 or 2 or 4",
        ],
        ["ep=4", "ep=2"],
    ),
    "narrow_experts": Refusal(
        2,
        "tp=2 etp=1",
        [
            "expert_tensor_parallel_size 1",
            "tensor_model_parallel_size 2",
            "engine fault",
            "2 or null",
        ],
        ["etp=2", "etp=null", "ep=2"],
    ),
    "wide_cut_experts": Refusal(
        2,
        "etp=2",
        [
            "expert_tensor_parallel_size 2",
            "tensor_model_parallel_size 1",
            "engine fault",
            "1 or null",
        ],
        ["etp=1", "etp=null", "tp=2"],
    ),
    "experts_cut_finer": Refusal(
        4,
        "ep=2 etp=2",
        ["expert_tensor_parallel_size 2 exceeds tensor_model_parallel_size 1", "1 or less"],
        ["etp=1", "tp=2"],
    ),
    "dense_ep": Refusal(
        2,
        "ep=2 experts=null",
        ["expert_model_parallel_size 2", "no experts", "expected 1"],
        ["ep=1"],
    ),
    "dense_etp": Refusal(
        2,
        "etp=2 experts=null",
        ["expert_tensor_parallel_size 2", "no experts"],
        ["etp=1", "etp=null"],
    ),
    "vpp_without_pp": Refusal(
        1,
        "vpp=2",
        ["virtual_pipeline_model_parallel_size 2", "pipeline_model_parallel_size above 1", "null"],
        ["vpp=null"],
    ),
    "layers": Refusal(
        3,
        "pp=3 gbs=9",
        [
            "num_layers 4",
            "pipeline_model_parallel_size 3",
            "= 3",
            "2 or 4",
            "pipeline_model_parallel_layout='Ett|t|tL'",
        ],
        ["stages=Ett|t|tL"],
    ),
    "virtual_layers": Refusal(
        2,
        "pp=2 vpp=3",
        ["num_layers 4", "virtual size 3", "= 6", "layout='Et|t|t|t||L'"],
        ["stages=Et|t|t|t||L"],
    ),
    "layout_letters": Refusal(
        2, "pp=2 stages=Ett|tmtL", ["'Ett|tmtL'", "unexpected 'm'", "E (embedding)"]
    ),
    "layout_bomb": Refusal(
        2, "pp=2 stages=E(t)*99999999999|L", ["'E(t)*99999999999|L'", "more than 10000 letters"]
    ),
    "layout_bomb_of_bombs": Refusal(2, "pp=2 stages=E((t)*9999)*9999|L", ["more than 10000"]),
    "layout_layers": Refusal(2, "pp=2 stages=Ett|tL", ["'Ett|tL'", "3 layers", "num_layers 4"]),
    "layout_order": Refusal(2, "pp=2 stages=tEt|ttL", ["'tEt|ttL'", "one E", "one L"]),
    "layout_twice": Refusal(2, "pp=2 stages=EttL|ttL", ["'EttL|ttL'", "one L, after them"]),
    "layout_parts": Refusal(
        2,
        "pp=2 stages=Et|tt|tL",
        ["'Et|tt|tL'", "3 stages", "pipeline_model_parallel_size 2", "1 or 3"],
    ),
    "layout_idle": Refusal(
        3,
        "pp=3 gbs=9 stages=Ett||ttL",
        ["'Ett||ttL'", "pipeline rank 1 nothing to do", "each of the 3 ranks"],
        ["stages=Ett|t|tL", "stages=Et|t|ttL"],
    ),
    "layout_without_pp": Refusal(
        1,
        "stages=Ett|ttL",
        ["'Ett|ttL'", "2 stages", "pipeline_model_parallel_size is 1", "null"],
        ["stages=EttttL", "stages=null"],
    ),
    "layout_vpp": Refusal(
        2,
        "pp=2 vpp=3 stages=Et|t|t|tL",
        ["virtual_pipeline_model_parallel_size 3", "4 stages on 2 ranks, so 2", "null"],
        ["vpp=2", "vpp=null"],
    ),
    "batch_p2p": Refusal(
        2,
        "pp=2 vpp=2 batch_p2p=true",
        ["batch_p2p_comm true", "pipeline_model_parallel_size 2", "engine fault", "false or null"],
        ["batch_p2p=false", "batch_p2p=null"],
    ),
    "batch": Refusal(
        3, "gbs=8", ["global_batch_size 8", "micro_batch_size 1 x 3", "6 or 9"], ["gbs=6", "gbs=9"]
    ),
    "batch_below_one": Refusal(
        4, "gbs=3", ["global_batch_size 3", "nearest that are: 4"], ["gbs=4"]
    ),
    "virtual_batch": Refusal(
        2,
        "pp=2 vpp=2 gbs=5",
        [
            "global_batch_size 5",
            "5 micro-batches",
            "multiple of pipeline_model_parallel_size 2",
            "4 or 6",
        ],
        ["gbs=4", "gbs=6"],
    ),
    "row_padding": Refusal(
        1, "seq=130", ["seq_length 130", "pad_multiple 8", "128 or 136"], ["seq=128", "seq=136"]
    ),
    "row_length": Refusal(
        1,
        "seq=128 longest=64",
        ["seq_length 128", "max_position_embeddings 64"],
        ["seq=64", "longest=128"],
    ),
    "context": Refusal(
        4,
        "cp=4 pad=4",
        ["context_parallel_size 4", "multiple of 8", "it is 4", "1 or 2", "pad_multiple 8"],
        ["cp=2", "cp=1", "pad=8"],
    ),
    "context_odd": Refusal(
        3,
        "cp=3 gbs=9 seq=120",
        ["context_parallel_size 3", "multiple of 6", "it is 8", "set data.pad_multiple 12"],
        ["pad=12"],
    ),
    "sequence_cut": Refusal(
        4,
        "tp=4 seq=130 pad=2 model.language.moe_ffn_hidden_size=32",
        ["sequence_parallel", "130 tokens", "4 parts", "multiple of 4"],
        ["seq=132"],
    ),
    "overlap_ep": Refusal(
        1,
        "overlap=true",
        ["overlap_moe_expert_parallel_comm true", "expert_model_parallel_size above 1"],
    ),
    "overlap_vpp": Refusal(
        4,
        "overlap=true ep=2 pp=2",
        [
            "overlap_moe_expert_parallel_comm true",
            "pipeline_model_parallel_size 2",
            "virtual_pipeline_model_parallel_size",
            "2",
        ],
        ["vpp=2"],
    ),
    "overlap_dispatcher": Refusal(
        2,
        "overlap=true ep=2 dispatcher=allgather",
        ["moe_token_dispatcher_type alltoall"],
        ["dispatcher=alltoall"],
    ),
    "overlap_recompute": Refusal(
        2,
        "overlap=true ep=2 recompute=full",
        ["recompute.language full", "selective or none"],
        ["recompute=selective", "recompute=none"],
    ),
    "overlap_recompute_moe": Refusal(
        2,
        "overlap=true ep=2 recompute=selective modules=[core_attn,moe]",
        ["moe in recompute.language_modules", "remove it"],
        ["modules=[core_attn]"],
    ),
    "fp64": Refusal(
        1,
        "precision=fp64 sharded=true",
        ["precision fp64", "use_distributed_optimizer false", "fp32"],
        ["sharded=false", "precision=fp32"],
    ),
    "gather_plain": Refusal(
        1,
        "gather=true reduce=true",
        ["overlap_param_gather true", "use_distributed_optimizer true"],
        ["sharded=true precision=fp32"],
    ),
    "gather_alone": Refusal(
        1,
        "gather=true sharded=true precision=fp32",
        ["overlap_param_gather true", "overlap_grad_reduce true"],
        ["reduce=true"],
    ),
    "balance_group": Refusal(
        8,
        "pp=2 group=3",
        ["balance_group_size 3", "8 ranks", "2 of a data-parallel replica", "null takes all"],
        ["group=4", "group=null"],
    ),
    "balance_group_of_first_stages": Refusal(
        8,
        "pp=2 group=4 placement=first_stage",
        ["balance_group_size 4", "placement=first_stage"],
        ["group=null", "placement=all_ranks"],
    ),
    "warmup": Refusal(1, "warmup=11", ["lr_warmup_iters 11", "train_iters 10"], ["warmup=10"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_one_line(name: str) -> None:
    case = REFUSALS[name]
    with pytest.raises(ConfigError) as caught:
        resolved(case.text, case.world_size)
    message = str(caught.value)
    assert "\n" not in message
    for part in case.said:
        assert part in message, message


@pytest.mark.parametrize("name", [name for name, case in REFUSALS.items() if case.offers])
def test_what_is_offered_runs(name: str) -> None:
    case = REFUSALS[name]
    for offer in case.offers:
        resolved(f"{case.text} {offer}", case.world_size)


def test_every_check_is_in_the_table() -> None:
    """Each `raise` of the module is met by some refusal."""
    tree = ast.parse(inspect.getsource(layout_module))
    raises = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    met = set()
    for case in REFUSALS.values():
        try:
            resolved(case.text, case.world_size)
        except ConfigError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            met.add((last.lineno, last.end_lineno))
    missed = {line for line in raises if not any(a <= line <= b for a, b in met)}
    assert not missed, f"lines of layout.py: {sorted(missed)}"
