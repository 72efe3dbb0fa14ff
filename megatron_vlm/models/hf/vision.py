"""dots.vlm1's encoder as released with dots.ocr and dots.vlm1: `vision_tower.*`.

The released classes build nothing but that. Classes of our own (`own.py`) know more fields, which
are written only where they depart from it.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.hf.fields import Fields, Traits, neutral
from megatron_vlm.models.hf.names import Row, convolution, same

ROWS = (
    Row(
        "vision.trunk.patch_embed.proj.weight",
        convolution,
        ("vision_tower.patch_embed.patchifier.proj.weight",),
    ),
    Row(
        "vision.trunk.patch_embed.proj.bias",
        same,
        ("vision_tower.patch_embed.patchifier.proj.bias",),
    ),
    Row(
        "vision.trunk.patch_embed.norm.weight",
        same,
        ("vision_tower.patch_embed.patchifier.norm.weight",),
    ),
    *(
        Row(
            f"vision.trunk.blocks.{{layer}}.{ours}.weight",
            same,
            (f"vision_tower.blocks.{{layer}}.{theirs}.weight",),
        )
        for ours, theirs in (
            ("norm1", "norm1"),
            ("qkv", "attn.qkv"),
            ("q_norm", "attn.q_norm"),
            ("k_norm", "attn.k_norm"),
            ("proj", "attn.proj"),
            ("norm2", "norm2"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
            ("fc3", "mlp.fc3"),
        )
    ),
    Row("vision.trunk.post_trunk_norm.weight", same, ("vision_tower.post_trunk_norm.weight",)),
    Row("vision.adapter.norm.weight", same, ("vision_tower.merger.ln_q.weight",)),
    Row("vision.adapter.norm.bias", same, ("vision_tower.merger.ln_q.bias",)),
    Row("vision.adapter.fc1.weight", same, ("vision_tower.merger.mlp.0.weight",)),
    Row("vision.adapter.fc1.bias", same, ("vision_tower.merger.mlp.0.bias",)),
    Row("vision.adapter.fc2.weight", same, ("vision_tower.merger.mlp.2.weight",)),
    Row("vision.adapter.fc2.bias", same, ("vision_tower.merger.mlp.2.bias",)),
)

ROTARY_BASE = 10000.0
"""Base of the rotary embedding: fixed in the released code."""
MERGER_EPSILON = 1e-6
"""Epsilon of the merger's layer norm: fixed in the released code."""


