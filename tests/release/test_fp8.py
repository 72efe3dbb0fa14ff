"""Released float8 weights: their product with the factors, against a plain float64 reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vlm.errors import ConversionError
from tests.release.folders import assert_identical, read_tensors, write_folder, write_tensors

pytestmark = pytest.mark.unit

BLOCK = [16, 12]
"""Divides no matrix of the model evenly: blocks at the edges are ragged."""


def _reference(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Element by element in float64, rounded to float32 once: the exact product has 28 bits."""
    found = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.size(0)):
        for column in range(weight.size(1)):
            factor = scales[row // BLOCK[0], column // BLOCK[1]].double()
            found[row, column] = weight[row, column].double() * factor
    return found.to(torch.float32)


def _write_float8(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as DeepSeek-V3 is released; returns the weights multiplied out."""
    tensors = write_folder(folder, "deepseek_v3", hidden_size=40, intermediate_size=37)
    generator = torch.Generator().manual_seed(3)
    whole = dict(tensors)
    for name, values in list(tensors.items()):
        if values.dim() != 2 or not any(part in name for part in ("mlp.", "self_attn.")):
            continue
        if name.endswith("mlp.gate.weight"):
            continue
        weight = values.float().to(torch.float8_e4m3fn)
        blocks = [-(-size // block) for size, block in zip(values.shape, BLOCK, strict=True)]
        scales = torch.rand(blocks, generator=generator) * 1e-3
        tensors[name], tensors[f"{name}_scale_inv"] = weight, scales
        whole[name] = _reference(weight, scales)
    write_tensors(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": BLOCK,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return whole


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_float8_is_multiplied_out(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlm.release import fp8
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    # So small that a matrix is read in several parts, which begin inside blocks.
    monkeypatch.setattr(fp8, "_MOST_ELEMENTS", 100)
    whole = _write_float8(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    stored = read_tensors(tmp_path / "theirs")
    expected = {}
    for name, values in whole.items():
        if dtype == "float32":
            expected[name] = values.float()
        else:
            scaled = stored[name].dtype == torch.float8_e4m3fn
            expected[name] = values.bfloat16() if scaled else values
    assert_identical(read_tensors(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config


def test_settings_of_a_format_that_no_tensor_has(tmp_path: Path) -> None:
    """Weights multiplied out already, under a config.json that still speaks of float8."""
    from megatron_vlm.release.importing import import_folder

    write_folder(tmp_path / "theirs", "deepseek_v3")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    file.write_text(json.dumps(config))
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    _write_float8(tmp_path / "float8")
    config = json.loads((tmp_path / "float8" / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (tmp_path / "float8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="weight_block_size is None; expected two sizes"):
        import_folder(tmp_path / "float8", tmp_path / "theirs_too")


def test_parts_of_a_matrix_are_alike_wherever_they_are_cut() -> None:
    from megatron_vlm.release.fp8 import multiply_out

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 31, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 3, generator=generator)
    whole = multiply_out(weight, scales, (16, 12), 0, 0)
    assert torch.equal(whole, _reference(weight, scales))
    for row, column in ((0, 5), (17, 0), (33, 30)):
        part = multiply_out(weight[row:, column:], scales, (16, 12), row, column)
        assert torch.equal(part, whole[row:, column:])


@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "_scale_inv is missing"), ("misshapen", "expected F32"), ("half", "expected F32")],
)
def test_bad_factors(fault: str, message: str, tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder

    _write_float8(tmp_path / "theirs")
    tensors = read_tensors(tmp_path / "theirs")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name] = tensors[name].half()
    write_tensors(tmp_path / "theirs", tensors)
    with pytest.raises(ConversionError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
