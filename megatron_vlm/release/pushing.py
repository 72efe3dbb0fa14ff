"""Carrying finished releases elsewhere: to the hub, or into a folder.

One repository holds all releases of a model, each as a revision (a branch) of its own, as the
intermediate checkpoints of OLMo and Pythia are published: `from_pretrained(repository,
revision=...)` loads any of them, files that releases share are stored once, and one page, the main
branch, lists them. What is there already is known by its SHA256SUMS and not sent again.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from megatron_vlm.checkpoint.folder import digest, write_atomically
from megatron_vlm.errors import ConfigError, ConversionError, TaskFailed
from megatron_vlm.release.card import SUMS_FILE
from megatron_vlm.release.collection import check_free, foreign_index
from megatron_vlm.release.placing import draft, nearest
from megatron_vlm.release.release_folder import foreign_in_revision, sums

_MAIN = "main"
_HUB_FILES = {".gitattributes"}
"""What the hub puts into every branch itself."""


class PushError(TaskFailed):
    """A release could not be carried there."""


class PushTarget(ABC):
    """Where releases go: each into a revision, the list of them beside all revisions."""

    def __init__(self, said: str) -> None:
        """Nothing is made or asked yet.

        Args:
            said: what errors call it.
        """
        self._said = said

    def pushed(self, wanted: list[str]) -> dict[str, str]:
        """SHA256SUMS of each wanted revision that is there and whole.

        Raises:
            PushError: the target cannot be reached, or not be written.
        """
        self._prepare()
        whole = [name for name in wanted if SUMS_FILE in self._files(name)]
        return {name: self._read(name, SUMS_FILE) for name in whole}

    def refuse_foreign(self, revisions: list[str]) -> None:
        """See to it that nothing is replaced but what was pushed; after `pushed` only.

        Args:
            revisions: those to be pushed.

        Raises:
            ConversionError: a revision, or the list, is somebody else's.
            PushError: the target cannot be reached.
        """
        index = foreign_index(self._files(None), lambda name: self._read(None, name))
        if index is not None:
            raise self._not_ours(index)
        for revision in revisions:
            foreign = foreign_in_revision(
                revision, self._files(revision), functools.partial(self._read, revision)
            )
            if foreign is not None:
                raise self._not_ours(str(PurePosixPath(revision, foreign)))

    def _not_ours(self, what: str) -> ConversionError:
        return ConversionError(
            f"--push {self._said}: {what} was not written by mvlm release; nothing was pushed; "
            "remove that, or name another target"
        )

    @abstractmethod
    def _prepare(self) -> None:
        """Make sure that releases can be sent there."""

    @abstractmethod
    def _files(self, revision: str | None) -> set[str]:
        """Names of a revision's files; null: those beside all revisions."""

    @abstractmethod
    def _read(self, revision: str | None, name: str) -> str:
        """The text of one of them."""

    @abstractmethod
    def push(self, revision: str, folder: Path) -> None:
        """Send a release under a revision's name, in the place of what has that name.

        Raises:
            PushError: it did not arrive.
        """

    @abstractmethod
    def push_index(self, files: Mapping[str, str]) -> None:
        """Send the list of all releases.

        Raises:
            PushError: it did not arrive.
        """

    @abstractmethod
    def link(self, revision: str) -> str:
        """Where the list finds a revision."""


def push_target(text: str) -> PushTarget:
    """What `--push` names: `OWNER/NAME` on the hub, or a folder as `file:///path`.

    Raises:
        ConfigError: it is neither, huggingface_hub is not installed, or there is no token.
        ConversionError: the folder is a file, cannot be written, or holds something else.
    """
    if text.startswith("file:"):
        address = urlparse(text)
        if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
            raise ConfigError(f"--push {text}: expected a folder as file:///path")
        folder = Path(unquote(address.path))
        check_free(folder)
        place = nearest(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConversionError(
                f"--push {text}: {place} is no folder that can be written into; name another"
            )
        return FolderTarget(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", text, re.ASCII):
        raise ConfigError(f"--push {text}: expected OWNER/NAME, or a folder as file:///path")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"--push {text}: huggingface_hub is not installed; install the extra `release` "
            "(pip install -e '.[release]' in a clone), or push to a folder (file:///path)"
        )
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            f"--push {text}: there is no token for the hub; `hf auth login`, set HF_TOKEN, or push "
            "to a folder (file:///path)"
        )
    return HubTarget(text)


