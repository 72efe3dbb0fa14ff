"""Training goes on from an imported checkpoint, in any precision and from any dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import RankFailed
from tests.release.folders import read_tensors, write_folder
from tests.training_case import Outcome, recipe, train_case

pytestmark = pytest.mark.distributed

NANO = {"vocab_size": 384, "max_position_embeddings": 2048}
"""What the tests' data needs."""
STILL = (
    "training.train_iters=1",
    "optimizer.lr=1e-30",
    "optimizer.lr_warmup_iters=0",
    "model.language.moe_router_bias_update_rate=0",
)


def _import(folder: Path, dtype: str) -> Path:
    from megatron_vlm.release.importing import import_folder

    write_folder(folder / "theirs", "megatron_vlm", **NANO)
    import_folder(folder / "theirs", folder / dtype, dtype=dtype)
    return folder / dtype


def _start(checkpoint: Path, data: Path, run_dir: Path, precision: str, *words: str) -> Outcome:
    config = recipe(
        data,
        run_dir,
        f"model={checkpoint / 'iter_0000000' / 'model.yaml'}",
        f"training.precision={precision}",
        f"checkpoint.load={checkpoint}",
        *words,
    )
    return train_case(config, 1)


@pytest.mark.parametrize("stored", ["keep", "float32"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_taken_in_the_precision_of_the_run(
    stored: str, precision: str, nano_data: Path, tmp_path: Path
) -> None:
    from megatron_vlm.release.exporting import export_checkpoint

    checkpoint = _import(tmp_path, stored)
    words = (*STILL, "checkpoint.load_optimizer=false")
    run = _start(checkpoint, nano_data, tmp_path / "run", precision, *words)
    assert run.metrics[0]["iteration"] == 1 and run.metrics[0]["skipped_iterations"] == 0
    export_checkpoint(tmp_path / "run", tmp_path / "release")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    found, theirs = read_tensors(tmp_path / "release"), read_tensors(tmp_path / "theirs")
    assert found.keys() == theirs.keys()
    for name, values in theirs.items():
        full = name.endswith("correction_bias")
        assert found[name].dtype == (torch.float32 if full else dtype), name
        assert torch.equal(found[name], values if full else values.to(dtype)), name


def test_float32_export_takes_the_finer_weights(nano_data: Path, tmp_path: Path) -> None:
    """Of a bf16 run: they round to the weights that were computed with, and most are not those."""
    from megatron_vlm.release.exporting import export_checkpoint

    checkpoint = _import(tmp_path, "keep")
    words = ("training.train_iters=2", "checkpoint.load_optimizer=false")
    _start(checkpoint, nano_data, tmp_path / "run", "bf16", *words)
    releases = {}
    for dtype in ("keep", "float32"):
        export_checkpoint(tmp_path / "run", tmp_path / f"{dtype}_release", dtype=dtype)
        releases[dtype] = read_tensors(tmp_path / f"{dtype}_release")
    moved = 0
    for name, values in releases["keep"].items():
        finer = releases["float32"][name]
        assert finer.dtype == torch.float32
        assert torch.equal(finer.to(values.dtype), values), name
        moved += int((finer != values.float()).sum())
    assert moved > 1000


def test_there_is_no_optimizer_to_take(nano_data: Path, tmp_path: Path) -> None:
    checkpoint = _import(tmp_path, "keep")
    with pytest.raises(RankFailed, match=r"was imported .*checkpoint\.load_optimizer=false"):
        _start(checkpoint, nano_data, tmp_path / "run", "bf16", *STILL)


def test_imported_checkpoint_answers(nano_data: Path, tmp_path: Path) -> None:
    """With the configuration that it carries; here with a tokenizer of ours beside it."""
    from megatron_vlm.cli.main import main
    from megatron_vlm.data.tokenizer import byte_tokenizer
    from megatron_vlm.release.importing import import_folder
    from tests.ranks import run_ranks

    write_folder(tmp_path / "theirs", "dots1", vocab_size=384)
    (tmp_path / "theirs" / "tokenizer.json").write_text(byte_tokenizer().to_json())
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    words = ["--checkpoint", str(tmp_path / "ours"), "--prompt", "a", "--max-new-tokens", "2"]
    assert run_ranks(1, lambda _: main(["generate", *words])) == [0]
