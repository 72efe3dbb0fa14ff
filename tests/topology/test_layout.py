"""The arithmetic of layouts against megatron-core's own: coordinates, stages, defaults."""

from __future__ import annotations

import inspect
import itertools

import pytest

from megatron_vlm.topology.layout import (
    Coordinates,
    Layout,
    divisors,
    nearest,
    parse_stages,
    resolve_layout,
)
from tests.topology.words import config, resolved

pytestmark = pytest.mark.unit


def _bare(world_size: int, tp: int, cp: int, dp: int, pp: int) -> Layout:
    stages = ("Et", *["t"] * (pp - 2), "tL") if pp > 1 else ("EtL",)
    return Layout(world_size, tp, cp, dp, pp, None, 1, tp, False, True, stages, 8)


@pytest.mark.parametrize("world_size", [1, 8, 12, 32])
def test_coordinates_are_the_engines(world_size: int) -> None:
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    count = 0
    for tp, cp, pp in itertools.product(divisors(world_size), repeat=3):
        if world_size % (tp * cp * pp):
            continue
        count += 1
        dp = world_size // (tp * cp * pp)
        layout = _bare(world_size, tp, cp, dp, pp)
        engine = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
        for name in ("tp", "cp", "dp", "pp"):
            for group in engine.get_ranks(name):
                for place, rank in enumerate(group):
                    assert getattr(layout.coordinates(rank), name) == place, (name, rank, layout)
        for rank in range(world_size):
            place = layout.coordinates(rank)
            assert layout.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank
    assert count >= (1 if world_size == 1 else 15)


def test_coordinates_by_hand() -> None:
    layout = _bare(24, tp=2, cp=3, dp=2, pp=2)
    assert layout.coordinates(0) == Coordinates(0, 0, 0, 0)
    assert layout.coordinates(1) == Coordinates(1, 0, 0, 0)
    assert layout.coordinates(2) == Coordinates(0, 1, 0, 0)
    assert layout.coordinates(6) == Coordinates(0, 0, 1, 0)
    assert layout.coordinates(12) == Coordinates(0, 0, 0, 1)
    assert layout.rank(pp=1) == 12 and layout.rank(tp=1, cp=2, dp=1, pp=1) == 23


@pytest.mark.parametrize(
    ("text", "world_size", "stages"),
    [
        ("", 1, ["EttttL"]),
        ("pp=2", 2, ["Ett", "ttL"]),
        ("pp=4", 4, ["Et", "t", "t", "tL"]),
        ("pp=2 vpp=2", 2, ["Et", "t", "t", "tL"]),
        ("pp=2 layers=12 vpp=3", 2, ["Ett", "tt", "tt", "tt", "tt", "ttL"]),
        ("pp=3 stages=Et|tt|tL gbs=9", 3, ["Et", "tt", "tL"]),
        ("pp=3 stages=E|tttt|L gbs=9", 3, ["E", "tttt", "L"]),
        ("pp=2 stages=Et|t|tt|L", 2, ["Et", "t", "tt", "L"]),
        ("pp=2 vpp=2 stages=E|(t|)*2ttL", 2, ["E", "t", "t", "ttL"]),
        ("pp=2 layers=62 stages=Et*15,|(t*16|)*2,t*15,L", 2, ["Et*15", "t*16", "t*16", "t*15L"]),
        ("stages=Et*4L", 1, ["EttttL"]),
    ],
)
def test_stages_and_layers_are_the_engines(
    monkeypatch: pytest.MonkeyPatch, text: str, world_size: int, stages: list[str]
) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = resolved(text, world_size)
    assert layout.stages == tuple(parse_stages("|".join(stages)))
    virtual = len(stages) // layout.pp
    assert layout.vpp == (virtual if virtual > 1 else None) and layout.num_chunks == virtual
    engine = PipelineParallelLayerLayout("|".join(layout.stages), layout.pp)
    monkeypatch.setattr(
        parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: layout.vpp
    )
    seen = []
    for chunk, pp in itertools.product(range(layout.num_chunks), range(layout.pp)):
        expected = engine.get_layer_id_list(LayerType.decoder, vp_stage=chunk, pp_rank=pp)
        assert list(layout.layers_of(pp, chunk)) == expected
        seen += expected
        held = engine.layout[pp][chunk]
        assert (LayerType.embedding in held) == (pp == layout.embedding_stage and chunk == 0)
        last = pp == layout.loss_stage and chunk == layout.num_chunks - 1
        assert (LayerType.loss in held) == last
    assert seen == list(range(config(text).model.language.num_layers))


