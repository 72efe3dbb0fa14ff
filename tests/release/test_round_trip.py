"""Import, then export: every tensor comes back to the last bit, under its name, in its dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.release.folders import CONFIGS, assert_identical, read_tensors, write_folder

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    tensors = write_folder(tmp_path / "theirs", name, shards=3)
    # Several data files, so that parts of a tensor lie in different ones.
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours", file_bytes=30_000)
    assert len(list(imported.checkpoint.glob("*.distcp"))) > 1
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "back", max_shard_bytes=20_000)
    assert_identical(read_tensors(tmp_path / "back"), tensors)
    assert exported.shards > 1
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for field in original.keys() - {"rope_scaling"}:
        assert config[field] == original[field], field
    # Once more, from what we have written ourselves.
    again = import_folder(tmp_path / "back", tmp_path / "again")
    assert again.model == imported.model


def test_a_tied_head_may_be_written_out(tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder
    from tests.release.folders import write_tensors

    tensors = write_folder(tmp_path / "theirs", "qwen2_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path / "theirs", tensors)
    import_folder(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_of_an_export(dtype: str, tmp_path: Path) -> None:
    """Weights become what is asked for; the expert bias stays as it is trained."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    tensors = write_folder(tmp_path / "theirs", "dots1")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    wanted = getattr(torch, dtype)
    expected = {
        name: values if name.endswith("correction_bias") else values.to(wanted)
        for name, values in tensors.items()
    }
    assert_identical(read_tensors(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_of_an_import(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an export's: expert biases become float32, also where they are stored in half of it."""
    from megatron_vlm.release import source
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder
    from tests.release.folders import write_tensors

    # So small that every tensor is converted in several parts, the last one short.
    monkeypatch.setattr(source, "_CONVERTED_BYTES", 100)
    tensors = write_folder(tmp_path / "theirs", "dots1")
    biases = [name for name in tensors if name.endswith("correction_bias")]
    tensors[biases[0]] = tensors[biases[0]].bfloat16()
    write_tensors(tmp_path / "theirs", tensors)
    import_folder(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    expected = {
        name: values.to(torch.float32 if name in biases else getattr(torch, dtype))
        for name, values in tensors.items()
    }
    assert_identical(read_tensors(tmp_path / "back"), expected)
