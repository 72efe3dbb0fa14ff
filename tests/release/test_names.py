"""Which of their tensors an import puts where: against readers that know nothing of our tables.

Files have a name and random numbers for each tensor. transformers reads them by itself, layers of
multi-token prediction included, and tests/deepseek_map.py says which of its weights is which of
ours; that map is proven by losses and gradients (tests/models/test_deepseek_forward.py), the map
of the encoder by features (test_hub_vision.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vlm.checkpoint.stored import StoredTensors
from megatron_vlm.config import LanguageConfig
from tests.deepseek_map import to_deepseek
from tests.dots1_map import to_dots1
from tests.release.folders import CONFIGS, read_tensors, write_folder
from tests.release.released import released_encoder

pytestmark = pytest.mark.unit

# Of layer 61 in DeepSeek-V3's model.safetensors.index.json; the rest is a layer like others.
PREDICTION = (
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
)


def _imported(folder: Path, name: str) -> tuple[dict[str, Tensor], LanguageConfig]:
    """What a checkpoint holds of a folder of `CONFIGS[name]`, in float32, and the decoder."""
    from megatron_vlm.release.importing import import_folder

    write_folder(folder / "theirs", name)
    # One dtype, as transformers loads a model.
    imported = import_folder(folder / "theirs", folder / "ours", dtype="float32")
    found = {}
    with StoredTensors(imported.checkpoint) as stored:
        for key, tensor in stored.tensors.items():
            found[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
            stored.read(key, 0, found[key].view(-1))
    return found, imported.model.language


def _of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor.float()), name


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_plain"])
def test_deepseek_and_its_prediction(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    ours, language = _imported(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    expected = dict(model.state_dict())
    if language.mtp_num_layers:
        layer = f"model.layers.{language.num_layers}."
        names = {key.removeprefix(layer) for key in read_tensors(tmp_path / "theirs")}
        # What the class leaves to the loader below; 61 in the release.
        model._keys_to_ignore_on_load_unexpected = [layer.replace(".", r"\.") + ".*"]
        assert names >= set(PREDICTION)
        ahead = MtpModel.from_pretrained(model).state_dict()
        # Embedding and head are the model's own.
        expected |= {
            f"mtp.{key}": tensor for key, tensor in ahead.items() if key.startswith("layers.")
        }
        assert any(key.endswith(".hnorm.weight") for key in expected)
    _assert_same(to_deepseek(_of(ours, "language.")), expected)


@pytest.mark.parametrize("name", ["dots1", "megatron_vlm"])
def test_dots1(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ours, language = _imported(tmp_path, name)
    values = dict(CONFIGS["dots1"])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs",
        config=AutoConfig.for_model(values.pop("model_type"), **values),
        dtype=torch.float32,
    )
    _assert_same(to_dots1(_of(ours, "language."), language), dict(model.state_dict()))


@pytest.mark.parametrize("name", [name for name in CONFIGS if "vision_config" in CONFIGS[name]])
def test_encoders(name: str, tmp_path: Path) -> None:
    """Norms of queries and keys included, where the encoder has any."""
    ours, _ = _imported(tmp_path, name)
    files = read_tensors(tmp_path / "theirs")
    _assert_same(released_encoder(_of(ours, "vision.")), _of(files, "vision_tower."))
