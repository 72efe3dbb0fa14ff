"""Two commands at once, kills between two renames, links and mount points."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.verify import verify_files
from megatron_vlm.cli.main import main
from megatron_vlm.errors import CheckpointError, ConversionError
from tests.release.folders import assert_identical, read_tensors, write_folder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`theirs`, `ours` made of it, and `hf` made of that; `other` is of other numbers."""
    from megatron_vlm.release.exporting import export_checkpoint
    from megatron_vlm.release.importing import import_folder

    folder = tmp_path_factory.mktemp("made")
    write_folder(folder / "theirs", "qwen2")
    write_folder(folder / "other", "qwen2", seed=1)
    import_folder(folder / "theirs", folder / "ours")
    export_checkpoint(folder / "ours", folder / "hf")
    return folder


@pytest.fixture
def place(made_once: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(made_once, tmp_path / "place"))


def _import(place: Path, source: str, **options: Any) -> None:
    from megatron_vlm.release.importing import import_folder

    import_folder(place / source, place / "ours", **options)


def _export(place: Path, target: str = "hf", **options: Any) -> None:
    from megatron_vlm.release.exporting import export_checkpoint

    export_checkpoint(place / "ours", place / target, **options)


def _holds(place: Path, source: str) -> None:
    """The checkpoint is whole, and that of `source`."""
    checkpoint = find_checkpoint(place / "ours")
    verify_files(checkpoint)
    _export(place, "seen")
    assert_identical(read_tensors(place / "seen"), read_tensors(place / source))
    assert not _hidden(place) and not _hidden(place / "ours")


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@contextmanager
def _paused(
    monkeypatch: pytest.MonkeyPatch, module: Any, work: Callable[[], None]
) -> Iterator[None]:
    """`work` in a thread that stands still at its first number while the body runs."""
    begun, go, failed = threading.Event(), threading.Event(), []
    real = module.check_finite

    def wait(*words: Any) -> None:
        if threading.current_thread() is thread:
            begun.set()
            assert go.wait(60)
        real(*words)

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    monkeypatch.setattr(module, "check_finite", wait)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(60), failed
        yield
    finally:
        go.set()
        thread.join(60)
    assert not failed and not thread.is_alive()


