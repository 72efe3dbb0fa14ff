"""An imported checkpoint loads in every layout, and every layout's checkpoint exports alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.dots1_map import to_dots1
from tests.ranks import run_ranks
from tests.release.folders import assert_identical, read_tensors, write_folder
from tests.training_case import assemble, local_parts

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"parallel.{kind}_model_parallel_size=2" for kind in ("tensor", "pipeline", "expert"))
SIZES = {"vocab_size": 64, "num_hidden_layers": 4}
"""Which two ranks can share."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, (TP,)),
    "ep2": (2, (EP,)),
    "pp2": (2, (PP,)),
    "tp2_ep2": (4, (TP, EP)),
    "ep2_etp2": (4, (TP, EP, "parallel.expert_tensor_parallel_size=2")),
}


def _config(checkpoint: Path, words: tuple[str, ...]) -> RunConfig:
    file = checkpoint / "iter_0000000" / "config.yaml"
    return load_recipe(file, ["training.global_batch_size=4", *words])


def _load(world: World, checkpoint: Path, config: RunConfig) -> list[Any]:
    from megatron_vlm.checkpoint.checkpointer import load_model
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    topology = build_topology(resolve_layout(config, world.world_size), start_distributed(world))
    model = build_model(config, topology)
    for entry in model.sharded_state_dict().values():
        entry.data.detach().fill_(float("nan"))
    load_model(checkpoint, model, config)
    parts = local_parts(model.sharded_state_dict())
    destroy_topology()
    stop()
    return parts


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a model with encoder, and the tensors it was made of."""
    from megatron_vlm.release.importing import import_folder

    folder = tmp_path_factory.mktemp("imported")
    tensors = write_folder(folder / "theirs", "megatron_vlm", shards=2, **SIZES)
    import_folder(folder / "theirs", folder / "ours", file_bytes=50_000)
    return folder / "ours", tensors


@pytest.mark.parametrize(("world_size", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_loads_in_any_layout(
    imported: tuple[Path, dict[str, torch.Tensor]], world_size: int, words: tuple[str, ...]
) -> None:
    """Every number is where an independent map expects it."""
    checkpoint, tensors = imported
    config = _config(checkpoint, words)
    loaded = assemble(run_ranks(world_size, _load, checkpoint, config))
    language = {
        name.removeprefix("language."): values
        for name, values in loaded.items()
        if name.startswith("language.")
    }
    found = to_dots1(language, config.model.language)
    for name, values in found.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            parts = [
                torch.cat([tensors[f"{prefix}{e}.{kind}_proj.weight"] for kind in ("gate", "up")])
                for e in range(len(values))
            ]
            expected = torch.stack(parts)
        elif name.endswith("experts.down_proj"):
            parts = [
                tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"]
                for e in range(len(values))
            ]
            expected = torch.stack(parts)
        else:
            expected = tensors[name]
        # In a bf16 run a router is bfloat16, whatever it is stored as.
        assert torch.equal(values, expected.to(values.dtype)), name
    kernel = tensors["vision_tower.patch_embed.patchifier.proj.weight"]
    assert torch.equal(loaded["vision.trunk.patch_embed.proj.weight"], kernel.flatten(1))
    assert torch.equal(loaded["vision.adapter.fc2.bias"], tensors["vision_tower.merger.mlp.2.bias"])


def _save_again(world: World, checkpoint: Path, config: RunConfig, root: Path) -> None:
    from megatron_vlm.checkpoint.checkpointer import load_model
    from megatron_vlm.checkpoint.folder import find_checkpoint, read_state
    from megatron_vlm.checkpoint.writer import CheckpointWriter
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    topology = build_topology(resolve_layout(config, world.world_size), start_distributed(world))
    model = build_model(config, topology)
    load_model(checkpoint, model, config)
    writer = CheckpointWriter(root, False, None, None)
    state = read_state(find_checkpoint(checkpoint))
    writer.write(1, model.sharded_state_dict(), state, {})
    writer.close()
    destroy_topology()
    stop()


@pytest.mark.parametrize(("world_size", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_exports_alike_from_any_layout(
    imported: tuple[Path, dict[str, torch.Tensor]],
    world_size: int,
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """Saved by ranks that cut it differently, it is still the release that it came from."""
    from megatron_vlm.release.exporting import export_checkpoint

    checkpoint, tensors = imported
    config = _config(checkpoint, words)
    run_ranks(world_size, _save_again, checkpoint, config, tmp_path / "checkpoints")
    written = {file.name.split("_")[2] for file in (tmp_path / "checkpoints").rglob("__*.distcp")}
    assert (len(written) > 1) is (world_size > 1)
    export_checkpoint(tmp_path, tmp_path / "release")
    # The engine keeps routers in the run's precision.
    expected = {
        name: values.bfloat16() if name.endswith("mlp.gate.weight") else values
        for name, values in tensors.items()
    }
    assert_identical(read_tensors(tmp_path / "release"), expected)
