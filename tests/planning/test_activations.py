"""The planned bytes of saved activations against those that autograd saves.

Rows are of one or few long segments, so that attention is the fused kernel's.
"""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.config import ModelConfig, RecomputeConfig, RunConfig, load_recipe
from megatron_vlm.planning.activations import (
    decoder_layer_bytes,
    encoder_block_bytes,
    encoder_bytes,
    head_bytes,
)
from megatron_vlm.planning.memory import Assumptions, share_of
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.parallel.layouts import DEEPSEEK
from tests.planning.saved import decoder_layers, saved_bytes
from tests.ranks import run_ranks
from tests.training_case import RECIPE

TOLERANCE = 0.15
TOKENS = 512

TP2 = "parallel.tensor_model_parallel_size=2"
WIDE_LATENT = (
    "model.language.qk_head_dim=48",
    "model.language.qk_pos_emb_head_dim=16",
    "model.language.v_head_dim=48",
)
EP2 = "parallel.expert_model_parallel_size=2"
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "fp32": (),
        "fp64": ("training.precision=fp64",),
        "grouped_queries": ("model.language.num_query_groups=2",),
        "no_qk_norm": ("model.language.qk_layernorm=false",),
        "no_shared_experts": ("model.language.moe_shared_expert_intermediate_size=null",),
        "wide": ("model.language.ffn_hidden_size=512", "model.language.moe_ffn_hidden_size=128"),
        "core_attn": ("recompute.language=selective",),
        "mlp_and_moe": (
            "recompute.language=selective",
            "recompute.language_modules=[mlp,moe]",
        ),
        "moe_act": ("recompute.language=selective", "recompute.language_modules=[moe_act]"),
        "layernorm": ("recompute.language=selective", "recompute.language_modules=[layernorm]"),
        "deepseek": DEEPSEEK,
        "deepseek_wide": (*DEEPSEEK, *WIDE_LATENT),
        "deepseek_full_queries": (*DEEPSEEK, "model.language.q_lora_rank=null"),
        "deepseek_core_attn": (*DEEPSEEK, "recompute.language=selective"),
    },
    2: {
        "tp2": (TP2,),
        "tp2_ep2": (TP2, EP2),
        "ep2": (EP2,),
        "ep2_allgather": (EP2, "model.language.moe_token_dispatcher_type=allgather"),
        "cp2": ("parallel.context_parallel_size=2",),
        "cp2_core_attn": ("parallel.context_parallel_size=2", "recompute.language=selective"),
        "deepseek_tp2": (*DEEPSEEK, TP2),
        "deepseek_cp2": (*DEEPSEEK, "parallel.context_parallel_size=2"),
    },
    4: {"tp2_ep2_etp2": (TP2, EP2, "parallel.expert_tensor_parallel_size=2")},
}


def _config(*overrides: str) -> RunConfig:
    return load_recipe(
        str(RECIPE), ["training.precision=fp32", f"training.seq_length={TOKENS}", *overrides]
    )


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", CASES)
def test_decoder_layers(world_size: int) -> None:
    configs = {name: _config(*overrides) for name, overrides in CASES[world_size].items()}
    found = run_ranks(world_size, decoder_layers, [(c, [TOKENS]) for c in configs.values()])[0]
    for (name, config), sizes in zip(configs.items(), found, strict=True):
        layout = resolve_layout(config, world_size)
        share = share_of(config, layout, Assumptions(device="cpu"))
        assert len(sizes) == 4
        for has_experts, size in zip(config.model.language.moe_layer_freq, sizes, strict=True):
            planned = decoder_layer_bytes(
                config.model.language, bool(has_experts), share, config.recompute
            )
            assert planned.kept == pytest.approx(size, rel=TOLERANCE), (name, has_experts)


@pytest.mark.gpu
def test_decoder_layers_on_a_gpu() -> None:
    config = _config("training.precision=bf16", "model.language.moe_ffn_hidden_size=128")
    sizes = run_ranks(1, decoder_layers, [(config, [TOKENS])])[0][0]
    share = share_of(config, resolve_layout(config, 1), Assumptions(device="cuda"))
    for has_experts, size in zip(config.model.language.moe_layer_freq, sizes, strict=True):
        planned = decoder_layer_bytes(
            config.model.language, bool(has_experts), share, config.recompute
        )
        assert planned.kept == pytest.approx(size, rel=TOLERANCE), has_experts


@pytest.mark.unit
@pytest.mark.parametrize("overrides", [(), ("recompute.language_modules=[mlp,moe]",)])
def test_recompute_drops_what_it_computes_again(overrides: tuple[str, ...]) -> None:
    full = _config("recompute.language=full")
    selective = _config("recompute.language=selective", *overrides)
    none = _config()
    share = share_of(none, resolve_layout(none, 1), Assumptions())
    language = none.model.language
    for has_experts in (False, True):
        everything, some, least = (
            decoder_layer_bytes(language, has_experts, share, config.recompute)
            for config in (none, selective, full)
        )
        assert everything.kept > some.kept > least.kept
        assert least.kept == TOKENS * language.hidden_size * 4
        assert least.kept + least.recomputed == everything.kept
        assert 0 < some.recomputed <= everything.kept - some.kept


