"""dots.vlm1's encoder as released with dots.ocr and dots.vlm1: `vision_tower.*`.

The released classes build nothing but that. Classes of our own (`own.py`) know more fields, which
are written only where they depart from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_vlm.config.model_schema import ModelConfig
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
    fields: Fields, language_hidden_size: int, pictures: Sequence[Fields], own: bool
) -> dict[str, Any]:
    """Our `vision` and `adapter` from a config.json's `vision_config`.

    Args:
        fields: the whole configuration.
        language_hidden_size: the decoder's width, which the merger must end at.
        pictures: settings of an image processor, for the pictures' sizes and colours; none: our
            own defaults, which are dots.ocr's.
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
    vision |= _read_pictures(pictures, vision)
    # Whose ids they are is the tokenizer's matter.
    neutral(fields, ("image_token_id", "video_token_id", "mm_only", "language_only"))
    return {"vision": vision, "adapter": adapter}


def _read_pictures(pictures: Sequence[Fields], vision: dict[str, Any]) -> dict[str, Any]:
    """Our fields from every file that has settings of pictures; they must agree."""
    found: dict[str, Any] = {}
    for fields in pictures:
        for name, value in _read_processor(fields, vision).items():
            if found.setdefault(name, value) != value:
                raise fields.refusal(name, value, f"{found[name]}, as {pictures[0].name} says")
    return found


def _read_processor(fields: Fields, vision: dict[str, Any]) -> dict[str, Any]:
    """Of one file: Qwen2-VL's image processor, as any version of transformers saves it, or ours."""
    for theirs, ours, expected in (
        ("patch_size", "patch_size", vision["patch_size"]),
        ("merge_size", "spatial_merge_size", vision["spatial_merge_size"]),
        ("temporal_patch_size", "temporal_patch_size", 1),
    ):
        value = fields.integer(theirs, expected)
        if value != expected:
            raise fields.refusal(theirs, value, f"{expected}, the {ours} of vision_config")
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.expect(step, True, None)
    for step in ("do_center_crop", "do_pad"):
        fields.expect(step, False, None)
    # Bicubic, by Pillow's number.
    fields.expect("resample", 3, None)
    factor = fields.number("rescale_factor", None)
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise fields.refusal("rescale_factor", factor, "1/255")
    # Names of classes, how tensors are handed over, and sizes of steps that are refused above.
    neutral(
        fields,
        "crop_size data_format default_to_square device disable_grouping feature_extractor_type "
        "image_processor_type input_data_format pad_size processor_class return_tensors".split(),
    )
    found = _read_areas(fields)
    for name in ("image_mean", "image_std"):
        value = fields.take(name, None)
        if value is None:
            continue
        numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
        if not numbers or len(value) != vision["in_channels"]:
            raise fields.refusal(name, value, f"{vision['in_channels']} numbers")
        found[name] = tuple(value)
    fields.done()
    return found


def _read_areas(fields: Fields) -> dict[str, Any]:
    """Least and most pixels: fields of their own or, since transformers 5, edges of `size`."""
    areas = {name: fields.integer(name, None) for name in ("min_pixels", "max_pixels")}
    if fields.take("size", None) is not None:
        size = fields.section("size")
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            for spelled in (name, edge):
                value = size.integer(spelled, None)
                if value is None:
                    continue
                if areas[name] not in (None, value):
                    raise size.refusal(spelled, value, f"{areas[name]}, as {name} says")
                areas[name] = value
        size.done()
    return {name: value for name, value in areas.items() if value is not None}


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
