"""M-RoPE's angles against transformers' Qwen2-VL and Qwen3-VL, and the engine's own table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vlm.config import LanguageConfig

pytestmark = pytest.mark.unit

SECTION = (8, 4, 4)


def _language(**fields: Any) -> LanguageConfig:
    sizes = {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "ffn_hidden_size": 8,
        "vocab_size": 8,
        "rotary_base": 1e4,
        "mrope_section": SECTION,
    }
    return LanguageConfig(**(sizes | fields))


def _theirs(interleaved: bool, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[tokens, channels]`."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": list(SECTION),
        },
    }
    if interleaved:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

        module = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**shape))
    else:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

        module = Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**shape))
    cosine, sine = module(torch.zeros(1), positions[:, None])
    return cosine.reshape(-1, 32), sine.reshape(-1, 32)


@pytest.mark.parametrize("interleaved", [False, True], ids=["sections", "interleaved"])
def test_as_published(interleaved: bool) -> None:
    from megatron_vlm.models.language.rotary import inverse_frequencies, multimodal_angles

    language = _language(mrope_interleaved=interleaved)
    positions = torch.randint(0, 300, (3, 50), generator=torch.Generator().manual_seed(1))
    angles = multimodal_angles(language, positions, inverse_frequencies(language))
    assert angles.shape == (50, 1, 1, 32) and angles.dtype == torch.float32
    cosine, sine = _theirs(interleaved, positions)
    torch.testing.assert_close(angles.flatten(1).cos(), cosine, rtol=0, atol=2e-5)
    torch.testing.assert_close(angles.flatten(1).sin(), sine, rtol=0, atol=2e-5)


@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
def test_text_rotates_as_without(neighbours: bool) -> None:
    """The same place in all three dimensions: the engine's own table, row by row."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_vlm.models.language.rotary import inverse_frequencies, multimodal_angles

    language = _language(rotary_interleaved=neighbours)
    positions = torch.arange(40)
    found = multimodal_angles(language, positions.expand(3, -1), inverse_frequencies(language))
    engine = RotaryEmbedding(
        32, 1.0, rotary_interleaved=neighbours, rotary_base=10000, use_cpu_initialization=True
    )
    torch.testing.assert_close(found, engine.get_emb(40), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mrope_section": (8, 4, 5)}, "add up to the 16 channel pairs"),
        ({"mrope_section": (12, 4, 0)}, "three numbers from 1 on"),
        ({"mrope_section": None, "mrope_interleaved": True}, "without mrope_section"),
        ({"mrope_section": (2, 7, 7), "mrope_interleaved": True}, "every third of the 16 pairs"),
    ],
    ids=["sum", "zero", "alone", "uneven"],
)
def test_sections_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _language(**fields)
