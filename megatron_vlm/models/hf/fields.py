"""Reading a config.json so that nothing in it goes unnoticed, and the parts families share.

A field is taken, required to have one value, or known to change nothing; one that is none of
these is refused by name, since it may well change what the model computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from megatron_vlm.config.model_schema import LanguageConfig, RopeScalingConfig
from megatron_vlm.errors import ConversionError

# Of transformers itself: how a model is run, saved or found, not what it computes.
_NEUTRAL = (
    "_attn_implementation architectures attn_implementation auto_map bos_token_id "
    "chunk_size_feed_forward dtype eos_token_id ep_size id2label is_encoder_decoder label2id "
    "model_type _name_or_path output_attentions output_hidden_states output_router_logits "
    "pad_token_id pretraining_tp problem_type quantization_config return_dict torch_dtype "
    "transformers_version use_cache use_return_dict"
).split()
# Of training: a loss that our configuration has its own fields for.
_TRAINING = "aux_loss_alpha router_aux_loss_coef seq_aux".split()

_MISSING = object()


class Fields:
    """The fields of one JSON object, each of them to be accounted for."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        """Take over `values`; `name` is what errors call the file or section."""
        self.name = name
        self._values = values
        self._seen: set[str] = {*_NEUTRAL, *_TRAINING}

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The field's value, or the default its class has.

        Raises:
            ConversionError: it is missing and has no default.
        """
        self._seen.add(name)
        value = self._values.get(name, default)
        if value is _MISSING:
            raise ConversionError(f"{self.name}: {name} is missing; add it")
        return value

    def integer(self, name: str, default: Any = _MISSING) -> Any:
        """A whole number; null only where that is the default."""
        value = self.take(name, default)
        if value is None and default is None:
            return None
        # JSON has one kind of number, and true is one in Python.
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(name, value, "a whole number")
        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A number; null only where that is the default."""
        value = self.take(name, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refusal(name, value, "a number")
        try:
            found = float(value)
        except OverflowError:
            # JSON's whole numbers have no end.
            found = math.inf
        if not math.isfinite(found):
            raise self.refusal(name, value, "a number that a float holds")
        return found

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def section(self, name: str) -> Fields:
        """A field that is an object of fields itself."""
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.refusal(name, value, "an object")
        return Fields(value, f"{self.name}: {name}")

    def expect(self, name: str, *allowed: Any, default: Any = _MISSING) -> None:
        """Refuse any value but these; the first is what our model has."""
        value = self.take(name, allowed[0] if default is _MISSING else default)
        # 1 == True, but neither means the other here.
        if not any(value == one and type(value) is type(one) for one in allowed):
            said = " or ".join(json.dumps(one) for one in allowed)
            raise self.refusal(name, value, f"{said}: megatron-vlm builds nothing else")

    def refusal(self, name: str, value: Any, expected: str) -> ConversionError:
        """The error about one field's value."""
        return ConversionError(f"{self.name}: {name} is {_show(value)}; expected {expected}")

    def done(self) -> None:
        """Refuse what has not been looked at."""
        unknown = sorted(self._values.keys() - self._seen)
        if unknown:
            name = unknown[0]
            raise ConversionError(
                f"{self.name}: {name} (value {_show(self._values[name])}) is a field that "
                "megatron-vlm does not know; remove it if it does not change what the model "
                "computes"
            )


class Traits:
    """What a family can express of our configuration; anything else is refused by its field."""

    def __init__(self, section: BaseModel, name: str, architecture: str) -> None:
        self._section, self._name, self._architecture = section, name, architecture

    def need(self, field: str, *allowed: Any) -> None:
        """Refuse a field with another value than these."""
        value = getattr(self._section, field)
        if value not in allowed:
            said = " or ".join(_show(one) for one in allowed)
            raise self.refusal(field, f"{said}")

    def refusal(self, field: str, expected: str) -> ConversionError:
        """The error about one field."""
        value = getattr(self._section, field)
        return ConversionError(
            f"{self._name}.{field} is {_show(value)}; {self._architecture} needs {expected}"
        )


