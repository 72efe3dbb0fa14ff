"""The decoder's rotary embedding: frequencies, stretched or not, and rotation by position.

Frequencies are float32, as in the published modelling codes. Linear stretching divides them by a
factor; YaRN (arXiv 2309.00071, section 3) does so only for channels that turn less than once over
the original length, leaves those alone that turn often, and blends in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vlm.config.model_schema import LanguageConfig, RopeScalingConfig


def inverse_frequencies(language: LanguageConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each channel pair: float32 `[rotary_channels / 2]`."""
    channels, base = language.rotary_channels, language.rotary_base
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    own = 1.0 / base**exponents
    scaling = language.rope_scaling
    if scaling is None:
        return own
    stretched = own / scaling.factor
    if scaling.type == "linear":
        return stretched
    kept = 1 - _ramp(language, scaling, own)
    return stretched * (1 - kept) + own * kept


def multimodal_angles(language: LanguageConfig, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles of M-RoPE: each channel pair turns by the token's time, height or width.

    As published in the modelling codes of Qwen2-VL (section by section) and Qwen3-VL (in turn).

    Args:
        language: the decoder; its `mrope_section` is set.
        positions: int64 `[3, tokens]`: time, height and width.
        frequencies: float32 `[pairs]`, as `inverse_frequencies` gives them.

    Returns:
        float32 `[tokens, 1, 1, 2 * pairs]`, every angle twice, in the order of the engine's tables.
    """
    section = language.mrope_section
    assert section is not None
    dimension = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    if language.mrope_interleaved:
        dimension = torch.zeros_like(dimension)
        for number in (1, 2):
            dimension[number : 3 * section[number] : 3] = number
    turning = positions.to(frequencies).index_select(0, dimension.to(positions.device))
    angles = turning.t() * frequencies
    if language.rotary_interleaved:
        angles = angles.repeat_interleave(2, dim=1)
    else:
        angles = torch.cat([angles, angles], dim=1)
    return angles[:, None, None, :]


def rotary_factor(language: LanguageConfig) -> float:
    """What cosines and sines are multiplied with: YaRN's attention temperature."""
    scaling = language.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        above = _temperature(scaling.factor, scaling.mscale)
        return above / _temperature(scaling.factor, scaling.mscale_all_dim)
    return _temperature(scaling.factor, 1.0)


def latent_score_scale(language: LanguageConfig) -> float:
    """Factor on the scores of multi-latent attention (DeepSeek-V2's modelling code)."""
    channels = language.qk_head_dim + language.qk_pos_emb_head_dim
    scaling, scale = language.rope_scaling, channels**-0.5
    if scaling is not None and scaling.mscale_all_dim:
        scale *= _temperature(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotate(x: Tensor, angles: Tensor, factor: float, interleaved: bool) -> Tensor:
    """Rotate channel pairs.

    Args:
        x: `[tokens, heads, channels]`.
        angles: float32 `[tokens, channels / 2]`.
        factor: on cosines and sines.
        interleaved: pairs are neighbouring channels; else channel i and i + channels / 2. What
            comes out is laid out by halves either way: scores do not depend on it, as long as
            queries and keys agree.

    Returns:
        The shape and type of `x`.
    """
    cosine = (angles.cos() * factor).to(x.dtype).unsqueeze(1)
    sine = (angles.sin() * factor).to(x.dtype).unsqueeze(1)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _ramp(language: LanguageConfig, scaling: RopeScalingConfig, like: Tensor) -> Tensor:
    """0 where a pair keeps its frequency, 1 where it is stretched in full."""
    original = scaling.original_max_position_embeddings
    assert original is not None
    channels = language.rotary_channels

    def pair_that_turns(times: float) -> float:
        turns = math.log(original / (times * 2 * math.pi))
        return channels * turns / (2 * math.log(language.rotary_base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), channels - 1)
    pairs = torch.arange(channels // 2, dtype=torch.float32, device=like.device)
    # One step wide at least, else it would be 0/0 where both ends meet.
    return ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
