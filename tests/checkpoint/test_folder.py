"""What lies in `checkpoints/` after saves, set-backs and crashes; no tensors, no ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.checkpoint.folder import (
    LATEST,
    MANIFEST,
    checkpoint_name,
    commit,
    find_checkpoint,
    incomplete_path,
    list_iterations,
    remove_old,
    tidy,
    write_atomically,
)

pytestmark = pytest.mark.unit


def _save(root: Path, iteration: int, content: str = "") -> None:
    path = incomplete_path(root, iteration)
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(content)
    commit(root, iteration)


def _contents(root: Path) -> dict[int, str]:
    return {i: (root / checkpoint_name(i) / MANIFEST).read_text() for i in list_iterations(root)}


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(None, None, [100, 200, 300, 400]), (1, None, [400]), (2, 200, [200, 300, 400])],
)
def test_retention(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    for iteration in (100, 200, 300, 400):
        _save(tmp_path, iteration)
    removed = remove_old(tmp_path, 400, keep_last, keep_every)
    assert list_iterations(tmp_path) == kept
    assert sorted(removed + kept) == [100, 200, 300, 400]
    assert not list(tmp_path.glob(".*"))


def test_set_back_run_keeps_what_it_has_just_saved(tmp_path: Path) -> None:
    _save(tmp_path, 100)
    _save(tmp_path, 200)
    write_atomically(tmp_path / LATEST, "100\n")
    _save(tmp_path, 150)
    remove_old(tmp_path, 150, keep_last=1, keep_every=None)
    assert list_iterations(tmp_path) == [150, 200]
    assert find_checkpoint(tmp_path).name == checkpoint_name(150)


def test_same_iteration_again_replaces_the_older(tmp_path: Path) -> None:
    _save(tmp_path, 100, "old")
    _save(tmp_path, 100, "new")
    assert _contents(tmp_path) == {100: "new"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_crash_while_replacing_leaves_one_of_the_two(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first rename, between them, and after both."""
    import os

    _save(tmp_path, 100, "old")
    path = incomplete_path(tmp_path, 100)
    path.mkdir()
    (path / MANIFEST).write_text("new")
    real, done = os.rename, []

    def rename(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    def write(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_vlm.checkpoint.folder.os.rename", rename)
    monkeypatch.setattr("megatron_vlm.checkpoint.folder.write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path, 100)
    monkeypatch.undo()
    tidy(tmp_path)
    assert _contents(tmp_path) == {100: "new" if renames == 2 else "old"}
    assert find_checkpoint(tmp_path).name == checkpoint_name(100)
    assert not list(tmp_path.glob(".*"))


def test_tidy_leaves_other_files_alone(tmp_path: Path) -> None:
    names = [".incomplete-mine", ".notes", "iter_0000100"]
    for name in names:
        (tmp_path / name).mkdir()
    incomplete_path(tmp_path, 200).mkdir()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