class FolderTarget(PushTarget):
    """A folder with one folder a revision."""

    def __init__(self, path: Path) -> None:
        """Nothing is made yet."""
        super().__init__(str(path))
        self._path = path

    def push(self, revision: str, folder: Path) -> None:
        """See `PushTarget`. The folder appears under its name when all of it was copied."""
        final = self._path / revision
        with draft(final) as begun, self._reported(f"{revision} could not be written"):
            shutil.copytree(folder, begun.path, copy_function=_copy)
            for name, expected in sums(begun.path).items():
                if digest(begun.path / name) != expected:
                    raise PushError(
                        f"{final / name}: was changed on its way; run the command again"
                    )
            replace = final.exists()
            if replace:
                # Copying has taken its time.
                self.refuse_foreign([revision])
            begun.commit(replace)

    def push_index(self, files: Mapping[str, str]) -> None:
        """See `PushTarget`."""
        with self._reported("the list could not be written"):
            for name, text in files.items():
                write_atomically(self._path / name, text)

    def link(self, revision: str) -> str:
        """See `PushTarget`."""
        return revision

    def _prepare(self) -> None:
        with self._reported("cannot be used"):
            self._path.mkdir(parents=True, exist_ok=True)

    def _files(self, revision: str | None) -> set[str]:
        with self._reported("cannot be read"):
            if revision is None:
                return {path.name for path in self._path.iterdir()}
            folder = self._path / revision
            # A file, or a link to nowhere, is in the way of a folder as itself.
            if os.path.lexists(folder) and not folder.is_dir():
                return {"."}
            return {
                path.relative_to(folder).as_posix()
                for path in folder.rglob("*")
                if path.is_symlink() or not path.is_dir()
            }

    def _read(self, revision: str | None, name: str) -> str:
        with self._reported(f"{name} of {revision or 'the list'} cannot be read"):
            return (self._path / (revision or "") / name).read_text(errors="replace")

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PushError(
                f"--push {self._path}: {what} ({error.strerror or error}); all releases are whole "
                "where they were made: run the command again to send what is missing"
            ) from None


class HubTarget(PushTarget):
    """A repository on the Hugging Face hub, with one branch a revision."""

    def __init__(self, repository: str, api: Any = None) -> None:
        """Nothing is asked yet.

        Args:
            repository: `OWNER/NAME`.
            api: an `HfApi`; null: one of the environment (HF_ENDPOINT, HF_TOKEN or a login).
        """
        super().__init__(repository)
        self._repository, self._api = repository, api
        self._branches: dict[str, str] = {}
        """Their newest commits."""

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

    def _prepare(self) -> None:
        """The repository is made, private, if there is none."""
        with _reported(self._repository, "cannot be reached"):
            api = self._hub()
            api.create_repo(self._repository, private=True, exist_ok=True)
            found = api.list_repo_refs(self._repository).branches
            self._branches = {branch.name: branch.target_commit for branch in found}

    def _files(self, revision: str | None) -> set[str]:
        branch = revision or _MAIN
        commit = self._branches.get(branch)
        # A branch begins as a copy of main, and has nothing of its own then.
        if commit is None or (revision and commit == self._branches.get(_MAIN)):
            return set()
        with _reported(self._repository, f"{branch} cannot be listed"):
            return {*self._hub().list_repo_files(self._repository, revision=branch)} - _HUB_FILES

    def _read(self, revision: str | None, name: str) -> str:
        with (
            _reported(self._repository, f"{name} of {revision or _MAIN} cannot be read"),
            tempfile.TemporaryDirectory() as folder,
        ):
            file = self._hub().hf_hub_download(
                self._repository, name, revision=revision or _MAIN, local_dir=folder
            )
            return Path(file).read_text(errors="replace")

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
