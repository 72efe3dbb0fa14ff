"""Against transformers itself: its folders are imported, and it loads what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.release.folders import CONFIGS, assert_identical, read_tensors, write_folder
from tests.release.test_hub_models import run_outside

CASES = ("dots1", "deepseek_v3", "deepseek_v3_plain", "qwen2", "qwen2_tied")


def _save(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A model of transformers' own with random weights, and its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers neither builds nor saves the layers of multi-token prediction.
    values = dict(CONFIGS[name]) | {"num_nextn_predict_layers": 0}
    if not name.startswith("deepseek"):
        del values["num_nextn_predict_layers"]
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        # Norms and biases too, or swapping two of them would show nothing.
        parameter.data.normal_(0, 0.3)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("correction_bias"):
            buffer.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


@pytest.mark.unit
@pytest.mark.parametrize("name", CASES)
def test_its_folders_come_back_and_load(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    model = _save(tmp_path / "theirs", name, torch.bfloat16)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", max_shard_bytes=40_000)
    tensors = read_tensors(tmp_path / "theirs")
    assert_identical(read_tensors(tmp_path / "back"), tensors)
    # Sharded in another order, but otherwise the index is theirs.
    indexes = [
        json.loads((tmp_path / place / "model.safetensors.index.json").read_text())
        for place in ("theirs", "back")
    ]
    assert indexes[0]["weight_map"].keys() == indexes[1]["weight_map"].keys()
    assert indexes[0]["metadata"]["total_size"] == indexes[1]["metadata"]["total_size"]
    assert indexes[0]["metadata"].keys() == indexes[1]["metadata"].keys()
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    for key, values in model.state_dict().items():
        assert torch.equal(state[key], values), key
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


SEEING = [name for name, config in CONFIGS.items() if "vision_config" in config]


@pytest.mark.unit
def test_models_that_see_load_and_come_back(tmp_path: Path) -> None:
    """Where only transformers is installed; what it then saves is imported again."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    tensors, folders = {}, {}
    for name in SEEING:
        ahead = {"num_nextn_predict_layers": 0} if "kv_lora_rank" in CONFIGS[name] else {}
        place = tmp_path / name
        tensors[name] = write_folder(place / "theirs", name, **ahead)
        import_folder(place / "theirs", place / "ours")
        folders[name] = place / "release"
        export_checkpoint(place / "ours", folders[name])
    run_outside(tmp_path, "resave", *folders.values())
    for name, folder in folders.items():
        import_folder(folder / "saved", folder.parent / "again")
        export_checkpoint(folder.parent / "again", folder.parent / "back", dtype="float32")
        found = read_tensors(folder.parent / "back")
        # Loaded in one dtype, routers are rounded; nothing else is.
        expected = {
            tensor: (values if "correction_bias" in tensor else values.bfloat16()).float()
            for tensor, values in tensors[name].items()
        }
        assert_identical(found, expected)


def _logits(world: World, config: RunConfig, checkpoint: Path, tokens: torch.Tensor) -> Any:
    from megatron_vlm.checkpoint.checkpointer import load_model
    from megatron_vlm.models.language.packing import PackedRows
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology

    topology = build_topology(resolve_layout(config, 1), start_distributed(world))
    model = build_model(config, topology)
    load_model(checkpoint, model, config)
    (decoder,) = model.chunks
    decoder.eval()
    bounds = torch.tensor([0, tokens.size(1)], dtype=torch.int32)
    rows = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=tokens.size(1),
        max_seqlen_kv=tokens.size(1),
        position_ids=torch.arange(tokens.size(1)),
    )
    with torch.no_grad():
        logits = decoder(
            input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=rows
        )
    stop()
    return logits


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_imported_models_say_the_same(name: str, tmp_path: Path) -> None:
    """Logits of every position, from weights that went through an import."""
    from megatron_vlm.release.importing import import_folder

    model = _save(tmp_path / "theirs", name, torch.float32)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    config = load_recipe(tmp_path / "ours" / "iter_0000000" / "config.yaml")
    tokens = torch.randint(config.model.language.vocab_size, (1, 40))
    (ours,) = run_ranks(1, _logits, config, tmp_path / "ours", tokens)
    with torch.no_grad():
        theirs = model(tokens).logits
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
