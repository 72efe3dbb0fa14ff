"""The same command once more: after an end at any moment, damage, or with something else wanted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.cli.main import main
from tests.ranks import run_ranks
from tests.release.commands import checked_by_coreutils, plainly, released, state

pytestmark = pytest.mark.distributed

ALL = ("--iterations", "2,4,6")


def _folders(out: Path) -> list[Path]:
    return sorted(p for p in out.iterdir() if p.is_dir() and not p.name.startswith("."))


@pytest.fixture(scope="module")
def made_once(vlm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three") / "out"
    code, _, err = plainly(vlm_run, out, *ALL)
    assert code == 0, err
    return out


@pytest.fixture
def three(made_once: Path, tmp_path: Path) -> Path:
    """Unverified releases of iterations 2, 4 and 6, to be damaged."""
    return Path(shutil.copytree(made_once, tmp_path / "out"))


def _report(found: tuple[int, str, str]) -> dict[str, Any]:
    assert found[0] == 0, found[2]
    return json.loads(found[1])


def _times(out: Path) -> dict[str, int]:
    return {path.name: (path / "README.md").stat().st_mtime_ns for path in _folders(out)}


@pytest.mark.slow
def test_killed_between_two_the_rest_is_made(vlm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["release", str(vlm_run), str(out), *ALL, "--no-verify"]

    def second_has_begun() -> bool:
        return bool(list(out.glob(".*iter_0000004*.incomplete/**/model.safetensors")))

    assert run_ranks(1, lambda _: main(words), kill_after=second_has_begun) == []
    (first,) = _folders(out)
    assert [path for path in out.iterdir() if path.name.startswith(".")]
    before = _times(out)[first.name]
    found = plainly(vlm_run, out, *ALL, "--json")
    report = _report(found)
    assert report["skipped"] == [first.name] and len(report["made"]) == 2
    assert f"{first}: is there already, of the same checkpoint and options" in found[2]
    assert _times(out)[first.name] == before
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for folder in _folders(out):
        checked_by_coreutils(folder)
    listed = json.loads((out / "collection.json").read_text())["releases"]
    assert [entry["release"] for entry in listed] == [folder.name for folder in _folders(out)]


def test_what_is_there_is_left_alone(vlm_run: Path, three: Path) -> None:
    before = _times(three)
    (three / "collection.json").write_text('{"format": "megatron-vlm release collection 1"}')
    report = _report(plainly(vlm_run, three, *ALL, "--json", "--verify-existing", "--overwrite"))
    assert report["made"] == [] and len(report["skipped"]) == 3
    assert _times(three) == before
    assert len(json.loads((three / "collection.json").read_text())["releases"]) == 3


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damage_is_noticed_and_mended(vlm_run: Path, three: Path) -> None:
    first, second, third = _folders(three)
    _flip(second / "model.safetensors")
    # Of that size it looks whole; read through, it does not.
    assert plainly(vlm_run, three, *ALL)[0] == 0
    code, _, err = plainly(vlm_run, three, *ALL, "--verify-existing")
    assert code == 2 and err.count("mvlm: error") == 1
    assert f"{second}: is damaged: the content of model.safetensors does not match" in err
    assert "--overwrite" in err
    before = _times(three)
    os.truncate(third / "tokenizer.json", 10)
    code, _, err = plainly(vlm_run, three, *ALL)
    assert code == 2 and f"{third}: is damaged: tokenizer.json has 10 bytes; expected" in err
    report = _report(plainly(vlm_run, three, *ALL, "--json", "--verify-existing", "--overwrite"))
    assert report["made"] == [second.name, third.name] and report["skipped"] == [first.name]
    assert _times(three)[first.name] == before[first.name]
    for folder in _folders(three):
        checked_by_coreutils(folder)


@pytest.mark.parametrize("what", ["missing", "state", "no state", "sums", "swapped"])
def test_other_damage(vlm_run: Path, three: Path, what: str) -> None:
    first, second, _ = _folders(three)
    if what == "missing":
        (first / "config.json").unlink()
    elif what == "state":
        _flip(first / "training_state.json")
    elif what == "no state":
        (first / "training_state.json").unlink()
    elif what == "sums":
        (first / "SHA256SUMS").write_text("nonsense\n")
    else:
        shutil.copy(second / "training_state.json", first / "training_state.json")
    code, _, err = plainly(vlm_run, three, *ALL)
    assert code == 2 and f"{first}: is damaged: " in err and err.count("mvlm: error") == 1
    assert _report(plainly(vlm_run, three, *ALL, "--json", "--overwrite"))["made"] == [first.name]
    checked_by_coreutils(first)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dtype", "float32"], "was made with dtype keep, not float32"),
        (["--licence", "MIT"], "was made with licence None, not MIT"),
        (["--max-shard-size", "1MB"], "was made with max_shard_bytes 5000000000, not 1000000"),
        (["--with-optimizer"], "was made with with_optimizer False, not True"),
    ],
)
def test_other_options_are_no_silent_skip(
    vlm_run: Path, three: Path, words: list[str], told: str
) -> None:
    before = _times(three)
    code, _, err = plainly(vlm_run, three, *ALL, *words)
    assert code == 2 and f"{_folders(three)[0]}: {told}" in err
    assert _times(three) == before
    words = ["--iterations", "4", "--overwrite", "--json", *words]
    report = _report(plainly(vlm_run, three, *words))
    assert report["made"] == [_folders(three)[1].name]


def test_verified_ones_serve_who_asks_for_less(vlm_run: Path, vlm_releases: dict) -> None:
    words = ("--iterations", "2,4,6", "--name", "nano", "--licence", "Apache-2.0", "--json")
    report = _report(plainly(vlm_run, vlm_releases["folder"], *words))
    assert len(report["skipped"]) == 3 and not report["made"]


def test_another_checkpoint_of_the_same_iteration(
    vlm_run: Path, three: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(vlm_run, run)
    manifest = run / "checkpoints" / "iter_0000002" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    code, _, err = plainly(run, three, *ALL)
    first = _folders(three)[0]
    assert code == 2 and f"{first}: was made from another checkpoint of this iteration" in err
    report = _report(plainly(run, three, *ALL, "--json", "--overwrite"))
    assert report["made"] == [first.name]


def test_what_is_not_ours_is_never_replaced(vlm_run: Path, three: Path, tmp_path: Path) -> None:
    first = _folders(three)[0]
    (first / "notes.txt").write_text("mine")
    code, _, err = plainly(vlm_run, three, *ALL, "--overwrite", "--dtype", "float32")
    assert code == 2 and f"{first}: holds what mvlm release did not write (notes.txt)" in err
    assert (first / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    code, _, err = plainly(vlm_run, other)
    assert code == 2 and f"{other / 'README.md'}: was not written by mvlm release" in err
    assert os.listdir(other) == ["README.md"]


def test_a_folder_of_other_things_is_refused(vlm_run: Path, three: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("one.png", "two.png"):
        (pictures / name).write_text("")
    code, _, err = plainly(vlm_run, pictures)
    assert code == 2 and err.count("\n") == 1
    assert f"{pictures}: holds what is no release (one.png, 2 in all)" in err
    assert sorted(os.listdir(pictures)) == ["one.png", "two.png"]
    # Beside a list of ours, or without one after a kill, releases go on.
    (three / "notes.txt").write_text("mine")
    assert plainly(vlm_run, three, *ALL)[0] == 0
    for name in ("notes.txt", "README.md", "collection.json"):
        (three / name).unlink()
    assert plainly(vlm_run, three, *ALL)[0] == 0


def test_a_replacement_cut_short_is_put_back(vlm_run: Path, three: Path) -> None:
    first, _, second = _folders(three)
    os.rename(first, first.with_name(f".{first.name}.replaced"))
    shutil.copytree(second, second.with_name(f".{second.name}.replaced"))
    report = _report(plainly(vlm_run, three, *ALL, "--json"))
    assert len(report["skipped"]) == 3 and not list(three.glob(".*"))


def test_two_commands_do_not_write_into_one_folder(vlm_run: Path, three: Path) -> None:
    handle = os.open(three, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, _, err = plainly(vlm_run, three, *ALL)
    finally:
        os.close(handle)
    assert code == 2 and "another mvlm command is writing there" in err


def test_what_another_command_is_writing_is_not_tidied(vlm_run: Path, three: Path) -> None:
    first = _folders(three)[0]
    os.rename(first, first.with_name(f".{first.name}.replaced"))
    hidden = first.with_name(f".{first.name}.incomplete")
    (hidden / first.name).mkdir(parents=True)
    other = first.with_name(".somebody.replaced")
    other.mkdir()
    handle = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert plainly(vlm_run, three, "--iterations", "4")[0] == 0
        assert not first.exists() and (hidden / first.name).is_dir()
    finally:
        os.close(handle)
    assert plainly(vlm_run, three, "--iterations", "4")[0] == 0
    checked_by_coreutils(first)
    assert [path.name for path in three.glob(".*")] == [other.name]


@pytest.mark.parametrize("lost", ["files", "source", "options", "losses", "consumed", "all"])
def test_a_state_that_lacks_something_is_damaged(vlm_run: Path, three: Path, lost: str) -> None:
    first, second, third = _folders(three)
    for folder in (first, second):
        facts = state(folder)
        kept = ("format", "release") if lost == "all" else facts.keys() - {lost}
        (folder / "training_state.json").write_text(json.dumps({k: facts[k] for k in kept}))
    code, _, err = plainly(vlm_run, three, "--iterations", "2")
    assert code == 2 and f"{first}: is damaged: training_state.json" in err
    words = ("--iterations", "2", "--overwrite", "--json")
    assert _report(plainly(vlm_run, three, *words))["made"] == [first.name]
    listed = json.loads((three / "collection.json").read_text())["releases"]
    assert [entry["release"] for entry in listed] == [first.name, third.name]


def test_a_list_that_cannot_be_written(
    vlm_run: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlm.release import collection

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(collection, "write_atomically", full)
    code, _, err = plainly(vlm_run, three, *ALL)
    assert code == 2 and err.count("mvlm: error") == 1
    assert f"{three}: could not be written (No space left" in err and "releases are whole" in err


def test_metrics_that_cannot_be_read(vlm_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(vlm_run, run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    code, _, err = plainly(run, tmp_path / "out")
    assert code == 2 and err.count("mvlm: error") == 1
    assert f"{run / 'metrics.jsonl'}: cannot be read (Is a directory)" in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_the_releases_before_it(vlm_run: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(vlm_run, run)
    _flip(next((run / "checkpoints" / "iter_0000004").glob("*.distcp")))
    code, _, err = plainly(run, out, *ALL, "--with-optimizer")
    assert code == 2 and "does not match the manifest" in err
    (folder,) = _folders(out)
    assert "iter_0000002" in folder.name
    checked_by_coreutils(folder)


def test_weights_that_compute_something_else_are_not_released(
    vlm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_vlm.release import releasing

    export = releasing.export_checkpoint

    def wrong(source: Path, target: Path, **options: Any) -> Any:
        done = export(source, target, **options)
        file = target / "model.safetensors"
        tensors = load_file(file)
        # One of 64 channels by a hundredth.
        tensors["model.norm.weight"][7] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        return done

    monkeypatch.setattr(releasing, "export_checkpoint", wrong)
    out = tmp_path / "out"
    code, _, err = released(vlm_run, out, "--iterations", "2")
    assert code == 1 and not out.exists()
    (line,) = (line for line in err.splitlines() if line.startswith("mvlm: "))
    assert line.startswith("mvlm: error: dots-vlm-nano-iter_0000002-") and "differ from" in line


@pytest.mark.slow
def test_a_folder_that_needs_this_package_is_not_released(
    vlm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlm.release import releasing

    export = releasing.export_checkpoint

    def wrong(source: Path, target: Path, **options: Any) -> Any:
        done = export(source, target, **options)
        with open(target / "modeling_megatron_vlm.py", "a") as stream:
            stream.write("from megatron.core import parallel_state\n")
        return done

    monkeypatch.setattr(releasing, "export_checkpoint", wrong)
    out = tmp_path / "out"
    code, _, err = released(vlm_run, out)
    assert code == 1 and not out.exists()
    (line,) = (line for line in err.splitlines() if line.startswith("mvlm: "))
    assert "dots-vlm-nano-iter_0000006-" in line and "transformers cannot load and run it" in line
    assert "megatron" in line and "--no-verify" in line


@pytest.mark.parametrize("version", [None, "5.9.1"])
def test_without_transformers(
    vlm_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str | None,
) -> None:
    from megatron_vlm.release import verification

    find = verification.importlib.util.find_spec
    if version is None:
        hide = lambda name: None if name == "transformers" else find(name)  # noqa: E731
        monkeypatch.setattr(verification.importlib.util, "find_spec", hide)
    else:
        monkeypatch.setattr(verification.importlib.metadata, "version", lambda _: version)
    out = tmp_path / "out"
    code = main(["release", str(vlm_run), str(out)])
    assert code == 2 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    said = "is not installed" if version is None else "is 5.9.1"
    assert f"transformers {said}; " in line and "-e '.[release]'" in line
    assert "--no-verify" in line


def test_the_state_is_of_the_release(three: Path) -> None:
    for folder in _folders(three):
        facts = state(folder)
        assert facts["verification"] is None and facts["release"] == folder.name
        assert "Not verified" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--iterations", "2,x"], "--iterations 2,x: expected whole numbers"),
        (["--iterations", "2,5"], "--iterations 5: "),
        (["--every-tokens", "many"], "--every-tokens many: expected a whole number"),
        (["--every-tokens", "1T"], "no checkpoint has reached that many"),
        (["--max-shard-size", "5"], "--max-shard-size 5: expected a size with its unit"),
        (["--name", "a/b"], "--name a/b: expected up to 60 letters"),
        (["--name", ".hidden"], "--name .hidden: expected"),
        (["--licence", "free"], "--licence free: expected an SPDX identifier"),
        (["--base-model", "a b"], "--base-model a b: expected OWNER/NAME"),
    ],
)
def test_wrong_words_are_one_line(
    vlm_run: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    out = tmp_path / "out"
    code, said, err = plainly(vlm_run, out, *words)
    assert code == 2 and told in err and said == "" and not out.exists()
    assert err.count("mvlm: error: ") == err.count("\n") == 1


def test_wrong_folders_are_one_line(vlm_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for run, out, told in (
        (tmp_path / "nowhere", tmp_path / "out", "no such folder"),
        (tmp_path, tmp_path / "out", "holds no whole checkpoint"),
        (vlm_run, file, f"{file}: is a file"),
        (vlm_run, file / "below", f"{file / 'below'}: could not be written"),
    ):
        code, _, err = plainly(run, out)
        assert code == 2 and told in err and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == ["file"]


def test_which_is_asked_for_once(vlm_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        plainly(vlm_run, tmp_path / "out", "--every-tokens", "1", "--iterations", "2")
    assert caught.value.code == 2