def _encoder_saves(config: RunConfig, grid: torch.Tensor) -> int:
    from megatron_vlm.models.vision.encoder import VisionEncoder

    model, frozen = config.model, config.training.freeze
    assert model.vision is not None
    encoder = VisionEncoder(
        model.vision, model.adapter, model.language.hidden_size, config.recompute.vision
    )
    encoder.trunk.requires_grad_("vision" not in frozen)
    encoder.adapter.requires_grad_("adapter" not in frozen)
    pixels = torch.zeros(int(grid.prod(dim=1).sum()), model.vision.in_channels * 14**2)
    return saved_bytes(lambda: encoder(pixels, grid), encoder.parameters())


SEED = ("model.vision.gated_linear_unit=false", "model.adapter.merge=average")
QK_NORM = ("model.vision.qk_layernorm=true",)
OPTIONS: tuple[tuple[str, ...], ...] = ((), SEED, QK_NORM)


@pytest.mark.unit
@pytest.mark.parametrize("options", [(), SEED, QK_NORM, ("model.adapter.hidden_size=512",)])
@pytest.mark.parametrize(
    "overrides",
    [
        "recompute.vision=none",
        "recompute.vision=selective",
        "recompute.vision=full",
        "training.freeze=[vision]",
        "training.freeze=[vision,adapter]",
    ],
)
def test_encoder(overrides: str, options: tuple[str, ...]) -> None:
    config, grid = _config(overrides, *options), torch.tensor([[16, 20], [12, 18]])
    patches = 16 * 20 + 12 * 18
    planned = encoder_bytes(
        config.model, patches, 4, config.recompute, "cpu", config.training.freeze
    )
    assert planned.kept == pytest.approx(_encoder_saves(config, grid), rel=TOLERANCE)


@pytest.mark.unit
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_encoder_block(recompute: str, options: tuple[str, ...]) -> None:
    grid = torch.tensor([[20, 24]])
    two, three = (
        _config(f"recompute.vision={recompute}", f"model.vision.num_layers={layers}", *options)
        for layers in (2, 3)
    )
    one_more = _encoder_saves(three, grid) - _encoder_saves(two, grid)
    assert two.model.vision is not None
    planned = encoder_block_bytes(two.model.vision, 20 * 24, 4, two.recompute, "cpu")
    assert planned.kept == pytest.approx(one_more, rel=TOLERANCE)


def _part_saves(world: World, configs: list[RunConfig]) -> list[int]:
    """Bytes that each configuration's encoder keeps of a picture's part on this rank."""
    import torch.distributed as dist

    from megatron_vlm.models.vision.encoder import VisionEncoder
    from megatron_vlm.models.vision.sharing import Part, SharedPictures

    start_distributed(world)
    mine = (160, 320)[world.rank]
    group, part = dist.group.WORLD, Part(0, 0, (0, 1), (160, 320), world.rank)
    assert group is not None
    sharing, grid = SharedPictures((part,), group), torch.tensor([[20, 24]])
    sizes = []
    for config in configs:
        model = config.model
        assert model.vision is not None
        encoder = VisionEncoder(
            model.vision, model.adapter, model.language.hidden_size, config.recompute.vision
        )
        pixels = torch.zeros(mine, model.vision.in_channels * 14**2)

        def forward(encoder: VisionEncoder = encoder, pixels: torch.Tensor = pixels) -> object:
            return encoder(pixels, grid, sharing)

        sizes.append(saved_bytes(forward, encoder.parameters()))
    stop()
    return sizes


@pytest.mark.distributed
def test_encoder_with_a_part_of_a_picture() -> None:
    """The bytes of a third block, to the byte: what is gathered is but a small part of them."""
    pairs = [
        (recompute, options) for recompute in ("none", "selective", "full") for options in OPTIONS
    ]
    configs = [
        _config(f"recompute.vision={recompute}", f"model.vision.num_layers={layers}", *options)
        for recompute, options in pairs
        for layers in (2, 3)
    ]
    for mine, sizes in zip((160, 320), run_ranks(2, _part_saves, configs), strict=True):
        for number, config in enumerate(configs[1::2]):
            one_more = sizes[2 * number + 1] - sizes[2 * number]
            vision = config.model.vision
            assert vision is not None
            saved = encoder_block_bytes(vision, mine, 4, config.recompute, "cpu", 480 - mine)
            assert saved.kept == one_more, pairs[number]


def _loss_peak(world: object, tokens: int, vocabulary: int) -> int:
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from megatron_vlm.ops.log_probs import token_log_probs
    from megatron_vlm.platform import start_distributed, stop

    start_distributed(world)  # type: ignore[arg-type]
    hidden = torch.randn(tokens, 8)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # The schedule, too, lets go of the logits once the loss is known.
        value = token_log_probs(hidden @ weight.t(), targets, dist.group.WORLD).sum()
        value.backward()
    stop()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.distributed
def test_logits_and_their_loss() -> None:
    tokens, vocabulary = 256, 4096
    most = run_ranks(1, _loss_peak, tokens, vocabulary)[0]
    config = _config(
        f"model.language.vocab_size={vocabulary}",
        f"training.seq_length={tokens}",
        "model.language.hidden_size=8",
        "model.language.kv_channels=16",
    )
    share = share_of(config, resolve_layout(config, 1), Assumptions())
    assert head_bytes(config.model.language, share) == pytest.approx(most, rel=TOLERANCE)


@pytest.mark.unit
def test_text_alone_has_no_encoder() -> None:
    model = ModelConfig(language=_config().model.language)
    assert encoder_bytes(model, 1000, 2, RecomputeConfig()).kept == 0
