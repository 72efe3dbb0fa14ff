"""Damaged, foreign and unwritable checkpoints: one clear error, nothing lost, no rank waiting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint.folder import digest, find_checkpoint, list_iterations
from megatron_vlm.checkpoint.verify import verify_files, verify_index
from megatron_vlm.errors import CheckpointError
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.resilience import events
from tests.ranks import RankFailed, run_ranks
from tests.training_case import recipe, train_case

FP32 = "training.precision=fp32"
NO_OTHER = (FP32, "checkpoint.fall_back=false")


@pytest.fixture(scope="module")
def trained(nano_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved iterations 1 and 2."""
    run_dir = tmp_path_factory.mktemp("trained")
    words = (FP32, "training.train_iters=2", "checkpoint.save_interval=1")
    train_case(recipe(nano_data, run_dir, *words), 2)
    return run_dir


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "iter_0000002"


@pytest.mark.distributed
def test_whole_checkpoint_verifies(trained: Path) -> None:
    path = find_checkpoint(trained)
    assert path == _newest(trained)
    verify_files(path)
    verify_index(path)
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        file.name for file in path.iterdir() if file.name != "manifest.json"
    }


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_damaged_file_is_named(damaged: Path, kind: str) -> None:
    file = next(iter(sorted(_newest(damaged).glob("*.distcp"))))
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        verify_files(_newest(damaged))


@pytest.mark.distributed
def test_damaged_checkpoint_ends_every_rank(damaged: Path, nano_data: Path) -> None:
    """Only one rank digests the damaged file; both must leave, with the same error."""
    file = sorted(_newest(damaged).glob("*.distcp"))[-1]
    content = bytearray(file.read_bytes())
    content[-10] ^= 255
    file.write_bytes(content)
    with pytest.raises(RankFailed, match=r"DamagedCheckpoint.*does not match the manifest"):
        train_case(recipe(nano_data, damaged, *NO_OTHER), 2, timeout=60)
    assert list_iterations(damaged / "checkpoints") == [1, 2]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["*.distcp", "state.json", ".metadata"])
def test_the_one_before_a_damaged_checkpoint_is_taken(
    name: str, damaged: Path, nano_data: Path
) -> None:
    file = sorted(_newest(damaged).glob(name))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    whole = [json.loads(line) for line in (damaged / "metrics.jsonl").read_text().splitlines()]
    rest = train_case(recipe(nano_data, damaged, FP32, "training.train_iters=2"), 2)
    assert rest.losses == [whole[1]["lm_loss"]]
    assert (damaged / "checkpoints" / "damaged-iter_0000002").is_dir()
    assert list_iterations(damaged / "checkpoints") == [1, 2]
    (told,) = [e for e in events.read(damaged) if e["event"] == "damaged checkpoint"]
    assert file.name in told["what"] and "the one before it is taken" in told["what"]


