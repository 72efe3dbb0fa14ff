"""The schema's part on the model: the two towers and what joins them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class VisionConfig(Section):
    """A NaViT encoder: packed pictures of any size, attention isolated per picture."""

    num_layers: int = Field(gt=0)
    """Transformer layers. dots.vlm1: 42 (dots.ocr's published config)."""
    hidden_size: int = Field(gt=0)
    """Width. dots.vlm1: 1536."""
    num_attention_heads: int = Field(gt=0)
    """Heads. dots.vlm1: 12, so 128 channels each."""
    ffn_hidden_size: int = Field(gt=0)
    """Width of the feed-forward. dots.vlm1: 4224. Seed-ViT: 5120."""
    gated_linear_unit: bool = True
    """SwiGLU of three matrices; false: GELU between two. dots.vlm1: true. Seed-ViT: false."""
    qk_layernorm: bool = False
    """RMS norm of each head's query and key before the rotary embedding. dots.vlm1: false."""
    patch_size: int = Field(14, gt=0)
    """Pixels on a patch's side. dots.vlm1: 14."""
    spatial_merge_size: int = Field(2, gt=0)
    """Patches on a side merged into one language token. dots.vlm1: 2."""
    in_channels: int = Field(3, gt=0)
    """Colour channels of a picture."""
    rotary_base: float = Field(10000.0, gt=0)
    """Base of the 2-D rotary embedding, half of the channels per axis. dots.vlm1: 1e4."""
    layernorm_epsilon: float = Field(1e-5, gt=0)
    """Epsilon of the RMS norms. dots.vlm1: 1e-5."""
    init_method_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. dots.vlm1: 0.02."""
    min_pixels: int = Field(3136, gt=0)
    """Smaller pictures are enlarged to this many pixels. dots.ocr: 3136."""
    max_pixels: int = Field(11289600, gt=0)
    """Larger pictures are reduced to this many pixels. dots.ocr: 11289600."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in [0, 1]. dots.ocr: CLIP's."""
    image_std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue. dots.ocr: CLIP's."""

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                "hidden_size / num_attention_heads = "
                f"{self.hidden_size // self.num_attention_heads} must be a multiple of 4 "
                "(2-D rotary embedding: two axes of channel pairs)"
            )
        unit = (self.patch_size * self.spatial_merge_size) ** 2
        if self.max_pixels < max(unit, self.min_pixels):
            raise ValueError(
                f"max_pixels {self.max_pixels} must be at least min_pixels {self.min_pixels} "
                f"and one merged patch ({unit} pixels)"
            )
        return self


