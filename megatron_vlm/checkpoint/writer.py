"""Writing one checkpoint so that ranks agree on success at every phase, and none is left waiting.

In the engine a failure on one rank (a full disk, say) is raised there alone while the others wait
in a collective. Here each phase ends with an agreement: all go on, or all raise the same error.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.checkpoint import folder
from megatron_vlm.errors import CheckpointError, CheckpointNotSaved
from megatron_vlm.platform.results_queue import start_results_queue
from megatron_vlm.resilience import attempts

logger = logging.getLogger("megatron_vlm")


class CheckpointWriter:
    """Writes checkpoints under `root`, one at a time; the newer waits for the older."""

    def __init__(
        self, root: Path, async_save: bool, keep_last: int | None, keep_every: int | None
    ) -> None:
        self._root, self._async = root, async_save
        self._keep = (keep_last, keep_every)
        self._queue: AsyncCallsQueue | None = AsyncCallsQueue() if async_save else None
        self._validated = False

    def write(
        self,
        iteration: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        texts: dict[str, str],
    ) -> None:
        """Save sharded tensors, a JSON-able state and text files by name; collective.

        Synchronous: whole on disk when this returns. Asynchronous: `poll` finishes it later.

        Raises:
            CheckpointNotSaved: on every rank, when any could not write; nothing half-written is
                left under a name that is ever read.
        """
        self.wait()
        path = folder.incomplete_path(self._root, iteration)
        self._together(iteration, lambda: _begin(path, state, texts))
        # Once a run: that every element of every tensor has exactly one owner.
        sharded, _ = save_preprocess(tensors, validate_access_integrity=not self._validated)
        self._validated = True
        start_results_queue()
        strategy = _Strategy("torch_dist", 1)
        request = strategy.async_save(sharded, path)
        if request.async_fn is not None:
            # With the files, so that an asynchronous save keeps nobody waiting for digests.
            write = partial(_write_and_digest, request.async_fn, path, dist.get_rank())
            request = request._replace(async_fn=write)
        finish = _Finish(self, iteration, path, strategy, request)
        if self._queue is not None:
            self._queue.schedule_async_request(request._replace(finalize_fns=[finish]))
            return
        self._together(iteration, lambda: _write_now(request))
        finish()

    def poll(self) -> None:
        """Finish an asynchronous save if all ranks have written; collective."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish an asynchronous save, waiting for it; collective."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish what is under way and end helper processes."""
        if self._queue is not None:
            self.wait()
            self._queue.close()
            self._queue = None

    def _together(self, iteration: int, action: Callable[[], None]) -> None:
        """Run `action` on every rank; if it failed anywhere, raise everywhere."""
        failure: str | None = None
        try:
            action()
        # Whatever it was, the others must hear of it; torch's own is no Exception.
        except (Exception, CheckpointException) as error:
            failure = first_cause(error)
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        found = {rank: text for rank, text in enumerate(failures) if text is not None}
        if found:
            path = folder.incomplete_path(self._root, iteration)
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            dist.barrier()
            rank, text = next(iter(found.items()))
            free = shutil.disk_usage(self._root).free // 2**20
            raise CheckpointNotSaved(
                f"{self._root / folder.checkpoint_name(iteration)}: could not be saved on rank "
                f"{rank} ({text}; {free} MiB are free there); free space or choose another "
                "run_dir, older checkpoints are untouched"
            )


class _Strategy(TorchDistSaveShardedStrategy):
    """The engine's writer, whose last file's failure on rank 0 is kept instead of raised there."""

    failure: Exception | None = None

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any
    ) -> AsyncRequest:
        write_index = writer.finish

        def finish(metadata: Any, results: Any) -> None:
            try:
                write_index(metadata, results)
            except Exception as error:
                self.failure = error

        writer.finish = finish
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class _Finish:
    """The phases after the data files: index, manifest, rename, retention."""

    def __init__(
        self,
        writer: CheckpointWriter,
        iteration: int,
        path: Path,
        strategy: _Strategy,
        request: AsyncRequest,
    ) -> None:
        self._writer, self._iteration, self._path = writer, iteration, path
        self._strategy, self._request = strategy, request

    def __call__(self) -> None:
        together, iteration = self._writer._together, self._iteration
        together(iteration, self._write_index)
        mine: dict[str, dict[str, Any]] = {}
        wrote = self._request.async_fn is not None
        together(iteration, lambda: mine.update(_describe(self._path, dist.get_rank(), wrote)))
        parts: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        files = {name: entry for part in parts for name, entry in part.items()}
        together(iteration, lambda: self._commit(files))

    def _write_index(self) -> None:
        for finalize in self._request.finalize_fns:
            finalize()
        if self._strategy.failure is not None:
            raise self._strategy.failure

    def _commit(self, files: dict[str, dict[str, Any]]) -> None:
        if dist.get_rank() != 0:
            return
        manifest = {"format_version": folder.FORMAT_VERSION, "files": files}
        folder.write_atomically(
            self._path / folder.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True)
        )
        root = self._writer._root
        attempts.check_ours(root.parent)
        folder.commit(root, self._iteration)
        try:
            folder.remove_old(root, self._iteration, *self._writer._keep)
        except OSError as error:
            # The new one is safe: a file that someone still reads must not end the run.
            logger.warning("an old checkpoint could not be removed (%s)", error)


def first_cause(error: BaseException) -> str:
    """The first cause in one line; the engine wraps it with a traceback for every rank."""
    wrapped = getattr(error, "failures", None)
    if wrapped:
        return first_cause(next(iter(wrapped.values()))[0])
    cause = error.__cause__
    if cause is not None:
        return first_cause(cause)
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _begin(path: Path, state: dict[str, Any], texts: dict[str, str]) -> None:
    if dist.get_rank() != 0:
        return
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write_companions(path, state, texts)


def write_companions(path: Path, state: dict[str, Any], texts: dict[str, str]) -> None:
    """What a checkpoint holds besides tensors, their index and the manifest."""
    # The engine's tools want these two; ours read state.json.
    torch.save({}, path / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(path))
    for file in list(path.iterdir()):
        folder.sync(file)
    folder.write_atomically(path / folder.STATE, json.dumps(state, indent=1))
    for name, text in texts.items():
        folder.write_atomically(path / name, text)


def _write_now(request: AsyncRequest) -> None:
    if request.async_fn is None:
        return
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    request.async_fn(*arguments)
    # The engine reports a failed write through its queue only; look, and put it back.
    results = arguments[2]
    outcome = results.get()
    results.put(outcome)
    if isinstance(outcome, Exception):
        raise outcome


def _write_and_digest(write: Callable[..., None], path: Path, rank: int, *arguments: Any) -> None:
    """Write this rank's data files and, beside them, a note of their digests."""
    write(*arguments)
    files = {file.name: _entry(file) for file in sorted(path.glob(f"__{rank}_*.distcp"))}
    _note(path, rank).write_text(json.dumps(files))


def _describe(path: Path, rank: int, wrote: bool) -> dict[str, dict[str, Any]]:
    """Size and digest of the files this rank wrote.

    Raises:
        CheckpointError: it `wrote` and left no note of it: its helper process died after writing.
    """
    note = _note(path, rank)
    files: dict[str, dict[str, Any]] = {}
    if wrote:
        if not note.is_file():
            raise CheckpointError("the process that wrote its files died before it was done")
        files = json.loads(note.read_text())
        note.unlink()
    if rank == 0:
        own = (path / name for name in os.listdir(path) if not _DATA_OR_NOTE.fullmatch(name))
        files |= {file.name: _entry(file) for file in own}
    return files


_DATA_OR_NOTE = re.compile(r"__\d+_\d+\.distcp|\.digests_\d+\.json")


def _note(path: Path, rank: int) -> Path:
    return path / f".digests_{rank}.json"


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": folder.digest(file)}
