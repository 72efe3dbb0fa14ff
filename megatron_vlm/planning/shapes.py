"""Parameter counts of both towers from their configuration: whole, active, and for each rank.

The same shapes as `models/` builds, written down a second time on purpose: planning must answer
without torch, and the tests hold the two against each other, rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.topology.layout import Layout


def element_bytes(precision: str) -> int:
    """Bytes of a weight while it is computed with (fp8 runs keep bf16 weights)."""
    return {"fp64": 8, "fp32": 4}.get(precision, 2)


@dataclass(frozen=True)
class Parameters:
    """A number of parameters, by the ranks that hold copies of them.

    Copies decide which ranks reduce gradients together, and so over how many ranks a distributed
    optimizer may spread its state.
    """

    decoder: int = 0
    """The decoder without its routed experts: copied over data x context parallel ranks."""
    experts: int = 0
    """Routed experts: copied over expert data parallel ranks."""
    trunk: int = 0
    """The picture encoder: copied on every rank."""
    adapter: int = 0
    """The MLP between the towers: copied on every rank."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.decoder + self.experts + self.trunk + self.adapter

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )


def model_parameters(model: ModelConfig, prediction: bool = True) -> Parameters:
    """The whole model, each parameter counted once.

    Args:
        model: its shape.
        prediction: whether to count multi-token prediction: published sizes leave it out.
    """
    language = model.language
    layers = [layer_parameters(language, bool(kind)) for kind in language.moe_layer_freq]
    tied = language.share_embeddings_and_output_weights
    tables = language.vocab_size * language.hidden_size * (1 if tied else 2)
    total = sum(layers, Parameters(decoder=tables + language.hidden_size))
    if prediction:
        total += prediction_parameters(language)
    return total + encoder_parameters(model)


def active_parameters(language: LanguageConfig) -> int:
    """Decoder parameters that one token passes through, both embeddings included.

    Without multi-token prediction, which no answer needs.
    """
    whole = model_parameters(ModelConfig(language=language), prediction=False)
    if language.num_moe_experts is None:
        return whole.total
    return whole.decoder + whole.experts * language.moe_router_topk // language.num_moe_experts


def rank_parameters(model: ModelConfig, layout: Layout, pp: int) -> Parameters:
    """What each rank of pipeline stage `pp` holds: its chunks of the decoder, the whole encoder."""
    chunks = [chunk_parameters(model.language, layout, pp, i) for i in range(layout.num_chunks)]
    return sum(chunks, encoder_parameters(model))


def chunk_parameters(language: LanguageConfig, layout: Layout, pp: int, chunk: int) -> Parameters:
    """One rank's part of chunk `chunk` of pipeline stage `pp`."""
    kinds = language.moe_layer_freq
    layers = [
        layer_parameters(language, bool(kinds[i]), tp=layout.tp, ep=layout.ep, etp=layout.etp)
        for i in layout.layers_of(pp, chunk)
    ]
    stage = layout.stages[chunk * layout.pp + pp]
    tied = language.share_embeddings_and_output_weights
    # A tied output layer has no weight of its own, except on a stage that does not embed.
    tables = ("E" in stage) + ("L" in stage and not (tied and "E" in stage))
    if "L" in stage and language.mtp_num_layers:
        # What predicts further ahead stands where the loss is, with a copy of the embedding.
        layers.append(prediction_parameters(language, tp=layout.tp, ep=layout.ep, etp=layout.etp))
        tables += "E" not in stage
    table = language.vocab_size * language.hidden_size // layout.tp
    final_norm = language.hidden_size if "L" in stage else 0
    return sum(layers, Parameters(decoder=tables * table + final_norm))


def layer_parameters(
    language: LanguageConfig, has_experts: bool, *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """One rank's part of one decoder layer."""
    hidden = language.hidden_size
    replicated, attention = attention_parameters(language)
    norms = 2 * hidden + replicated
    if not has_experts:
        return Parameters(decoder=norms + (attention + 3 * hidden * language.ffn_hidden_size) // tp)
    assert language.num_moe_experts is not None and language.moe_ffn_hidden_size is not None
    shared = 3 * hidden * (language.moe_shared_expert_intermediate_size or 0)
    router = hidden * language.num_moe_experts
    one_expert = 3 * hidden * language.moe_ffn_hidden_size
    return Parameters(
        decoder=norms + router + (attention + shared) // tp,
        experts=language.num_moe_experts // ep * one_expert // etp,
    )


def attention_parameters(language: LanguageConfig) -> tuple[int, int]:
    """Parameters of one layer's attention: held whole by every tensor rank, and cut."""
    hidden, heads = language.hidden_size, language.num_attention_heads
    if not language.multi_latent_attention:
        head = language.head_dim
        queries, groups = heads * head, language.query_groups * head
        biases = queries + 2 * groups if language.add_qkv_bias else 0
        norms = 2 * head if language.qk_layernorm else 0
        return norms, hidden * (queries + 2 * groups) + biases + queries * hidden
    compressed, rotary = language.kv_lora_rank or 0, language.qk_pos_emb_head_dim
    queries = heads * (language.qk_head_dim + rotary)
    whole = hidden * (compressed + rotary) + compressed
    cut = compressed * heads * (language.qk_head_dim + language.v_head_dim)
    cut += heads * language.v_head_dim * hidden
    if language.q_lora_rank is None:
        return whole, cut + hidden * queries
    rank = language.q_lora_rank
    return whole + hidden * rank + rank, cut + rank * queries


def prediction_parameters(
    language: LanguageConfig, *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """One rank's part of multi-token prediction, embedding and output layer left out."""
    if not language.mtp_num_layers:
        return Parameters()
    hidden = language.hidden_size
    kind = bool(language.moe_layer_freq[-1])
    own = Parameters(decoder=3 * hidden + 2 * hidden * hidden)
    return own + layer_parameters(language, kind, tp=tp, ep=ep, etp=etp)


def encoder_parameters(model: ModelConfig) -> Parameters:
    """Trunk and adapter, alike on every rank; nothing for a model of text alone."""
    vision = model.vision
    if vision is None:
        return Parameters()
    merged, inner = model.adapter.widths(vision)
    width = model.language.hidden_size
    norm = 2 * vision.hidden_size
    adapter = norm + merged * inner + inner + inner * width + width
    return Parameters(trunk=trunk_parameters(vision), adapter=adapter)


def trunk_parameters(vision: VisionConfig) -> int:
    """The NaViT alone."""
    hidden = vision.hidden_size
    patches = vision.in_channels * vision.patch_size**2 * hidden + hidden + hidden
    matrices = 3 if vision.gated_linear_unit else 2
    block = 4 * hidden * hidden + matrices * hidden * vision.ffn_hidden_size + 2 * hidden
    if vision.qk_layernorm:
        block += 2 * hidden // vision.num_attention_heads
    return patches + vision.num_layers * block + hidden
