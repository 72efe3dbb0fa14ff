"""The encoder against the vision tower of transformers' Dots3Note, where the two are the same.

That tower is the later one of the authors of dots.vlm1: queries and keys are normed, and its last
layers have experts. With dense layers and our queries and keys normed too, everything else must
agree: patch embedding, 2-D positions, attention per picture, SwiGLU, norms and the merger.
"""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.config import AdapterConfig, VisionConfig

pytestmark = pytest.mark.unit

# Theirs turns angles into float32, whatever the weights are.
TOLERANCE = 1e-6
WIDTH = 20
GRIDS = torch.tensor([[4, 6], [2, 2], [8, 2], [6, 6]])
OURS = VisionConfig(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    ffn_hidden_size=80,
    qk_layernorm=True,
    rotary_base=1e4,
    max_pixels=50176,
)
NAMES = {
    "patch_embed.proj": "trunk.patch_embed.proj",
    "patch_embed.norm": "trunk.patch_embed.norm",
    "norm": "trunk.post_trunk_norm",
    "merger.ln_q": "adapter.norm",
    "merger.mlp.0": "adapter.fc1",
    "merger.mlp.2": "adapter.fc2",
}
IN_BLOCKS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm",
    "mlp.gate_proj": "fc1",
    "mlp.up_proj": "fc3",
    "mlp.down_proj": "fc2",
}


def _our_name(theirs: str) -> str:
    module, _, kind = theirs.rpartition(".")
    if not module.startswith("blocks."):
        return f"{NAMES[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    return f"trunk.blocks.{number}.{IN_BLOCKS[inner]}.{kind}"


def test_features_and_gradients_match_transformers() -> None:
    from transformers.models.dots3_note.configuration_dots3_note import Dots3NoteVisionConfig
    from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteVisionModel

    from megatron_vlm.models.vision.encoder import VisionEncoder

    config = Dots3NoteVisionConfig(
        hidden_size=OURS.hidden_size,
        intermediate_size=OURS.ffn_hidden_size,
        num_hidden_layers=OURS.num_layers,
        num_attention_heads=OURS.num_attention_heads,
        mlp_layer_types=["dense"] * OURS.num_layers,
        adapter_in_dim=OURS.hidden_size,
        adapter_out_dim=WIDTH,
        rope_parameters={"rope_type": "axial", "rope_theta": OURS.rotary_base},
        rms_norm_eps=OURS.layernorm_epsilon,
        attn_implementation="sdpa",
    )
    theirs = Dots3NoteVisionModel(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = 0.2 if value.dim() == 1 else value[0].numel() ** -0.5
            value.copy_(noise * scale + ("norm" in name and "weight" in name))
    ours = VisionEncoder(OURS, AdapterConfig(), WIDTH).double()
    shapes = {name: value.shape for name, value in ours.named_parameters()}
    weights = {_our_name(name): value for name, value in theirs.named_parameters()}
    assert weights.keys() == shapes.keys()
    ours.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    patches = int(GRIDS.prod(dim=1).sum())
    pixels = torch.randn(patches, 588, generator=generator, dtype=torch.float64)
    found = ours(pixels, GRIDS)
    grid_thw = torch.cat([torch.ones(len(GRIDS), 1, dtype=torch.int64), GRIDS], dim=1)
    expected = theirs(pixel_values=pixels, grid_thw=grid_thw).pooler_output
    assert found.shape == expected.shape == (patches // 4, WIDTH)
    assert (found - expected).norm() < TOLERANCE * expected.norm()
    seed = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    found.backward(seed)
    expected.backward(seed)
    gradients = dict(ours.named_parameters())
    for name, value in theirs.named_parameters():
        mine = gradients[_our_name(name)].grad
        assert mine is not None and value.grad is not None
        gap = (mine.reshape(value.shape) - value.grad).norm()
        assert gap < TOLERANCE * value.grad.norm(), name