def read_attention(fields: Fields) -> dict[str, Any]:
    """Heads and their groups, for attention that is not compressed."""
    heads = fields.integer("num_attention_heads")
    if heads < 1:
        raise fields.refusal("num_attention_heads", heads, "1 or more")
    hidden = fields.integer("hidden_size")
    groups = fields.integer("num_key_value_heads", None)
    head = fields.integer("head_dim", None)
    fields.expect("attention_dropout", 0.0, 0)
    return {
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else groups,
        "kv_channels": hidden // heads if head is None else head,
    }


def read_sizes(fields: Fields) -> dict[str, Any]:
    """What every decoder has."""
    fields.expect("hidden_act", "silu")
    return {
        "num_layers": fields.integer("num_hidden_layers"),
        "hidden_size": fields.integer("hidden_size"),
        "ffn_hidden_size": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size"),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "layernorm_epsilon": fields.number("rms_norm_eps"),
        "init_method_std": fields.number("initializer_range", 0.02),
        "share_embeddings_and_output_weights": fields.flag("tie_word_embeddings", False),
    }


def write_sizes(language: LanguageConfig) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {
        "hidden_act": "silu",
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
        "rms_norm_eps": language.layernorm_epsilon,
        "initializer_range": language.init_method_std,
        "tie_word_embeddings": language.share_embeddings_and_output_weights,
        "use_cache": True,
    }


def read_full_attention(fields: Fields, layers: int, used: bool, first_default: int) -> None:
    """Refuse layers whose attention slides.

    Args:
        fields: the configuration.
        layers: how many layers there are.
        used: whether a window, where one is given, is used at all.
        first_default: what the class takes for the first layer with a window.
    """
    kinds = fields.take("layer_types", None)
    window = fields.take("sliding_window", 4096)
    first = fields.integer("max_window_layers", first_default)
    if kinds is not None:
        # By its length first: a list of as many layers as a bad file claims may not fit anywhere.
        full = isinstance(kinds, list) and len(kinds) == layers
        if not full or set(map(str, kinds)) != {"full_attention"}:
            raise fields.refusal("layer_types", kinds, f'"full_attention" {layers} times')
    elif used and window is not None and first < layers:
        raise fields.refusal(
            "sliding_window", window, f"null, or max_window_layers of {layers} or more"
        )


def read_rope(fields: Fields) -> dict[str, Any]:
    """The rotary embedding: transformers 5's `rope_parameters`, or the older two fields."""
    theta = fields.number("rope_theta", None)
    scaling, source = fields.take("rope_scaling", None), "rope_scaling"
    newer = fields.take("rope_parameters", None)
    fields.expect("partial_rotary_factor", 1.0, 1)
    if newer is not None:
        scaling, source = newer, "rope_parameters"
    if scaling is None:
        if theta is None:
            raise ConversionError(f"{fields.name}: rope_theta is missing; add it")
        return {"rotary_base": theta, "rope_scaling": None}
    if not isinstance(scaling, dict):
        raise fields.refusal(source, scaling, "an object")
    inner = Fields(scaling, f"{fields.name}: {source}")
    theta = inner.number("rope_theta", theta)
    if theta is None:
        raise ConversionError(f"{inner.name}: rope_theta is missing; add it")
    kind, older = inner.take("rope_type", None), inner.take("type", None)
    kind = kind or older or "default"
    inner.expect("partial_rotary_factor", 1.0, 1)
    found: dict[str, Any] | None = None
    if kind in ("linear", "yarn"):
        found = {"type": kind, "factor": inner.number("factor")}
        original = inner.integer("original_max_position_embeddings", None)
        if original is not None:
            found["original_max_position_embeddings"] = original
    elif kind != "default":
        raise inner.refusal("rope_type", kind, '"default", "linear" or "yarn"')
    if kind == "yarn" and found is not None:
        # The class falls back to these also where null is written.
        found["beta_fast"] = inner.number("beta_fast", None) or 32.0
        found["beta_slow"] = inner.number("beta_slow", None) or 1.0
        # Null and 0 both mean that the factor alone decides.
        found["mscale"] = inner.number("mscale", None) or None
        found["mscale_all_dim"] = inner.number("mscale_all_dim", None) or None
        inner.expect("attention_factor", None)
        inner.expect("truncate", True)
    inner.done()
    return {"rotary_base": theta, "rope_scaling": found}


