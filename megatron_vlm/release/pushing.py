"""Carrying finished releases elsewhere: to the hub, or into a folder.

One repository holds all releases of a model, each as a revision (a branch) of its own, as the
intermediate checkpoints of OLMo and Pythia are published: `from_pretrained(repository,
revision=...)` loads any of them, files that releases share are stored once, and one page, the main
branch, lists them. What is there already is known by its SHA256SUMS and not sent again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from megatron_vlm.checkpoint.folder import digest, sync, write_atomically
from megatron_vlm.errors import ConfigError
from megatron_vlm.release.card import SUMS_FILE


class PushError(Exception):
    """A release could not be carried there."""


class PushTarget(Protocol):
    """Where releases go."""

    def pushed(self, wanted: list[str]) -> dict[str, str]:
        """SHA256SUMS of each wanted revision that is there and whole.

        Raises:
            PushError: the target cannot be reached, or not be written.
        """

    def push(self, revision: str, folder: Path) -> None:
        """Send a release under a revision's name, in the place of what has that name.

        Raises:
            PushError: it did not arrive.
        """

    def push_index(self, files: Mapping[str, str]) -> None:
        """Send the list of all releases.

        Raises:
            PushError: it did not arrive.
        """

    def link(self, revision: str) -> str:
        """Where the list finds a revision."""


def push_target(text: str) -> PushTarget:
    """What `--push` names: `OWNER/NAME` on the hub, or a folder as `file:///path`.

    Raises:
        ConfigError: it is neither, or huggingface_hub is not installed.
    """
    if text.startswith("file:"):
        address = urlparse(text)
        if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
            raise ConfigError(f"--push {text}: expected a folder as file:///path")
        return FolderTarget(Path(unquote(address.path)))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", text, re.ASCII):
        raise ConfigError(f"--push {text}: expected OWNER/NAME, or a folder as file:///path")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"--push {text}: huggingface_hub is not installed; install the extra `release` "
            "(pip install 'megatron-vlm[release]'), or push to a folder (file:///path)"
        )
    return HubTarget(text)


class FolderTarget:
    """A folder with one folder a revision."""

    def __init__(self, path: Path) -> None:
        """Nothing is made yet."""
        self._path = path

    def pushed(self, wanted: list[str]) -> dict[str, str]:
        """See `PushTarget`."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            sums = {revision: self._path / revision / SUMS_FILE for revision in wanted}
            return {name: file.read_text() for name, file in sums.items() if file.is_file()}
        except OSError as error:
            raise self._failed("cannot be used", error) from None

    def push(self, revision: str, folder: Path) -> None:
        """See `PushTarget`. The folder appears under its name when all of it was copied."""
        final, hidden = self._path / revision, self._path / f".{revision}.incomplete"
        old = self._path / f".{revision}.replaced"
        try:
            for left in (hidden, old):
                shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(folder, hidden, copy_function=_copy)
            for line in (hidden / SUMS_FILE).read_text().splitlines():
                expected, name = line.split("  ", 1)
                if digest(hidden / name) != expected:
                    raise PushError(
                        f"{hidden / name}: was changed on its way; run the command again"
                    )
            if final.exists():
                os.rename(final, old)
            os.rename(hidden, final)
            sync(self._path)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise self._failed(f"{revision} could not be written", error) from None
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def push_index(self, files: Mapping[str, str]) -> None:
        """See `PushTarget`."""
        try:
            for name, text in files.items():
                write_atomically(self._path / name, text)
        except OSError as error:
            raise self._failed("the list could not be written", error) from None

    def link(self, revision: str) -> str:
        """See `PushTarget`."""
        return revision

    def _failed(self, what: str, error: OSError) -> PushError:
        return PushError(
            f"--push {self._path}: {what} ({error.strerror or error}); all releases are whole "
            "where they were made: run the command again to send what is missing"
        )


class HubTarget:
    """A repository on the Hugging Face hub, with one branch a revision."""

    def __init__(self, repository: str, api: Any = None) -> None:
        """Nothing is asked yet.

        Args:
            repository: `OWNER/NAME`.
            api: an `HfApi`; null: one of the environment (HF_ENDPOINT, HF_TOKEN or a login).
        """
        self._repository, self._api = repository, api

    def pushed(self, wanted: list[str]) -> dict[str, str]:
        """See `PushTarget`. Makes the repository, private, if there is none."""
        with _reported(self._repository, "cannot be reached"):
            api = self._hub()
            api.create_repo(self._repository, private=True, exist_ok=True)
            there = {branch.name for branch in api.list_repo_refs(self._repository).branches}
            found = {}
            for revision in (name for name in wanted if name in there):
                if not api.file_exists(self._repository, SUMS_FILE, revision=revision):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    file = api.hf_hub_download(
                        self._repository, SUMS_FILE, revision=revision, local_dir=folder
                    )
                    found[revision] = Path(file).read_text()
            return found

    def push(self, revision: str, folder: Path) -> None:
        """See `PushTarget`. One commit, so a branch holds all of a release or none of it."""
        with _reported(self._repository, f"{revision} could not be sent"):
            api = self._hub()
            api.create_branch(self._repository, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=self._repository,
                folder_path=folder,
                revision=revision,
                commit_message=f"Release {revision}",
                # A branch begins as a copy of main, or holds an older release.
                delete_patterns="*",
            )

    def push_index(self, files: Mapping[str, str]) -> None:
        """See `PushTarget`."""
        with (
            _reported(self._repository, "the list could not be sent"),
            tempfile.TemporaryDirectory() as folder,
        ):
            for name, text in files.items():
                (Path(folder) / name).write_text(text)
            self._hub().upload_folder(
                repo_id=self._repository, folder_path=folder, commit_message="List of releases"
            )

    def link(self, revision: str) -> str:
        """See `PushTarget`."""
        return f"{self._hub().endpoint}/{self._repository}/tree/{revision}"

    def _hub(self) -> Any:
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi()
        return self._api


class _reported:
    """Whatever the hub raises becomes one line; a context manager."""

    def __init__(self, repository: str, what: str) -> None:
        self._repository, self._what = repository, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # The library raises errors of its own, of its HTTP client, and plain ones.
        if isinstance(error, Exception):
            said = " ".join(str(error).split()) or type(error).__name__
            raise PushError(
                f"--push {self._repository}: {self._what} ({said[:300]}); it needs a network and a "
                "token (`hf auth login` or HF_TOKEN); all releases are whole where they were made: "
                "run the command again to send what is missing"
            ) from error


def _copy(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    with open(target, "rb+") as stream:
        os.fsync(stream.fileno())
    return target
