"""The encoder against a plain one written from the published configuration: picture by picture,
a real convolution, patches in raster order, loops over heads, complex numbers for the rotation.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.config import AdapterConfig, VisionConfig
from megatron_vlm.models.adapter import Adapter
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.navit import NaViT

pytestmark = pytest.mark.unit

VISION = VisionConfig(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=3,
    ffn_hidden_size=80,
    rotary_base=50.0,
    layernorm_epsilon=1e-3,
)
ADAPTER = AdapterConfig(layernorm_epsilon=1e-2)
LANGUAGE = 40
SEED = VISION.model_copy(update={"gated_linear_unit": False, "qk_layernorm": True})
OPTIONS = {
    "dots": (VISION, ADAPTER),
    "seed": (SEED, AdapterConfig(merge="average", layernorm_epsilon=1e-2)),
    "average_wide": (VISION, AdapterConfig(merge="average", hidden_size=56)),
    "narrow": (VISION, AdapterConfig(hidden_size=24)),
}
"""dots.vlm1's encoder, and the departures from it that a configuration may ask for."""
SEED_PUBLISHED = VisionConfig(
    num_layers=27,
    hidden_size=1280,
    num_attention_heads=20,
    ffn_hidden_size=5120,
    gated_linear_unit=False,
)
PUBLISHED = VisionConfig(
    num_layers=42, hidden_size=1536, num_attention_heads=12, ffn_hidden_size=4224
)

SIZES = [(28, 28), (112, 56), (28, 168), (84, 84), (56, 28)]
"""Height and width in pixels: every multiple of 28 is a size of its own."""


def build(
    recompute: str = "none", dtype: torch.dtype = torch.float64, option: str = "dots"
) -> VisionEncoder:
    """An encoder whose every parameter is random, norms and biases included."""
    encoder = VisionEncoder(*OPTIONS[option], LANGUAGE, recompute)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data = (values * scale + ("norm" in name)).to(dtype)
    return encoder


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=draw, dtype=torch.float64) for size in sizes]


def block_order(height: int, width: int) -> list[int]:
    """Raster index of each patch in the order in which they are packed."""
    return [
        (top + i) * width + left + j
        for top in range(0, height, 2)
        for left in range(0, width, 2)
        for i in range(2)
        for j in range(2)
    ]