def write_rope(language: LanguageConfig) -> dict[str, Any]:
    """The older two fields, which every version and every server reads."""
    return {
        "rope_theta": language.rotary_base,
        "rope_scaling": _write_scaling(language.rope_scaling),
    }


def _write_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.original_max_position_embeddings is not None:
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.type == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        for name in ("mscale", "mscale_all_dim"):
            if getattr(scaling, name) is not None:
                written[name] = getattr(scaling, name)
    return written


def read_experts(fields: Fields, layers: int, required: bool) -> dict[str, Any]:
    """Routed and shared experts.

    Args:
        fields: the configuration.
        layers: how many layers there are.
        required: whether every field must be there: where its class has defaults of one model.
    """

    def default(value: Any) -> Any:
        return _MISSING if required else value

    experts = fields.integer("n_routed_experts", default(None))
    width = fields.integer("moe_intermediate_size", default(None))
    shared = fields.integer("n_shared_experts", default(None))
    chosen = fields.integer("num_experts_per_tok", default(None))
    dense = fields.integer("first_k_dense_replace", default(0))
    normalised = fields.flag("norm_topk_prob", default(False))
    scale = fields.number("routed_scaling_factor", default(1.0))
    groups = fields.integer("n_group", default(None))
    of = fields.integer("topk_group", default(None))
    fields.expect("moe_layer_freq", 1)
    # Early dots.llm1 files have the name of its choice of experts here; its scores are sigmoids.
    fields.expect("scoring_func", "sigmoid", "noaux_tc")
    fields.expect("topk_method", "noaux_tc")
    if experts is None or dense >= layers:
        return {"num_moe_experts": None}
    for name, value in (
        ("moe_intermediate_size", width),
        ("n_shared_experts", shared),
        ("num_experts_per_tok", chosen),
    ):
        if value is None or value < 1:
            raise fields.refusal(name, value, "1 or more")
    # One chosen expert's weight is its score: normalised it would always be 1.
    if normalised is not (chosen > 1):
        expected = (
            "true: megatron-vlm divides the chosen experts' scores by their sum, as the released "
            "models do; correct it if these weights were trained so, else they cannot be imported"
            if chosen > 1
            else "false with num_experts_per_tok 1, where the weight is the score itself"
        )
        raise fields.refusal("norm_topk_prob", normalised, expected)
    found = {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": chosen,
        "moe_shared_expert_intermediate_size": shared * width,
        "moe_router_topk_scaling_factor": scale,
        "first_k_dense_replace": dense,
    }
    for name, value in (("n_group", groups), ("topk_group", of)):
        if value is not None and value < 1:
            raise fields.refusal(name, value, "1 or more")
    # Within one group there is nothing to choose.
    if groups is not None and groups > 1:
        found |= {"moe_router_num_groups": groups, "moe_router_group_topk": of}
    return found


def write_experts(language: LanguageConfig, traits: Traits) -> dict[str, Any]:
    """The inverse of `read_experts`; a dense model is one whose dense layers never end."""
    if language.num_moe_experts is None:
        return {"first_k_dense_replace": language.num_layers}
    width, shared = language.moe_ffn_hidden_size, language.moe_shared_expert_intermediate_size
    assert width is not None
    if not shared or shared % width:
        raise traits.refusal(
            "moe_shared_expert_intermediate_size", f"a multiple of moe_ffn_hidden_size {width}"
        )
    return {
        "n_routed_experts": language.num_moe_experts,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "num_experts_per_tok": language.moe_router_topk,
        "first_k_dense_replace": language.first_k_dense_replace,
        "norm_topk_prob": language.moe_router_topk > 1,
        "routed_scaling_factor": language.moe_router_topk_scaling_factor,
        "n_group": language.moe_router_num_groups or 1,
        "topk_group": language.moe_router_group_topk or 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        # vLLM reads it of dots.llm1 too, and knows no "noaux_tc".
        "scoring_func": "sigmoid",
    }


def neutral(fields: Fields, names: Iterable[str]) -> None:
    """Fields that a family's class has and that change nothing here."""
    for name in names:
        fields.take(name, None)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
