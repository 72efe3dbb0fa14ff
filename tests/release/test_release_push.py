"""Releases carried elsewhere: into a folder, and to the hub as far as that goes without one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi, constants

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform import free_port
from megatron_vlm.release.pushing import FolderTarget, HubTarget, PushError, push_target
from tests.release.commands import checked_by_coreutils, plainly

pytestmark = pytest.mark.distributed


def _folders(out: Path) -> list[Path]:
    return sorted(p for p in out.iterdir() if p.is_dir() and not p.name.startswith("."))


@pytest.fixture(scope="module")
def two(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "out"
    code, _, err = plainly(text_run, out, "--iterations", "2,4")
    assert code == 0, err
    return out


def test_into_a_folder_and_only_what_is_missing(text_run: Path, two: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "far away"
    shutil.copytree(two, out)
    words = ("--push", f"file://{there}".replace(" ", "%20"), "--json")
    code, said, err = plainly(text_run, out, "--iterations", "2", *words)
    assert code == 0, err
    assert json.loads(said)["pushed"] == ["iter_0000002-" + _tokens(out, 0)]
    # The list has what is there, not what lies here.
    listed = json.loads((there / "collection.json").read_text())["releases"]
    assert [entry["iteration"] for entry in listed] == [2]
    before = {path: path.stat().st_mtime_ns for path in there.rglob("SHA256SUMS")}
    code, said, err = plainly(text_run, out, "--iterations", "2,4,6", *words)
    assert code == 0 and err.count("was pushed before") == 1
    assert [name[:12] for name in json.loads(said)["pushed"]] == ["iter_0000004", "iter_0000006"]
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time
    assert len(_folders(there)) == 3 and not list(there.glob(".*"))
    for folder in _folders(there):
        checked_by_coreutils(folder)
        assert f"({folder.name})" in (there / "README.md").read_text()


def _tokens(out: Path, number: int) -> str:
    return _folders(out)[number].name.split("-", 4)[4]


def test_a_changed_release_takes_the_place_of_the_old_one(
    text_run: Path, two: Path, tmp_path: Path
) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    shutil.copytree(two, out)
    words = ("--iterations", "2", "--push", f"file://{there}", "--overwrite")
    assert plainly(text_run, out, *words)[0] == 0
    assert plainly(text_run, out, *words, "--licence", "MIT")[0] == 0
    (folder,) = _folders(there)
    assert "license: mit" in (folder / "README.md").read_text()
    checked_by_coreutils(folder)


def test_a_copy_that_changed_on_its_way(two: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(_folders(two)[0], wrong)
    (wrong / "config.json").write_text("{}")
    with pytest.raises(PushError, match=r"config\.json: was changed on its way"):
        FolderTarget(tmp_path / "there").push("r", wrong)
    assert os.listdir(tmp_path / "there") == []


def test_a_folder_that_cannot_be_written(text_run: Path, two: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    shutil.copytree(two, out)
    file.write_text("")
    code, _, err = plainly(text_run, out, "--iterations", "2", "--push", f"file://{file}")
    assert code == 1 and "PushError: --push" in err and "run the command again" in err
    assert len(_folders(out)) == 2


def test_without_a_network(
    text_run: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself, told of an address where nobody answers."""
    out = tmp_path / "out"
    shutil.copytree(two, out)
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    code, _, err = plainly(text_run, out, "--iterations", "4,6", "--push", "nobody/nothing")
    assert code == 1
    (line,) = (line for line in err.splitlines() if line.startswith("mvlm: "))
    assert "PushError: --push nobody/nothing: cannot be reached (" in line
    assert "refused" in line and "run the command again to send what is missing" in line
    # All is here: what had been, and what this command was to make.
    assert len(_folders(out)) == 3
    for folder in _folders(out):
        checked_by_coreutils(folder)


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "file:relative", "file://host/path", "/path", "a b/c", "https://x/y"],
)
def test_other_targets_are_refused(text: str, text_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--push .*: expected"):
        push_target(text)
    out = tmp_path / "out"
    assert plainly(text_run, out, f"--push={text}")[0] == 2 and not out.exists()


def _hub(sums: dict[str, str], tmp_path: Path) -> tuple[HubTarget, Any]:
    """A target whose library is checked for how it is called, and remembers it."""
    api: Any = create_autospec(HfApi, instance=True)
    api.endpoint = "https://hub"
    branches = [SimpleNamespace(name=name) for name in ("main", "other", *sums)]
    api.list_repo_refs.return_value = SimpleNamespace(branches=branches)
    api.file_exists.side_effect = lambda *_, revision: bool(sums[revision])

    def download(*_: Any, revision: str, **__: Any) -> str:
        (tmp_path / revision).write_text(sums[revision])
        return str(tmp_path / revision)

    api.hf_hub_download.side_effect = download
    return HubTarget("owner/name", api), api


def test_calls_of_the_hub(tmp_path: Path) -> None:
    target, api = _hub({"done": "sums\n", "begun": ""}, tmp_path)
    assert target.pushed(["done", "begun", "new"]) == {"done": "sums\n"}
    api.create_repo.assert_called_once_with("owner/name", private=True, exist_ok=True)
    target.push("new", tmp_path)
    api.create_branch.assert_called_once_with("owner/name", branch="new", exist_ok=True)
    (call,) = api.upload_folder.call_args_list
    assert call.kwargs["revision"] == "new" and call.kwargs["folder_path"] == tmp_path
    assert call.kwargs["delete_patterns"] == "*"
    target.push_index({"README.md": "list"})
    last = api.upload_folder.call_args_list[-1].kwargs
    assert "revision" not in last and "delete_patterns" not in last
    assert target.link("new") == "https://hub/owner/name/tree/new"
    api.upload_folder.side_effect = ValueError("the  hub\nsays no")
    with pytest.raises(PushError, match=r"new could not be sent \(the hub says no\)"):
        target.push("new", tmp_path)
