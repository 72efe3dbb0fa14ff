"""A NaViT picture encoder in front of a decoder of transformers: dots.llm1, DeepSeek-V3 or Qwen2.

    patches -> vision_tower (blocks, merger) -> one feature for each 2x2 patches
    input_ids -> embeddings, features in the places of `image_token_id` -> decoder -> logits

The decoder is the class of transformers itself, with the weights and the flat configuration of the
text-only model; the encoder is in vision_megatron_vlm.py.

Written by megatron-vlm, for transformers 5; needs nothing but transformers and torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .vision_megatron_vlm import VisionConfig, VisionTower


class VisionLanguageConfig(PreTrainedConfig):
    """What the configurations below add to that of their decoder."""

    sub_configs_defaults = {"vision_config": VisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    """Token whose embeddings the features take the places of."""
    video_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = VisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)


class Seeing:
    """What the models below add to their decoder."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision_config)
        # The layer of multi-token prediction that checkpoints may hold after the last one.
        unused = rf"^model\.layers\.{config.num_hidden_layers}\."
        self._keys_to_ignore_on_load_unexpected = [unused]
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Features of packed pictures, [features, hidden_size]; see `VisionTower`."""
        return self.vision_tower(pixel_values, image_grid_thw)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs,
    ):
        """As the decoder's, with `pixel_values` and `image_grid_thw` of the pictures."""
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values come with input_ids, which say where pictures stand")
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            features = self.get_image_features(pixel_values, image_grid_thw).to(inputs_embeds)
            places = (input_ids == self.config.image_token_id).to(inputs_embeds.device)
            if int(places.sum()) != len(features):
                raise ValueError(
                    f"input_ids hold {int(places.sum())} tokens {self.config.image_token_id} "
                    f"(image_token_id), but the pictures have {len(features)} features"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features)
            input_ids = None
        elif input_ids is not None and not (past_key_values and past_key_values.get_seq_length()):
            if bool((input_ids == self.config.image_token_id).any()):
                raise ValueError(
                    f"input_ids hold tokens {self.config.image_token_id} (image_token_id), but "
                    "there are no pixel_values"
                )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Pictures are encoded once, with the prompt; what follows finds them in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["image_grid_thw"] = None
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Beams and samples of one prompt: its pictures are repeated as its tokens are."""
        pixels, grids = kwargs.pop("pixel_values", None), kwargs.pop("image_grid_thw", None)
        if pixels is not None and input_ids is not None and expand_size > 1:
            merge = self.config.vision_config.spatial_merge_size
            patches = (input_ids == self.config.image_token_id).sum(1).cpu() * merge**2
            # The row that each picture ends in.
            rows = torch.searchsorted(patches.cumsum(0), grids.cpu().prod(1).cumsum(0))
            pictures = torch.bincount(rows, minlength=len(patches))
            pixels, grids = (
                torch.cat([part.repeat(expand_size, 1) for part in whole.split(sizes.tolist())])
                for whole, sizes in ((pixels, patches), (grids, pictures))
            )
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )
        return input_ids, {**kwargs, "pixel_values": pixels, "image_grid_thw": grids}


class MegatronVlmConfig(Dots1Config, VisionLanguageConfig):
    """dots.llm1's fields and `vision_config`."""

    model_type = "megatron_vlm"


class MegatronVlmForConditionalGeneration(Seeing, Dots1ForCausalLM):
    """Pictures in front of dots.llm1."""

    config_class = MegatronVlmConfig


class DotsVLMConfig(DeepseekV3Config, VisionLanguageConfig):
    """DeepSeek-V3's fields and `vision_config`, as released with dots.vlm1."""

    model_type = "dots_vlm"


class DotsVLMForCausalLM(Seeing, DeepseekV3ForCausalLM):
    """Pictures in front of DeepSeek-V3: dots.vlm1."""

    config_class = DotsVLMConfig

    def __init__(self, config: DotsVLMConfig) -> None:
        super().__init__(config)
        # transformers fixes the epsilon of these two norms, at DeepSeek-V3's.
        for layer in self.model.layers:
            for norm in ("q_a_layernorm", "kv_a_layernorm"):
                if hasattr(layer.self_attn, norm):
                    getattr(layer.self_attn, norm).variance_epsilon = config.rms_norm_eps


class DotsOCRConfig(Qwen2Config, VisionLanguageConfig):
    """Qwen2's fields and `vision_config`, as released with dots.ocr."""

    model_type = "dots_ocr"


class DotsOCRForCausalLM(Seeing, Qwen2ForCausalLM):
    """Pictures in front of Qwen2: dots.ocr."""

    config_class = DotsOCRConfig


# The same two decoders behind an encoder that dots.vlm1 and dots.ocr do not have, and so under a
# model type that no other program takes for theirs.
class MegatronVlmDeepseekV3Config(DotsVLMConfig):
    """DeepSeek-V3's fields and `vision_config`."""

    model_type = "megatron_vlm"


class MegatronVlmDeepseekV3ForConditionalGeneration(DotsVLMForCausalLM):
    """Pictures in front of DeepSeek-V3."""

    config_class = MegatronVlmDeepseekV3Config


class MegatronVlmQwen2Config(DotsOCRConfig):
    """Qwen2's fields and `vision_config`."""

    model_type = "megatron_vlm"


class MegatronVlmQwen2ForConditionalGeneration(DotsOCRForCausalLM):
    """Pictures in front of Qwen2."""

    config_class = MegatronVlmQwen2Config


# In files experts lie one by one, in memory together, as transformers does for its own classes.
for _model, _decoder in (
    (MegatronVlmForConditionalGeneration, "dots1"),
    (DotsVLMForCausalLM, "deepseek_v3"),
    (MegatronVlmDeepseekV3ForConditionalGeneration, "deepseek_v3"),
):
    register_checkpoint_conversion_mapping(
        _model.__name__, get_checkpoint_conversion_mapping(_decoder), overwrite=True
    )