class AdapterConfig(Section):
    """The MLP that turns 2x2 merged patches into language tokens (norm, linear, GELU, linear)."""

    merge: Literal["concatenate", "average"] = "concatenate"
    """How the patches of a block become one: side by side (dots.vlm1), or their mean (Seed-ViT)."""
    hidden_size: int | None = Field(None, gt=0)
    """Width between the two linear maps; null: that of the merged patches. dots.vlm1: null."""
    layernorm_epsilon: float = Field(1e-6, gt=0)
    """Epsilon of the layer norm before merging. dots.vlm1: 1e-6."""
    init_method_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. dots.vlm1: 0.02."""

    def widths(self, vision: VisionConfig) -> tuple[int, int]:
        """Channels of a merged block, and between the two linear maps."""
        merged = vision.hidden_size
        if self.merge == "concatenate":
            merged *= vision.spatial_merge_size**2
        return merged, self.hidden_size or merged


class RopeScalingConfig(Section):
    """How the rotary embedding reaches beyond the length it was trained at."""

    type: Literal["linear", "yarn"]
    """Positions divided by `factor`, or YaRN (arXiv 2309.00071). DeepSeek-V3: yarn."""
    factor: float = Field(ge=1)
    """New length over the original one. DeepSeek-V3: 40."""
    original_max_position_embeddings: int | None = Field(None, gt=0)
    """Length before stretching, in tokens; YaRN needs it. DeepSeek-V3: 4096."""
    beta_fast: float = Field(32.0, gt=0)
    """Rotations over the original length above which a channel stays as it is. YaRN."""
    beta_slow: float = Field(1.0, gt=0)
    """Rotations below which a channel is fully interpolated. YaRN."""
    mscale: float | None = Field(None, gt=0)
    """With `mscale_all_dim`, decides the factor on cosines and sines. DeepSeek-V3: 1. YaRN."""
    mscale_all_dim: float | None = Field(None, gt=0)
    """Also scales the scores of multi-latent attention. DeepSeek-V3: 1. YaRN."""

    @model_validator(mode="after")
    def _check(self) -> RopeScalingConfig:
        if self.type == "yarn" and self.original_max_position_embeddings is None:
            raise ValueError("original_max_position_embeddings is required when type is yarn")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if self.type != "yarn" and value is not None:
                raise ValueError(f"{name} is {value}; expected null unless type is yarn; remove it")
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow} must be below beta_fast {self.beta_fast}")
        return self


class LanguageConfig(Section):
    """A decoder with every trait of dots.llm1 and DeepSeek-V3; dense without `num_moe_experts`."""

    num_layers: int = Field(gt=0)
    """Transformer layers. dots.llm1: 62."""
    hidden_size: int = Field(gt=0)
    """Width. dots.llm1: 4096."""
    num_attention_heads: int = Field(gt=0)
    """Query heads. dots.llm1: 32."""
    num_query_groups: int | None = Field(None, gt=0)
    """Key/value heads; null means one per query head. dots.llm1: 32 (plain MHA)."""
    kv_channels: int | None = Field(None, gt=0)
    """Channels of a head; null means hidden_size / num_attention_heads. dots.llm1: 128."""
    ffn_hidden_size: int = Field(gt=0)
    """Width of the SwiGLU feed-forward of dense layers. dots.llm1: 10944."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding. dots.llm1: 152064."""
    max_position_embeddings: int = Field(32768, gt=0)
    """Longest sample in tokens. dots.llm1: 32768."""
    rotary_base: float = Field(1e7, gt=0)
    """Base of the rotary embedding. dots.llm1: 1e7. DeepSeek-V3: 1e4."""
    rotary_interleaved: bool = False
    """Rotate neighbouring channels as pairs, instead of the two halves. DeepSeek-V3: true."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches the rotary embedding to longer samples; null: not at all. dots.llm1: null."""
    mrope_section: tuple[int, int, int] | None = None
    """Channel pairs that rotate by time, by height and by width (M-RoPE): tokens of a picture have
    a row and a column. Null: all rotate by the place in the sample, as dots.vlm1's and Seed1.5-VL's
    do. Qwen2-VL: [16, 24, 24]."""
    mrope_interleaved: bool = False
    """Deal those pairs out in turn, so that each of the three has fast and slow ones, instead of
    section by section. Qwen2-VL: false. Qwen3-VL: true."""
    layernorm_epsilon: float = Field(1e-5, gt=0)
    """Epsilon of the RMS norms. dots.llm1: 1e-5."""
    qk_layernorm: bool = True
    """RMS norm of each head's query and key before the rotary embedding. dots.llm1: true. Of
    multi-latent attention, which norms what it compresses instead, it says nothing."""
    add_qkv_bias: bool = False
    """Biases of queries, keys and values. dots.llm1: false. dots.ocr (Qwen2): true."""

    kv_lora_rank: int | None = Field(None, gt=0)
    """Width that keys and values are compressed to: turns on multi-latent attention (DeepSeek-V2,
    arXiv 2405.04434). DeepSeek-V3: 512."""
    q_lora_rank: int | None = Field(None, gt=0)
    """Width that queries are compressed to; null: they are not. DeepSeek-V3: 1536."""
    qk_head_dim: int = Field(128, gt=0)
    """Channels of a query and key head without positions. DeepSeek-V3: 128."""
    qk_pos_emb_head_dim: int = Field(64, gt=0)
    """Channels with rotary positions, shared by all key heads. DeepSeek-V3: 64."""
    v_head_dim: int = Field(128, gt=0)
    """Channels of a value head. DeepSeek-V3: 128."""

    mtp_num_layers: int | None = Field(None, gt=0, le=1)
    """Layers that predict one more token ahead (multi-token prediction). DeepSeek-V3: 1."""
    mtp_loss_scaling_factor: float = Field(0.1, ge=0)
    """Weight of that loss. DeepSeek-V3: 0.3 for the first 10T tokens, then 0.1."""

    share_embeddings_and_output_weights: bool = False
    """Tie the embedding and the output layer. dots.llm1: false."""
    init_method_std: float = Field(0.006, gt=0)
    """Standard deviation of the initial weights. dots.llm1: 0.006."""

    num_moe_experts: int | None = Field(None, gt=1)
    """Routed experts of a MoE layer; null builds a dense model. dots.llm1: 128."""
    first_k_dense_replace: int = Field(1, ge=0)
    """Leading layers that stay dense. dots.llm1: 1."""
    moe_ffn_hidden_size: int | None = Field(None, gt=0)
    """Width of one expert. dots.llm1: 1408."""
    moe_router_topk: int = Field(2, gt=0)
    """Experts chosen for each token. dots.llm1: 6."""
    moe_shared_expert_intermediate_size: int | None = Field(None, gt=0)
    """Width of all shared experts together. dots.llm1: 2 x 1408."""
    moe_router_num_groups: int | None = Field(None, gt=0)
    """Groups of experts (nodes, in training) among which a token chooses first; null: no groups.
    DeepSeek-V3: 8. A group's score is the sum of its two best."""
    moe_router_group_topk: int | None = Field(None, gt=0)
    """Groups that a token's experts may come from. DeepSeek-V3: 4."""
    moe_router_topk_scaling_factor: float = Field(1.0, gt=0)
    """Factor on the normalised weights of the chosen experts. dots.llm1: 2.5."""
    moe_router_bias_update_rate: float = Field(1e-3, ge=0)
    """Step of the bias that balances experts. dots.llm1: unpublished; 1e-3 is DeepSeek-V3's."""
    moe_aux_loss_coeff: float = Field(1e-4, ge=0)
    """Weight of the sequence-wise balance loss. dots.llm1: unpublished; 1e-4 is DeepSeek-V3's."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach the experts of other ranks. Our choice."""

    @model_validator(mode="after")
    def _check(self) -> LanguageConfig:
        if self.multi_latent_attention:
            self._check_latent()
        elif self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; set kv_channels or change one of them"
            )
        if self.rotary_channels % 2:
            field = "qk_pos_emb_head_dim" if self.multi_latent_attention else "kv_channels"
            raise ValueError(f"{field} {self.rotary_channels} must be even (rotary embedding)")
        self._check_sections()
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.query_groups}"
            )
        if self.num_moe_experts is not None:
            if self.moe_ffn_hidden_size is None:
                raise ValueError("moe_ffn_hidden_size is required when num_moe_experts is set")
            if self.moe_router_topk > self.num_moe_experts:
                raise ValueError(
                    f"moe_router_topk {self.moe_router_topk} exceeds "
                    f"num_moe_experts {self.num_moe_experts}"
                )
            if self.first_k_dense_replace >= self.num_layers:
                raise ValueError(
                    f"first_k_dense_replace {self.first_k_dense_replace} leaves none of the "
                    f"{self.num_layers} layers for experts; set num_moe_experts to null instead"
                )
            self._check_groups(self.num_moe_experts)
        if self.mtp_num_layers and self.share_embeddings_and_output_weights:
            raise ValueError(
                "mtp_num_layers with share_embeddings_and_output_weights is not built; untie the "
                "embeddings, or set mtp_num_layers to null"
            )
        return self

    def _check_sections(self) -> None:
        if self.mrope_section is None:
            if self.mrope_interleaved:
                raise ValueError("mrope_interleaved is true without mrope_section; set that too")
            return
        pairs = self.rotary_channels // 2
        if min(self.mrope_section) < 1 or sum(self.mrope_section) != pairs:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)}: expected three numbers from 1 on that "
                f"add up to the {pairs} channel pairs of a head with positions"
            )
        _, height, width = self.mrope_section
        # Pairs 1, 4, 7, ... are the height's, 2, 5, 8, ... the width's.
        if self.mrope_interleaved and (3 * height - 2 >= pairs or 3 * width - 1 >= pairs):
            raise ValueError(
                f"mrope_section {list(self.mrope_section)}: with mrope_interleaved height and "
                f"width have at most every third of the {pairs} pairs each; give time more"
            )

    def _check_latent(self) -> None:
        if self.query_groups != self.num_attention_heads:
            raise ValueError(
                f"num_query_groups {self.num_query_groups}: multi-latent attention (kv_lora_rank) "
                "has one key and value per query head; set it to null"
            )
        for name in ("kv_channels", "add_qkv_bias"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} has no meaning in multi-latent attention (kv_lora_rank); remove it"
                )

    def _check_groups(self, experts: int) -> None:
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if (groups is None) != (chosen is None):
            raise ValueError("moe_router_num_groups and moe_router_group_topk go together")
        if groups is None or chosen is None:
            return
        if experts % groups or experts // groups < 2:
            raise ValueError(
                f"moe_router_num_groups {groups} must divide num_moe_experts {experts} into "
                "groups of two or more"
            )
        if not chosen <= groups or self.moe_router_topk > chosen * (experts // groups):
            raise ValueError(
                f"moe_router_group_topk {chosen}: expected at most {groups} groups, and enough to "
                f"hold moe_router_topk {self.moe_router_topk} experts of {experts // groups} each"
            )

    @property
    def multi_latent_attention(self) -> bool:
        """Whether keys and values are compressed."""
        return self.kv_lora_rank is not None

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that carry positions."""
        return self.qk_pos_emb_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def moe_layer_freq(self) -> list[int]:
        """One entry a layer: 1 where it has experts, 0 where it is dense."""
        if self.num_moe_experts is None:
            return [0] * self.num_layers
        dense = self.first_k_dense_replace
        return [0] * dense + [1] * (self.num_layers - dense)


class ModelConfig(Section):
    """The two towers and what joins them. `vision: null` trains the decoder on text alone."""

    name: str = "unnamed"
    """The model's name; written into checkpoints, which refuse to load into another shape."""
    vision: VisionConfig | None = None
    """The picture encoder, or null."""
    adapter: AdapterConfig = AdapterConfig()
    """The MLP between encoder and decoder."""
    language: LanguageConfig
    """The decoder."""