@pytest.mark.parametrize("target", ["new", "old"])
def test_two_imports_at_once(target: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.release import importing

    if target == "new":
        shutil.rmtree(place / "ours")
    with _paused(monkeypatch, importing, lambda: _import(place, "theirs", overwrite=True)):
        with pytest.raises(ConversionError, match="ours: another mvlm command is writing there"):
            _import(place, "other", overwrite=True)
    _holds(place, "theirs")


@pytest.mark.parametrize("target", ["new", "hf"])
def test_two_exports_at_once(target: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.release import exporting

    with _paused(monkeypatch, exporting, lambda: _export(place, target, overwrite=True)):
        with pytest.raises(ConversionError, match=f"{target}: another mvlm command is writing"):
            _export(place, target, overwrite=True, dtype="float32")
        # One beside it is nobody's business.
        _export(place, "beside")
    for name in (target, "beside"):
        assert_identical(read_tensors(place / name), read_tensors(place / "theirs"))
    assert not _hidden(place)


def _fail_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the rename of that number fail, counted from one."""
    real, count = os.rename, [0]

    def rename(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == number:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


FULL = OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("number", [1, 2])
def test_what_could_not_be_replaced_is_there_still(
    number: int, error: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = KeyboardInterrupt if error is not FULL else ConversionError
    for command in (
        lambda: _export(place, overwrite=True, dtype="float32"),
        lambda: _import(place, "other", overwrite=True),
    ):
        with monkeypatch.context() as patch:
            _fail_rename(patch, number, error)
            with pytest.raises(expected):
                command()
    assert_identical(read_tensors(place / "hf"), read_tensors(place / "theirs"))
    _holds(place, "theirs")


def test_what_came_meanwhile_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.release import exporting

    real = exporting.small_files

    def late(*words: Any) -> Any:
        (place / "hf" / "notes.txt").write_text("mine")
        return real(*words)

    monkeypatch.setattr(exporting, "small_files", late)
    with pytest.raises(ConversionError, match=r"hf: holds notes\.txt"):
        _export(place, overwrite=True)
    assert (place / "hf" / "notes.txt").read_text() == "mine"


def test_an_import_goes_on_after_a_kill_while_removing_the_old(place: Path) -> None:
    shutil.copytree(place / "ours/iter_0000000", place / "ours/.replaced-iter_0000000")
    (place / "ours" / ".latest_checkpointed_iteration.txt.17").write_text("0")
    _import(place, "other", overwrite=True)
    (place / "ours" / ".latest_checkpointed_iteration.txt.17").unlink()
    _holds(place, "other")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_goes_on_after_a_kill_between_two_renames(overwrite: bool, place: Path) -> None:
    os.rename(place / "ours/iter_0000000", place / "ours/.replaced-iter_0000000")
    (place / "ours/.incomplete-iter_0000000").mkdir()
    with pytest.raises(CheckpointError, match=r"cut short, see .*/\.replaced-iter_0000000"):
        _export(place, "seen")
    if overwrite:
        _import(place, "other", overwrite=True)
    else:
        with pytest.raises(ConversionError, match="imported checkpoint already.*--overwrite"):
            _import(place, "other")
    _holds(place, "other" if overwrite else "theirs")


def test_a_run_that_is_saving_is_left_alone(place: Path) -> None:
    saving = place / "ours" / ".incomplete-iter_0000200"
    saving.mkdir()
    with pytest.raises(ConversionError, match=r"holds \.incomplete-iter_0000200, which mvlm impo"):
        _import(place, "other", overwrite=True)
    assert saving.is_dir()


@pytest.mark.parametrize("made", ["nothing", "an empty folder", "a new one"])
def test_an_export_goes_on_after_a_kill_between_two_renames(made: str, place: Path) -> None:
    os.rename(place / "hf", place / ".hf.replaced")
    (place / ".hf.incomplete" / "hf").mkdir(parents=True)
    if made == "an empty folder":
        (place / "hf").mkdir()
    elif made == "a new one":
        _export(place, "new", dtype="float32")
        os.rename(place / "new", place / "hf")
    with pytest.raises(ConversionError, match="holds an export already"):
        _export(place)
    same = read_tensors(place / "hf").keys() == read_tensors(place / "theirs").keys()
    assert same and not _hidden(place)
    _export(place, overwrite=True)
    assert_identical(read_tensors(place / "hf"), read_tensors(place / "theirs"))


@pytest.mark.parametrize("target", ["an empty folder", "nothing yet", "a release"])
def test_through_a_link(target: str, place: Path) -> None:
    far, link = place / "far" / "away", place / "link"
    far.parent.mkdir()
    if target == "an empty folder":
        far.mkdir()
    elif target == "a release":
        os.rename(place / "hf", far)
    link.symlink_to(far)
    _export(place, "link", overwrite=True, dtype="float32")
    assert link.is_symlink() and not far.is_symlink()
    found = read_tensors(far)
    assert all(str(tensor.dtype) == "torch.float32" for tensor in found.values())
    assert not _hidden(place) and os.listdir(far.parent) == ["away"]


def test_an_import_through_a_link(place: Path) -> None:
    shutil.rmtree(place / "ours")
    (place / "ours").symlink_to(place / "far" / "away")
    _import(place, "theirs")
    assert (place / "ours").is_symlink()
    _holds(place, "theirs")


def test_a_mount_point_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "link").symlink_to("/proc")
    assert main(["export", str(place / "ours"), str(place / "link"), "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert f"{place / 'link'}: is a mount point" in err and err.count("\n") == 1