@pytest.mark.parametrize(
    "text", ["pp=2", "pp=4", "pp=2 vpp=2", "pp=2 vpp=2 layers=8", "pp=4 vpp=2 layers=16"]
)
def test_even_stages_hold_what_the_engine_will_build(text: str) -> None:
    """Without a pipeline layout the engine divides the layers by itself."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_vlm.models.language.engine_config import engine_config

    run = config(text)
    layout = resolve_layout(run, run.parallel.pipeline_model_parallel_size)
    engine = engine_config(run, layout)
    for pp, chunk in itertools.product(range(layout.pp), range(layout.num_chunks)):
        stage = chunk if layout.vpp else None
        first = get_transformer_layer_offset(engine, stage, pp)
        count = get_num_layers_to_build(engine, stage, pp)
        assert layout.layers_of(pp, chunk) == range(first, first + count)


@pytest.mark.parametrize(
    "text", ["Et*3|(tt|)*29,t|L", "E|(t|)*3tt,L", "Et t|(t,t|)*2 tL", "(Et|)*1t*2L", "Et|tL"]
)
def test_notation_is_the_engines(text: str) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    # The engine knows no spaces, which a person may well write.
    engine = PipelineParallelLayerLayout.parse_str_to_list(text.replace(" ", ""))
    expected = ["".join(letters[kind] for kind in stage) for stage in engine]
    assert list(parse_stages(text)) == expected


def test_defaults() -> None:
    dense = "experts=null"
    one = resolved()
    assert (one.tp, one.cp, one.dp, one.pp, one.vpp, one.ep, one.etp) == (1, 1, 1, 1, None, 1, 1)
    assert not one.sequence_parallel and one.num_micro_batches == 8
    # Sequence parallelism: on where the engine cannot do without, else as asked.
    assert resolved("tp=2", 2).sequence_parallel
    assert not resolved(f"tp=2 {dense}", 2).sequence_parallel
    assert resolved(f"tp=2 sp=true {dense}", 2).sequence_parallel
    # Expert tensor size: the tensor size without expert parallelism, else one, or as asked.
    assert resolved("tp=2", 2).etp == 2
    assert resolved("tp=2 ep=2", 2).etp == 1
    assert resolved("tp=2 ep=2 etp=2", 4).etp == 2
    assert resolved("ep=4", 8).dp == 8
    assert resolved("pp=2", 2).batch_p2p_comm
    assert not resolved("pp=2 vpp=2", 2).batch_p2p_comm
    assert not resolved("pp=2 batch_p2p=false", 2).batch_p2p_comm
    assert resolved("pp=4 vpp=2 layers=8 batch_p2p=true", 4).batch_p2p_comm
    assert resolved("mbs=2 tp=2 cp=2", 8).num_micro_batches == 2


def test_description() -> None:
    assert resolved().describe() == "one process"
    assert resolved("", 2).describe() == "DP2"
    assert resolved("tp=2 pp=2 vpp=2 ep=2", 8).describe() == "TP2 PP2 VPP2 EP2 DP2 SP"
    assert resolved("cp=2 tp=2 etp=2 ep=2", 4).describe() == "TP2 CP2 EP2 ETP2 SP"


def test_nearest() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest([1, 2, 3, 4, 6, 12], 5) == "3 or 4 or 6"
    assert nearest([8], 5) == "8" and nearest([], 5) == "none"
