"""The encoder of an exported folder against the trainer's: names, and features."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_vlm.config import AdapterConfig, LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.models.hf.vision import write_vision
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.release.hub_files import HUB
from tests.release.released import perturb, released_encoder

pytestmark = pytest.mark.unit

LANGUAGE = LanguageConfig(
    num_layers=1, hidden_size=40, num_attention_heads=4, ffn_hidden_size=8, vocab_size=8
)
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "ffn_hidden_size": 80,
}
MODELS = {
    "dots": ({}, {}),
    "seed": ({"gated_linear_unit": False}, {"merge": "average"}),
    "every_option": (
        {"qk_layernorm": True, "rotary_base": 50.0, "layernorm_epsilon": 1e-3},
        {"merge": "average", "hidden_size": 56, "layernorm_epsilon": 1e-2},
    ),
    "narrow": ({"qk_layernorm": True}, {"hidden_size": 24}),
}
GRIDS = [(2, 2), (8, 4), (2, 12), (6, 6), (4, 2)]


@pytest.fixture(scope="module")
def hub() -> ModuleType:
    """vision_megatron_vlm.py, imported as a file of its own."""
    spec = importlib.util.spec_from_file_location("hub_vision", HUB / "vision_megatron_vlm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The configuration's types are looked up by its module's name.
    sys.modules["hub_vision"] = module
    spec.loader.exec_module(module)
    return module


def _both(hub: ModuleType, name: str, dtype: torch.dtype) -> tuple[VisionEncoder, Any]:
    vision, adapter = MODELS[name]
    model = ModelConfig(
        vision=VisionConfig(**SIZES, **vision), adapter=AdapterConfig(**adapter), language=LANGUAGE
    )
    assert model.vision is not None
    ours = VisionEncoder(model.vision, model.adapter, LANGUAGE.hidden_size).to(dtype)
    perturb(ours, seed=0)
    theirs = hub.VisionTower(hub.VisionConfig(**write_vision(model))).to(dtype)
    theirs.load_state_dict(released_encoder(ours.state_dict()), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_features(hub: ModuleType, name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = _both(hub, name, dtype)
    pixels = torch.randn(sum(h * w for h, w in GRIDS), 588, dtype=dtype)
    with torch.no_grad():
        mine = ours(pixels, torch.tensor(GRIDS))
        other = theirs(pixels, torch.tensor([(1, *grid) for grid in GRIDS]))
    assert mine.shape == other.shape == (len(pixels) // 4, LANGUAGE.hidden_size)
    assert float((mine - other).abs().max()) <= tolerance * float(mine.abs().max())


def test_frames_are_seen_apart(hub: ModuleType) -> None:
    _, theirs = _both(hub, "dots", torch.float64)
    pixels = torch.randn(3 * 8, 588, dtype=torch.float64)
    together = theirs(pixels, torch.tensor([[3, 4, 2]]))
    torch.testing.assert_close(together, theirs(pixels, torch.tensor([[1, 4, 2]] * 3)))


def test_names_of_the_released_encoder(hub: ModuleType) -> None:
    _, theirs = _both(hub, "dots", torch.float32)
    block = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.fc3"]
    expected = {f"blocks.{i}.{name}.weight" for i in range(3) for name in block}
    expected |= {f"patch_embed.patchifier.{name}" for name in ("proj.weight", "proj.bias")}
    expected |= {"patch_embed.patchifier.norm.weight", "post_trunk_norm.weight"}
    merger = ("ln_q", "mlp.0", "mlp.2")
    expected |= {f"merger.{name}.{kind}" for name in merger for kind in ("weight", "bias")}
    state = theirs.state_dict()
    assert set(state) == expected
    assert state["patch_embed.patchifier.proj.weight"].shape == (48, 3, 14, 14)


def test_pictures_that_do_not_fit_are_refused(hub: ModuleType) -> None:
    _, theirs = _both(hub, "dots", torch.float32)
    with pytest.raises(ValueError, match=r"holds 12 patches.*\[\[1, 2, 4\]\].*8"):
        theirs(torch.zeros(12, 588), torch.tensor([[1, 2, 4]]))
    with pytest.raises(ValueError, match="3x4: expected multiples of 2"):
        theirs(torch.zeros(12, 588), torch.tensor([[1, 3, 4]]))