def read_vision(
    fields: Fields, language_hidden_size: int, preprocessor: dict[str, Any] | None, own: bool
) -> dict[str, Any]:
    """Our `vision` and `adapter` from a config.json's `vision_config`.

    Args:
        fields: the whole configuration.
        language_hidden_size: the decoder's width, which the merger must end at.
        preprocessor: preprocessor_config.json, for the pictures' sizes and colours; null: our own
            defaults, which are dots.ocr's.
        own: whether the class is one of ours, which has fields that the released ones lack.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    inner = fields.section("vision_config")
    inner.expect("hidden_size", language_hidden_size)
    inner.expect("temporal_patch_size", 1)
    inner.expect("use_bias", False)
    inner.expect("is_causal", False)
    inner.expect("post_norm", True)
    inner.expect("num_dummy_heads", 0)
    # Fields of how it is run.
    neutral(inner, ("attn_implementation", "gradient_checkpointing"))
    vision = {
        "hidden_size": inner.integer("embed_dim"),
        "ffn_hidden_size": inner.integer("intermediate_size"),
        "num_layers": inner.integer("num_hidden_layers"),
        "num_attention_heads": inner.integer("num_attention_heads"),
        "in_channels": inner.integer("num_channels", 3),
        "patch_size": inner.integer("patch_size", 14),
        "spatial_merge_size": inner.integer("spatial_merge_size", 2),
        "layernorm_epsilon": inner.number("rms_norm_eps"),
        "init_method_std": inner.number("initializer_range", 0.02),
    }
    adapter = {"init_method_std": inner.number("init_merger_std", 0.02)}
    if own:
        vision |= {
            "rotary_base": inner.number("rotary_base", ROTARY_BASE),
            "gated_linear_unit": inner.flag("gated_linear_unit", True),
            "qk_layernorm": inner.flag("qk_layernorm", False),
        }
        adapter |= {
            "merge": inner.take("merge", "concatenate"),
            "hidden_size": inner.integer("merger_hidden_size", None),
            "layernorm_epsilon": inner.number("merger_norm_eps", MERGER_EPSILON),
        }
    else:
        # No fields of the released classes, but transformers saves them with our code of them.
        inner.expect("rotary_base", ROTARY_BASE, int(ROTARY_BASE))
        inner.expect("gated_linear_unit", True)
        inner.expect("qk_layernorm", False)
        inner.expect("merge", "concatenate")
        inner.expect("merger_hidden_size", None)
        inner.expect("merger_norm_eps", MERGER_EPSILON)
        adapter |= {"layernorm_epsilon": MERGER_EPSILON}
        vision |= {"rotary_base": ROTARY_BASE}
    inner.done()
    if preprocessor is not None:
        vision |= _read_preprocessor(preprocessor, vision)
    # Whose ids they are is the tokenizer's matter.
    neutral(fields, ("image_token_id", "video_token_id", "mm_only", "language_only"))
    return {"vision": vision, "adapter": adapter}


def _read_preprocessor(values: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    name = "preprocessor_config.json"
    for theirs, ours, expected in (
        ("patch_size", "patch_size", vision["patch_size"]),
        ("merge_size", "spatial_merge_size", vision["spatial_merge_size"]),
        ("temporal_patch_size", "temporal_patch_size", 1),
    ):
        if values.get(theirs, expected) != expected:
            raise ConversionError(
                f"{name}: {theirs} is {values[theirs]}; expected {expected}, the {ours} of "
                "config.json's vision_config"
            )
    names = ("min_pixels", "max_pixels", "image_mean", "image_std")
    return {field: values[field] for field in names if values.get(field) is not None}


def write_vision(model: ModelConfig) -> dict[str, Any]:
    """`vision_config`: the inverse of `read_vision`, without the preprocessor's part."""
    vision, adapter = model.vision, model.adapter
    assert vision is not None
    merged, inner = adapter.widths(vision)
    own = {
        "rotary_base": (vision.rotary_base, ROTARY_BASE),
        "gated_linear_unit": (vision.gated_linear_unit, True),
        "qk_layernorm": (vision.qk_layernorm, False),
        "merge": (adapter.merge, "concatenate"),
        "merger_hidden_size": (inner, merged),
        "merger_norm_eps": (adapter.layernorm_epsilon, MERGER_EPSILON),
    }
    return {
        "embed_dim": vision.hidden_size,
        "hidden_size": model.language.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": 1,
        "rms_norm_eps": vision.layernorm_epsilon,
        "use_bias": False,
        "is_causal": False,
        "post_norm": True,
        "initializer_range": vision.init_method_std,
        "init_merger_std": adapter.init_method_std,
        # Fields that the released configurations do not have are written where they matter.
        **{name: value for name, (value, released) in own.items() if value != released},
    }


def check_released(model: ModelConfig, architecture: str) -> None:
    """Refuse an encoder that departs from the released one in more than its sizes.

    Raises:
        ConversionError: it does, or there is none; tells by which field.
    """
    vision, adapter = model.vision, model.adapter
    if vision is None:
        raise ConversionError(f"model.vision is null; {architecture} needs an encoder")
    trunk = Traits(vision, "model.vision", architecture)
    trunk.need("gated_linear_unit", True)
    trunk.need("qk_layernorm", False)
    trunk.need("in_channels", 3)
    trunk.need("rotary_base", ROTARY_BASE)
    merger = Traits(adapter, "model.adapter", architecture)
    merger.need("merge", "concatenate")
    merger.need("hidden_size", None, adapter.widths(vision)[0])
    merger.need("layernorm_epsilon", MERGER_EPSILON)


def has_released_encoder(model: ModelConfig) -> bool:
    """Whether the encoder is dots.vlm1's and dots.ocr's but for its sizes."""
    try:
        check_released(model, "")
    except ConversionError:
        return False
    return True