@pytest.mark.distributed
def test_older_checkpoint_can_be_chosen(damaged: Path, nano_data: Path) -> None:
    """Pointing the latest file at an older checkpoint is all it takes to go back."""
    (damaged / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1\n")
    rest = train_case(recipe(nano_data, damaged, FP32, "training.train_iters=2"), 2)
    assert [entry["iteration"] for entry in rest.metrics] == [2]


@pytest.mark.distributed
def test_another_model_is_refused(trained: Path, nano_data: Path, tmp_path: Path) -> None:
    words = (FP32, "model.language.ffn_hidden_size=256", f"checkpoint.load={trained}")
    with pytest.raises(RankFailed, match=r"language\.ffn_hidden_size is 128 there and 256 here"):
        train_case(recipe(nano_data, tmp_path / "other", *words), 1, timeout=60)


@pytest.mark.unit
@pytest.mark.parametrize("imported", [False, True])
def test_another_model_is_told_in_a_line_that_names_the_way_out(
    imported: bool, nano_data: Path, tmp_path: Path
) -> None:
    from megatron_vlm.checkpoint.checkpointer import _check_model

    config = recipe(nano_data, tmp_path / "other", FP32)
    state = {"model": config.model.model_dump(mode="json") | {"vision": None}}
    if imported:
        (tmp_path / "model.yaml").write_text("")
    with pytest.raises(CheckpointError) as caught:
        _check_model(tmp_path, state, config)
    said = str(caught.value)
    assert "model.vision is null there and given here; an encoder cannot be added" in said
    assert (f"model={tmp_path / 'model.yaml'}" in said) is imported
    assert "num_layers" not in said


@pytest.mark.distributed
def test_another_precision_is_refused_with_its_state(trained: Path, nano_data: Path) -> None:
    with pytest.raises(RankFailed, match=r"trained in training\.precision fp32"):
        train_case(recipe(nano_data, trained, "training.precision=bf16"), 1, timeout=60)


@pytest.mark.distributed
def test_other_rows_are_refused(trained: Path, nano_data: Path) -> None:
    """Packed differently, the number of consumed rows would mean other samples."""
    words = (FP32, "data.packing_rows=16")
    with pytest.raises(RankFailed, match=r"data\.packing_rows 8, this run has 16"):
        train_case(recipe(nano_data, trained, *words), 1, timeout=60)


@pytest.mark.unit
def test_incomplete_folder_is_never_read(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    (root / ".incomplete-iter_0000009").mkdir(parents=True)
    (root / "iter_0000007").mkdir()  # no manifest: not whole
    assert list_iterations(root) == []
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_checkpoint(tmp_path)


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_METADATA = "torch.distributed.checkpoint.metadata"
_ATTACKS = {
    "a function": _global("os", "system") + b"(Vtouch owned\ntR.",
    # Undotted names of torch's own module lead to everything that it imports.
    "a helper of the same module": (
        _global("torch.distributed.checkpoint.filesystem", "_get_device_module") + b"(V_utils\ntR."
    ),
    "an attribute of a class": _global(_METADATA, "Metadata") + b"(N(Vstorage_data\nNdtb.",
    "an attribute of a function": _global("torch.serialization", "_get_layout")
    + b"(Vname\nVvalue\ndb.",
    # torch would unpickle what is no tensor without any check.
    "bytes": _global(_METADATA, "BytesStorageMetadata") + b")\x81.",
    "an entry that is no tensor": (
        _global(_METADATA, "Metadata")
        + b")\x81(Vstate_dict_metadata\n(Va\nVb\ndVstorage_data\n(ddb."
    ),
}


@pytest.mark.unit
@pytest.mark.parametrize("attack", _ATTACKS)
def test_index_with_foreign_code_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + _ATTACKS[attack])
    with pytest.raises(CheckpointError, match="it was not opened"):
        verify_index(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.distributed
def test_index_that_leaves_its_folder_is_not_opened(damaged: Path) -> None:
    path = _newest(damaged)
    name = next(iter(path.glob("*.distcp"))).name.encode()
    content = (path / ".metadata").read_bytes()
    assert name in content
    (path / ".metadata").write_bytes(content.replace(name, b"../../" + name[6:]))
    with pytest.raises(CheckpointError, match="not in the manifest"):
        verify_index(path)


@pytest.mark.distributed
def test_damage_that_was_not_looked_for_is_still_one_line(damaged: Path, nano_data: Path) -> None:
    """Without digests torch meets it, with an exception of its own kind."""
    for file in _newest(damaged).glob("*.distcp"):
        file.write_bytes(b"\x00" * file.stat().st_size)
    words = (FP32, "checkpoint.verify_on_load=false", "training.train_iters=3")
    with pytest.raises(RankFailed, match="CheckpointError: .*iter_0000002: cannot be loaded"):
        train_case(recipe(nano_data, damaged, *words), 2, timeout=60)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.packing_rows=16",), "checkpoint.load_optimizer=false"),
        (("training.train_iters=2",), "stands at iteration 2, .* nothing is left to do"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    trained: Path, nano_data: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    """The position of another run is taken only where it means the same rows."""
    config = recipe(
        nano_data, tmp_path, FP32, f"checkpoint.load={trained}", "training.train_iters=3", *words
    )
    with pytest.raises(RankFailed, match=message):
        train_case(config, 1, timeout=60)


@pytest.mark.distributed
def test_lost_checkpoint_is_not_overwritten(damaged: Path, nano_data: Path) -> None:
    """The latest file says that there was one: to start anew would throw it away."""
    shutil.rmtree(damaged / "checkpoints" / "iter_0000001")
    (_newest(damaged) / "manifest.json").unlink()
    with pytest.raises(RankFailed, match="names iteration 2, but no whole checkpoint is beside it"):
        train_case(recipe(nano_data, damaged, FP32), 2, timeout=60)
    assert list(_newest(damaged).glob("*.distcp"))


@pytest.mark.distributed
def test_damage_tells_the_way_back(damaged: Path, nano_data: Path) -> None:
    (_newest(damaged) / "common.pt").unlink()
    with pytest.raises(RankFailed, match="also here: iteration 1; to go back to one, write"):
        train_case(recipe(nano_data, damaged, *NO_OTHER), 1, timeout=60)


def _rewrite(checkpoint: Path, name: str, text: str) -> None:
    """Another content of a file, as if it had been saved so."""
    (checkpoint / name).write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    size = (checkpoint / name).stat().st_size
    manifest["files"][name] = {"bytes": size, "sha256": digest(checkpoint / name)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.distributed
def test_weights_of_another_tokenizer(damaged: Path, nano_data: Path, tmp_path: Path) -> None:
    """Ids of the same number mean other text."""
    text = (_newest(damaged) / "tokenizer.json").read_text()
    changed = json.loads(text)
    vocabulary = changed["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    _rewrite(_newest(damaged), "tokenizer.json", json.dumps(changed))
    load = (f"checkpoint.load={damaged}", "checkpoint.load_optimizer=false")
    words = (FP32, "training.train_iters=2", *load)
    with pytest.raises(RankFailed, match="trained with another tokenizer"):
        train_case(recipe(nano_data, tmp_path / "new", *words), 1, timeout=60)
    meant = recipe(nano_data, tmp_path / "new", *words, "checkpoint.same_tokenizer=false")
    assert train_case(meant, 1).losses
    # Written in other words, it is the same.
    _rewrite(_newest(damaged), "tokenizer.json", json.dumps(json.loads(text), indent=3))
    assert train_case(recipe(nano_data, tmp_path / "same", *words), 1).losses


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "progress is missing"),
        ('{"progress": 3}', "progress is missing or no dict"),
        ("[]", "holds no mapping"),
        ('{"progress": {}, "model": {}, "precision": "fp32", "data": {}, "frozen": []}', "trained"),
    ],
)
def test_state_of_another_kind_ends_every_rank(
    damaged: Path, nano_data: Path, content: str, message: str
) -> None:
    """Rank 0 alone reads it: the other must not wait for it."""
    (_newest(damaged) / "state.json").write_text(content)
    with pytest.raises(RankFailed, match=message):
        train_case(recipe(nano_data, damaged, *NO_OTHER), 2, timeout=60)


def _write_twice_and_die(world: World, root: Path) -> str:
    """Two asynchronous saves; the helper of the second dies after its files are written."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_vlm.checkpoint import writer as module

    start_distributed(world)
    writer = module.CheckpointWriter(root, async_save=True, keep_last=1, keep_every=None)
    for iteration in (1, 2):
        if iteration == 2:
            module._entry = lambda _: os._exit(9)  # type: ignore[assignment]
        value = ShardedTensor.from_rank_offsets("weight", torch.full((4,), float(iteration)))
        writer.write(iteration, {"weight": value}, {}, {})
        try:
            writer.wait()
        except CheckpointError as error:
            stop()
            return str(error)
    return "saved"


@pytest.mark.distributed
def test_helper_that_dies_after_writing(tmp_path: Path) -> None:
    """Its files have no digests: the checkpoint is none, and the older one stays."""
    (message,) = run_ranks(1, _write_twice_and_die, tmp_path, timeout=60)
    assert "could not be saved" in message and "died" in message
    assert list_iterations(tmp_path) == [1]
    verify_files(tmp_path / "iter_0000001")
    verify_index(tmp_path / "iter_0000001")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model and not for two."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs permission to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.distributed
@pytest.mark.parametrize("async_save", ["false", "true"])
def test_full_disk_while_saving(small_disk: Path, nano_data: Path, async_save: str) -> None:
    """Training goes on to its end, where both ranks leave with one clear error; older checkpoints
    stay, the newer leave no trace."""
    words = (FP32, "training.train_iters=4", "checkpoint.save_interval=1")
    config = recipe(nano_data, small_disk, *words, f"checkpoint.async_save={async_save}")
    with pytest.raises(RankFailed, match=r"could not be saved on rank \d .*free space"):
        train_case(config, 2, timeout=120)
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]
    not_saved = [e["what"] for e in events.read(small_disk) if e["event"] == "not saved"]
    assert len(not_saved) >= 2 and all("free space" in what for what in not_saved)
    root = small_disk / "checkpoints"
    whole = list_iterations(root)
    assert whole and whole == list(range(1, whole[-1] + 1))
    assert [path.name for path in root.iterdir() if path.name.startswith(".incomplete")] == []
    verify_files(find_checkpoint(small_disk))


@pytest.mark.distributed
def test_killed_while_saving_never_looks_whole(nano_data: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the incomplete folder appears: what is found later is whole."""
    root = tmp_path / "checkpoints"
    config = recipe(nano_data, tmp_path, FP32, "checkpoint.save_interval=1")

    def saving() -> bool:
        return (root / ".incomplete-iter_0000003").exists()

    train_case(config, 2, kill_after=saving)
    whole = list_iterations(root)
    assert whole in ([1, 2], [1, 2, 3])
    verify_files(find_checkpoint(tmp_path))
    rest = train_case(recipe(nano_data, tmp_path, FP32, "training.train_iters=4"), 2)
    assert rest.metrics[0]["iteration"] == whole[-1] + 1
