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

from megatron_vlm.checkpoint.folder import digest
from megatron_vlm.errors import ConfigError, ConversionError
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
    assert os.listdir(tmp_path) == ["wrong"]


@pytest.mark.parametrize("name", ["README.md", "collection.json"])
def test_a_list_of_somebody_else_is_left(name: str, text_run: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    there.mkdir()
    (there / name).write_text("mine")
    words = ("--iterations", "2", "--overwrite", "--push", f"file://{there}")
    code, _, err = plainly(text_run, out, *words)
    assert code == 2 and f"{there / name}: was not written by mvlm release" in err
    assert (there / name).read_text() == "mine" and os.listdir(there) == [name]
    assert not out.exists() and err.count("\n") == 1


@pytest.mark.parametrize("what", ["alone", "with sums", "in ours", "in ours' place"])
def test_a_revision_of_somebody_else_is_left(
    what: str, text_run: Path, two: Path, tmp_path: Path
) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    shutil.copytree(two, out)
    words = ("--iterations", "2,4", "--overwrite", "--push", f"file://{there}")
    if what.startswith("in"):
        assert plainly(text_run, out, *words)[0] == 0
    # The second, so that the first would be sent before it is looked at.
    revision = there / _folders(out)[1].name.removeprefix("dots-vlm-nano-")
    revision.mkdir(parents=True, exist_ok=True)
    (revision / "thesis.txt").write_text("mine")
    if what == "with sums":
        value = digest(revision / "thesis.txt")
        (revision / "SHA256SUMS").write_text(f"{value}  thesis.txt\n")
    elif what == "in ours' place":
        (revision / "training_state.json").unlink()
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    # Ours differ now, so that all are to be sent.
    code, _, err = plainly(text_run, out, *words, "--licence", "MIT")
    assert code == 2 and "was not written by mvlm release; nothing was pushed" in err
    assert f"--push {there}: {revision.name}/" in err
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    assert not list(there.glob(".*"))


def test_an_older_release_is_replaced_on_request_alone(
    text_run: Path, two: Path, tmp_path: Path
) -> None:
    out, there, other = tmp_path / "out", tmp_path / "there", tmp_path / "other"
    shutil.copytree(two, out)
    words = ("--iterations", "2", "--push", f"file://{there}")
    assert plainly(text_run, out, *words)[0] == 0
    (revision,) = _folders(there)
    before = digest(revision / "SHA256SUMS")
    code, _, err = plainly(text_run, other, *words, "--licence", "MIT")
    assert code == 2 and f"{revision.name} is there already and differs from" in err
    assert "--overwrite" in err and digest(revision / "SHA256SUMS") == before
    assert plainly(text_run, other, *words, "--licence", "MIT", "--overwrite")[0] == 0
    checked_by_coreutils(revision)
    assert digest(revision / "SHA256SUMS") != before


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_damaged_release_is_not_pushed(
    where: str, text_run: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the right sizes, so it passes for being there; the first, which is whole, waits too."""
    out, there = tmp_path / "out", tmp_path / "there"
    shutil.copytree(two, out)
    file = _folders(out)[1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    target, api = _hub({"main": {}}, tmp_path)
    if where == "hub":
        monkeypatch.setattr("megatron_vlm.release.releasing.push_target", lambda _: target)
    words = ("--iterations", "2,4", "--push", f"file://{there}")
    code, _, err = plainly(text_run, out, *words)
    assert code == 2 and "nothing was pushed" in err and "--verify-existing --overwrite" in err
    assert f"{file.parent}: is damaged: the content of model.safetensors does not match" in err
    assert not api.upload_folder.called and (where == "hub" or not os.listdir(there))
    assert plainly(text_run, out, *words, "--verify-existing", "--overwrite")[0] == 0
    assert len(api.upload_folder.call_args_list or _folders(there)) == (3 if where == "hub" else 2)


def test_a_folder_that_cannot_be_written(text_run: Path, two: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    shutil.copytree(two, out)
    file.write_text("")
    words = ("--iterations", "2", "--push")
    code, _, err = plainly(text_run, out, *words, f"file://{file}")
    assert code == 2 and f"{file}: is a file" in err
    code, _, err = plainly(text_run, out, *words, f"file://{file}/below")
    assert code == 2 and f"{file} is no folder that can be written into" in err
    assert len(_folders(out)) == 2 and err.count("\n") == 1


def test_without_a_token_nothing_is_begun(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out = tmp_path / "out"
    code, _, err = plainly(text_run, out, "--push", "nobody/nothing")
    assert code == 2 and not out.exists() and err.count("\n") == 1
    assert "mvlm: error: --push nobody/nothing: there is no token for the hub" in err


def test_a_checkpoint_that_is_sent_is_said_to_tell_paths(text_run: Path, tmp_path: Path) -> None:
    words = ("--push", f"file://{tmp_path / 'there'}", "--iterations", "2")
    for number, more in enumerate(([], ["--with-optimizer", "--overwrite"])):
        code, _, err = plainly(text_run, tmp_path / str(number), *words, *more)
        assert code == 0 and err.count("checkpoint/config.yaml tells paths") == number


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
    assert "mvlm: error: --push nobody/nothing: cannot be reached (" in line
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


def _hub(branches: dict[str, dict[str, str]], tmp_path: Path) -> tuple[HubTarget, Any]:
    """A target whose library is checked for how it is called, and remembers it.

    Args:
        branches: text of each file of each branch; equal ones are one commit.
        tmp_path: for downloads.
    """
    api: Any = create_autospec(HfApi, instance=True)
    api.endpoint = "https://hub"
    found = [
        SimpleNamespace(name=name, target_commit=repr(files)) for name, files in branches.items()
    ]
    api.list_repo_refs.return_value = SimpleNamespace(branches=found)
    api.list_repo_files.side_effect = lambda _, *, revision: [
        ".gitattributes",
        *branches[revision],
    ]

    def download(_: str, name: str, *, revision: str, **__: Any) -> str:
        (tmp_path / "download").write_text(branches[revision][name])
        return str(tmp_path / "download")

    api.hf_hub_download.side_effect = download
    return HubTarget("owner/name", api), api


def test_calls_of_the_hub(tmp_path: Path) -> None:
    branches = {"main": {}, "other": {"x": ""}, "done": {"SHA256SUMS": "sums\n"}, "begun": {}}
    target, api = _hub(branches, tmp_path)
    assert target.pushed(["done", "begun", "new"]) == {"done": "sums\n"}
    target.refuse_foreign(["begun", "new"])
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


def test_branches_of_somebody_else(two: Path, tmp_path: Path) -> None:
    release = _folders(two)[0]
    revision = release.name.removeprefix("dots-vlm-nano-")
    ours = {path.name: path.read_text(errors="replace") for path in release.iterdir()}
    index = {name: (two / name).read_text() for name in ("README.md", "collection.json")}
    for branches, foreign in (
        ({"main": {"README.md": "mine"}}, "README.md"),
        ({"main": index, revision: {"thesis.txt": ""}}, f"{revision}/thesis.txt"),
        ({"main": index, revision: ours | {"thesis.txt": ""}}, f"{revision}/thesis.txt"),
        ({"main": index, revision: ours | {"training_state.json": "{}"}}, f"{revision}/README.md"),
        ({"main": index, revision: ours}, None),
        # Made, and then the network was gone.
        ({"main": index, revision: index}, None),
        ({"main": {"model.safetensors": ""}, "mine": {"x": ""}}, None),
        ({}, None),
    ):
        target, _ = _hub(branches, tmp_path)
        target.pushed([revision])
        if foreign is None:
            target.refuse_foreign([revision])
            continue
        with pytest.raises(ConversionError, match=f"--push owner/name: {foreign} was not written"):
            target.refuse_foreign([revision])
