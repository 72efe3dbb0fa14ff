"""Bytes that each rank will hold at the fullest moment of a step, by kind.

That moment is in the pipeline: the encoder has run on the rank's pictures and waits with what it
saved, the decoder has as many micro-batches in flight as its schedule allows.

Counted: weights, gradients, optimizer state, saved activations, picture features, logits.
Not counted: temporaries of the operation in hand, communication buffers, the allocator's
fragments, the CUDA context, a second model kept by an objective (a reference), and the fp8 copies
of weights that Transformer Engine makes. Leave about a tenth of the device free for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.planning.activations import (
    Device,
    Share,
    decoder_layer_bytes,
    encoder_bytes,
    head_bytes,
)
from megatron_vlm.planning.schedule import fullest
from megatron_vlm.planning.shapes import Parameters, element_bytes, rank_parameters
from megatron_vlm.planning.vision_limits import encoder_patches, window_features
from megatron_vlm.topology.layout import Layout

_MOMENTS = 2
_FLOAT32 = 4


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say about the data and the routing."""

    picture_tokens: int | None = None
    """Tokens of pictures in a packed row; None takes half of the row (our choice)."""
    sample_tokens: int | None = None
    """Length of a sample in tokens, which sizes context parallelism's mask; None takes a row."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean; 1 is perfect balance."""
    device: Device = "cuda"
    """Where the run will compute: a CPU's norms keep more."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of each rank of one pipeline stage."""

    weights: int
    """In the precision they are computed with."""
    gradients: int
    """float32 in half-precision runs."""
    optimizer: int
    """Two moments, and in half-precision runs a float32 copy of the weights."""
    decoder: int
    """Saved activations of the decoder layers, of all micro-batches in flight."""
    logits: int
    """Final norm, logits and loss of one micro-batch."""
    encoder: int
    """Saved activations of the rank's share of the step's pictures."""
    features: int
    """Encoded pictures, and where tokens are embedded those of its rows with their gradients."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, int]:
        """Bytes by kind, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def picture_tokens(config: RunConfig, assumptions: Assumptions) -> int:
    """Tokens of pictures in a packed row.

    Raises:
        ConfigError: more than the row is long.
    """
    length = config.training.seq_length
    if config.model.vision is None:
        return 0
    if assumptions.picture_tokens is None:
        return length // 2
    if not 0 <= assumptions.picture_tokens <= length:
        raise ConfigError(
            f"--picture-tokens {assumptions.picture_tokens}: a packed row has training.seq_length "
            f"{length} tokens; expected 0 to {length}"
        )
    return assumptions.picture_tokens


def memory_of_stage(
    config: RunConfig, layout: Layout, pp: int, assumptions: Assumptions
) -> RankMemory:
    """What each rank of pipeline stage `pp` holds.

    Raises:
        ConfigError: the assumptions do not fit the configuration.
    """
    standing = standing_memory(config, layout, pp, assumptions)
    encoder = _encoder_bytes(config, layout, assumptions, standing.decoder + standing.logits)
    features = _feature_bytes(config, layout, pp, assumptions)
    return replace(standing, encoder=round(encoder), features=features)


def standing_memory(
    config: RunConfig, layout: Layout, pp: int, assumptions: Assumptions
) -> RankMemory:
    """What each rank of pipeline stage `pp` holds whatever the pictures of a step are.

    Raises:
        ConfigError: the assumptions do not fit the configuration.
    """
    held = rank_parameters(config.model, layout, pp)
    weights, gradients, optimizer = _state_bytes(config, layout, held)
    decoder, logits = _decoder_bytes(config, layout, pp, assumptions)
    return RankMemory(weights, gradients, optimizer, round(decoder), round(logits), 0, 0)


def _state_bytes(config: RunConfig, layout: Layout, held: Parameters) -> tuple[int, int, int]:
    element = element_bytes(config.training.precision)
    trained = trained_parameters(config, held)
    wide = max(_FLOAT32, element)
    state = _MOMENTS * wide + (wide if element < wide else 0)
    if not config.optimizer.use_distributed_optimizer:
        return held.total * element, trained.total * wide, trained.total * state
    expert_copies = layout.world_size // (layout.pp * layout.ep * layout.etp)
    optimizer = (
        _shard(trained.decoder, layout.dp * layout.cp)
        + _shard(trained.experts, expert_copies)
        + _shard(trained.trunk + trained.adapter, layout.world_size)
    )
    return held.total * element, trained.total * wide, optimizer * state