def pack(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`pixel_values` and `grid_hw` of pictures, cut patch by patch."""
    patches, grids = [torch.zeros(0, 588, dtype=torch.float64)], []
    for image in images:
        height, width = image.shape[1] // 14, image.shape[2] // 14
        grids.append([height, width])
        for index in block_order(height, width):
            row, column = divmod(index, width)
            patch = image[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            patches.append(patch.reshape(1, 588))
    return torch.cat(patches), torch.tensor(grids, dtype=torch.int64).view(-1, 2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + VISION.layernorm_epsilon).sqrt() * weight


def turn(x: Tensor, height: int, width: int) -> Tensor:
    """Rotate one head's channels of patches in raster order."""
    half = x.shape[1] // 2
    rates = [VISION.rotary_base ** (-2 * i / half) for i in range(half // 2)]
    angles = [
        [row * rate for rate in rates] + [column * rate for rate in rates]
        for row in range(height)
        for column in range(width)
    ]
    phase = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
    turned = torch.complex(x[:, :half], x[:, half:]) * phase
    return torch.cat([turned.real, turned.imag], 1)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def plain_trunk(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """One picture [3, height, width] -> [patches, hidden] in raster order."""
    hidden, heads = VISION.hidden_size, VISION.num_attention_heads
    size = hidden // heads
    kernel = state["patch_embed.proj.weight"].view(hidden, 3, 14, 14)
    features = F.conv2d(image[None], kernel, state["patch_embed.proj.bias"], stride=14)[0]
    height, width = features.shape[1:]
    x = rms_norm(features.flatten(1).T, state["patch_embed.norm.weight"])
    for layer in range(VISION.num_layers):
        weights = {
            name.split(".", 2)[2]: value
            for name, value in state.items()
            if name.startswith(f"blocks.{layer}.")
        }
        y = rms_norm(x, weights["norm1.weight"])
        q_weight, k_weight, v_weight = weights["qkv.weight"].chunk(3)
        attended = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k = y @ q_weight[part].T, y @ k_weight[part].T
            if "q_norm.weight" in weights:
                q, k = rms_norm(q, weights["q_norm.weight"]), rms_norm(k, weights["k_norm.weight"])
            q, k = turn(q, height, width), turn(k, height, width)
            scores = torch.einsum("qc,kc->qk", q, k) / size**0.5
            attended.append(scores.softmax(1) @ (y @ v_weight[part].T))
        x = x + torch.cat(attended, 1) @ weights["proj.weight"].T
        y = rms_norm(x, weights["norm2.weight"])
        first = y @ weights["fc1.weight"].T
        if "fc3.weight" in weights:
            inner = first * torch.sigmoid(first) * (y @ weights["fc3.weight"].T)
        else:
            inner = gelu(first)
        x = x + inner @ weights["fc2.weight"].T
    return rms_norm(x, state["post_trunk_norm.weight"])


def plain_adapter(
    state: dict[str, Tensor], x: Tensor, height: int, width: int, adapter: AdapterConfig
) -> Tensor:
    """[patches, hidden] in raster order -> [tokens, LANGUAGE]."""
    mean = x.mean(1, keepdim=True)
    deviation = ((x - mean).square().mean(1, keepdim=True) + adapter.layernorm_epsilon).sqrt()
    x = ((x - mean) / deviation * state["norm.weight"] + state["norm.bias"]).view(height, width, -1)
    tokens = []
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            four = [x[row + i, column + j] for i in range(2) for j in range(2)]
            merged = (
                sum(four, torch.zeros(())) / 4 if adapter.merge == "average" else torch.cat(four)
            )
            y = gelu(state["fc1.weight"] @ merged + state["fc1.bias"])
            tokens.append(state["fc2.weight"] @ y + state["fc2.bias"])
    return torch.stack(tokens)


def plain_encoder(
    encoder: VisionEncoder, images: list[Tensor], option: str = "dots"
) -> tuple[Tensor, Tensor]:
    """Trunk features in packed order, and tokens."""
    trunk = dict(encoder.trunk.named_parameters())
    adapter = dict(encoder.adapter.named_parameters())
    features, tokens = [], []
    for image in images:
        height, width = image.shape[1] // 14, image.shape[2] // 14
        raster = plain_trunk(trunk, image)
        features.append(raster[block_order(height, width)])
        tokens.append(plain_adapter(adapter, raster, height, width, OPTIONS[option][1]))
    return torch.cat(features), torch.cat(tokens)


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_plain_encoder(option: str) -> None:
    encoder, images = build(option=option), pictures(SIZES)
    pixels, grid_hw = pack(images)
    features, tokens = plain_encoder(encoder, images, option)
    torch.testing.assert_close(encoder.trunk(pixels, grid_hw), features)
    torch.testing.assert_close(encoder(pixels, grid_hw), tokens)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_equal_the_plain_encoder(option: str) -> None:
    encoder, images = build(option=option), pictures(SIZES[:3])
    parameters = list(encoder.parameters())
    ours = torch.autograd.grad(encoder(*pack(images)).square().sum(), parameters)
    theirs = torch.autograd.grad(
        plain_encoder(encoder, images, option)[1].square().sum(), parameters
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("size", [(28, 28), (28, 420), (308, 28), (196, 252)])
def test_every_resolution_in_multiples_of_28(size: tuple[int, int]) -> None:
    encoder, images = build(), pictures([size])
    torch.testing.assert_close(encoder(*pack(images)), plain_encoder(encoder, images)[1])


def test_packing_changes_no_picture() -> None:
    """Alone, packed, in another order and among other pictures: the same features."""
    encoder, images = build(), pictures(SIZES)
    alone = [encoder(*pack([image])) for image in images]
    torch.testing.assert_close(encoder(*pack(images)), torch.cat(alone))
    torch.testing.assert_close(encoder(*pack(images[::-1])), torch.cat(alone[::-1]))
    changed = [*pictures(SIZES[:2], seed=9), images[2], *pictures(SIZES[3:], seed=9)]
    start, length = len(alone[0]) + len(alone[1]), len(alone[2])
    mixed = encoder(*pack(changed))
    torch.testing.assert_close(mixed[start : start + length], alone[2])
    assert not torch.allclose(mixed[:start], torch.cat(alone[:2]))


def test_a_picture_sends_no_gradient_to_another() -> None:
    encoder, images = build(), pictures(SIZES)
    pixels, grid_hw = pack(images)
    pixels.requires_grad_()
    patches = grid_hw.prod(1).tolist()
    tokens = encoder(pixels, grid_hw).split([n // 4 for n in patches])
    (gradient,) = torch.autograd.grad(tokens[1].sum(), pixels)
    for i, part in enumerate(gradient.split(patches)):
        assert bool((part != 0).any()) == (i == 1)


def test_no_picture_gives_no_token_and_zero_gradients() -> None:
    encoder = build()
    tokens = encoder(*pack([]))
    assert tokens.shape == (0, LANGUAGE)
    tokens.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("option", ["dots", "seed"])
def test_recompute_changes_no_bit(option: str, mode: str, dtype: torch.dtype) -> None:
    images = pictures(SIZES)
    pixels, grid_hw = pack(images)
    results: list[list[Any]] = []
    saved: list[int] = []
    for recompute in ("none", mode):
        encoder = build(recompute, dtype, option)
        weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tokens = encoder(pixels.to(dtype), grid_hw)
        tokens.float().square().sum().backward()
        results.append([tokens, *(p.grad for p in encoder.parameters())])
        saved.append(sum(size for place, size in kept.items() if place not in weights))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert saved[1] < 0.8 * saved[0], "recompute must keep less for the backward pass"


def test_no_gradients_no_recompute() -> None:
    pixels, grid_hw = pack(pictures(SIZES))
    with torch.no_grad():
        outputs = [build(mode)(pixels, grid_hw) for mode in ("none", "selective", "full")]
    assert all(torch.equal(outputs[0], out) and not out.requires_grad for out in outputs)


def test_grids_that_do_not_fit_are_refused() -> None:
    trunk = build().trunk
    with pytest.raises(ValueError, match=r"holds 12 patches.*\[\[2, 4\]\].*8"):
        trunk(torch.zeros(12, 588, dtype=torch.float64), torch.tensor([[2, 4]]))
    with pytest.raises(ValueError, match="3x4 must be positive multiples of 2"):
        trunk(torch.zeros(12, 588, dtype=torch.float64), torch.tensor([[3, 4]]))


def _on_meta() -> None:
    """Print the shapes of the published trunks and of an adapter to 7,168 channels, as JSON."""
    with torch.device("meta"):
        trunk = NaViT(PUBLISHED)
        adapter = Adapter(AdapterConfig(), PUBLISHED, 7168)
        seed = NaViT(SEED_PUBLISHED)
    modules = {"trunk": trunk, "adapter": adapter, "seed": seed}
    assert all(p.is_meta for module in modules.values() for p in module.parameters())
    shapes = {
        part: {name: tuple(p.shape) for name, p in module.named_parameters()}
        for part, module in modules.items()
    }
    print(json.dumps(shapes))


def test_published_sizes() -> None:
    """dots.vlm1 gives 1.2B for its encoder, whose adapter leads to 7,168 channels.

    In a process of its own: here the engine's CPU platform may have wrapped torch's factories.
    """
    command = f"from {__name__} import _on_meta; _on_meta()"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=True
    )
    shapes = json.loads(done.stdout)
    counts = {
        part: sum(math.prod(shape) for shape in parameters.values())
        for part, parameters in shapes.items()
    }
    width, inner = 1536, 4224
    embed = 14 * 14 * 3 * width + width + width
    block = 4 * width**2 + 3 * width * inner + 2 * width
    assert counts["trunk"] == embed + 42 * block + width == 1_214_894_592
    assert shapes["trunk"]["patch_embed.proj.weight"] == [1536, 588]
    assert shapes["trunk"]["patch_embed.proj.bias"] == [1536]
    merged = 4 * width
    assert counts["adapter"] == 2 * width + (merged + 7168) * (merged + 1) == 81_805_312
    # Seed1.5-VL gives 532M for its encoder.
    width, inner = 1280, 5120
    embed = 14 * 14 * 3 * width + width + width
    block = 4 * width**2 + 2 * width * inner + 2 * width
    assert counts["seed"] == embed + 27 * block + width == 531_667_200