def _shard(count: int, ranks: int) -> int:
    return -(-count // ranks)


def trained_parameters(config: RunConfig, held: Parameters) -> Parameters:
    """Those of `held` that `training.freeze` leaves to be trained."""
    frozen = config.training.freeze
    return Parameters(
        decoder=0 if "language" in frozen else held.decoder,
        experts=0 if "language" in frozen else held.experts,
        trunk=0 if "vision" in frozen else held.trunk,
        adapter=0 if "adapter" in frozen else held.adapter,
    )


def share_of(config: RunConfig, layout: Layout, assumptions: Assumptions) -> Share:
    """One rank's part of a micro-batch of the decoder.

    Raises:
        ConfigError: a sample is assumed to be longer than a row.
    """
    length = config.training.seq_length
    if not 1 <= (assumptions.sample_tokens or length) <= length:
        raise ConfigError(
            f"--sample-tokens {assumptions.sample_tokens}: a packed row has training.seq_length "
            f"{length} tokens, and a sample lies in one row; expected 1 to {length}"
        )
    return Share(
        tokens=config.training.micro_batch_size * length / layout.cp,
        element=element_bytes(config.training.precision),
        tp=layout.tp,
        cp=layout.cp,
        etp=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        expert_imbalance=assumptions.expert_imbalance,
        sample_tokens=float(assumptions.sample_tokens or length),
        device=assumptions.device,
    )


def _decoder_bytes(
    config: RunConfig, layout: Layout, pp: int, assumptions: Assumptions
) -> tuple[float, float]:
    """Layers' bytes with all micro-batches in flight, and the loss's."""
    language, share = config.model.language, share_of(config, layout, assumptions)
    kinds = language.moe_layer_freq
    chunks, extra = [], 0.0
    for chunk in range(layout.num_chunks):
        layers = [
            decoder_layer_bytes(language, bool(kinds[i]), share, config.recompute)
            for i in layout.layers_of(pp, chunk)
        ]
        chunks.append(sum(layer.kept for layer in layers))
        extra = max([extra, *(layer.recomputed for layer in layers)])
        if config.parallel.overlap_moe_expert_parallel_comm:
            # A layer of the next forward pass stands beside each layer of the backward pass.
            extra = max([extra, *(layer.kept for layer in layers)])
    counts = fullest(layout, pp, chunks)
    layers_bytes = sum(count * each for count, each in zip(counts, chunks, strict=True))
    loss = 0.0
    if pp == layout.loss_stage:
        # What predicts further ahead runs beside the loss, once per micro-batch in turn.
        heads = 1 + (language.mtp_num_layers or 0)
        loss = heads * head_bytes(language, share)
        if language.mtp_num_layers:
            ahead = decoder_layer_bytes(language, bool(kinds[-1]), share, config.recompute)
            loss += ahead.kept + ahead.recomputed
            loss += 4 * language.hidden_size * share.split_tokens * share.element
    return layers_bytes + extra, loss


def _encoder_bytes(
    config: RunConfig, layout: Layout, assumptions: Assumptions, besides: float
) -> float:
    vision = config.model.vision
    if vision is None:
        return 0.0
    patches = _encoded_tokens(config, layout, assumptions) * vision.spatial_merge_size**2
    limit = encoder_patches(config, assumptions.device)
    saved = encoder_bytes(
        config.model,
        patches if limit is None else min(patches, limit),
        element_bytes(config.training.precision),
        config.recompute,
        assumptions.device,
        config.training.freeze,
    )
    # The encoder's backward pass comes last: it recomputes where the decoder's were.
    return saved.kept + max(0.0, saved.recomputed - besides)


def _feature_bytes(config: RunConfig, layout: Layout, pp: int, assumptions: Assumptions) -> int:
    if config.model.vision is None:
        return 0
    own = _encoded_tokens(config, layout, assumptions)
    per_row = picture_tokens(config, assumptions)
    micro_batch = config.training.micro_batch_size * per_row / slices(layout)
    held = feature_tokens(config, layout, pp)
    tokens = held(own, micro_batch, micro_batch * layout.num_micro_batches)
    return round(tokens * feature_bytes(config))


def feature_bytes(config: RunConfig) -> int:
    """Of a picture's token on its way into the decoder."""
    return config.model.language.hidden_size * element_bytes(config.training.precision)


def slices(layout: Layout) -> int:
    """Ranks that embed a part each of a micro-batch's tokens."""
    return layout.cp * (layout.tp if layout.sequence_parallel else 1)


def feature_tokens(
    config: RunConfig, layout: Layout, pp: int
) -> Callable[[float, float, float], float]:
    """Finds the features that a rank of a stage holds at most, from its part of a step.

    That is: those that it encodes; and of those that it embeds, the micro-batch with the most, and
    all micro-batches'.
    """
    if pp != layout.embedding_stage:
        return lambda own, most, total: own
    window = config.vision_parallel.exchange_window or layout.num_micro_batches
    limit = window_features(config, layout)
    in_flight = fullest(layout, pp, [1.0] + [0.0] * (layout.num_chunks - 1))[0]

    def held(own: float, most: float, total: float) -> float:
        arrived = window * most if limit is None else min(window * most, limit)
        # The window in use and the one that arrives; and gradients, of those in flight or of all.
        return own + min(2 * total, 2 * arrived + 2 * in_flight * most)

    return held


def _encoded_tokens(config: RunConfig, layout: Layout, assumptions: Assumptions) -> float:
    # The plan spreads a step's pictures evenly over all ranks.
    per_row = picture_tokens(config, assumptions)
    return config.training.global_batch_size * per_row / layout.world_size
