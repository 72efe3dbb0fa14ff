"""Checkpoints on disk: names, what counts as whole, the newest, which to keep.

    checkpoints/
        iter_0000100/                       whole: it was renamed into place after all was written
        .incomplete-iter_0000200/           being written, or left by a crash; never read
        .replaced-iter_0000100/             making room for the same iteration written again
        latest_checkpointed_iteration.txt

A checkpoint holds the engine's sharded files (`__0_0.distcp`, `.metadata`, `common.pt`,
`metadata.json`), `state.json` (counters, model, versions), `config.yaml` (resolved),
`tokenizer.json`, `chat_template.json` where dialogues were written by one, and `manifest.json`
(size and SHA-256 of every other file).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError, DamagedCheckpoint

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.json"
"""Of dialogues that a chat template wrote alone."""
MODEL = "model.yaml"
"""Of an imported checkpoint alone: its model, for `model=FILE`."""
FORMAT_VERSION = 1
STATE_PARTS = {"progress": dict, "model": dict, "precision": str, "data": dict, "frozen": list}
"""What `state.json` must hold to be loaded from, and of what kind."""
_NAME = re.compile(r"iter_(\d{7,})$")
_BLOCK = 1 << 22


def checkpoint_name(iteration: int) -> str:
    """Folder name of an iteration: `iter_0000100`."""
    return f"iter_{iteration:07d}"


def incomplete_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return root / f".incomplete-{checkpoint_name(iteration)}"


def list_iterations(root: Path) -> list[int]:
    """Iterations of the whole checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    found = [int(match[1]) for path in root.iterdir() if (match := _NAME.match(path.name))]
    return sorted(i for i in found if (root / checkpoint_name(i) / MANIFEST).is_file())


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its own folder, a `checkpoints/` folder or a run folder (the newest).

    Raises:
        CheckpointError: there is none, or the newest named by the latest file is not there.
    """
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        iterations = list_iterations(root)
        if iterations:
            return root / checkpoint_name(_latest(root, iterations))
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; expected a run or a checkpoint")
    if _is_hugging_face(path):
        raise CheckpointError(
            f"checkpoint {path}: is a Hugging Face folder; expected a run or a checkpoint: "
            f"make one of it first with mvlm import {path} CHECKPOINT"
        )
    hidden = sorted(
        found for root in (path, path / "checkpoints") for found in root.glob(".replaced-iter_*")
    )
    hint = f"; a replacement was cut short, see {hidden[-1]}" if hidden else ""
    raise CheckpointError(
        f"checkpoint {path}: holds no whole checkpoint (a folder iter_... with {MANIFEST}){hint}"
    )


def _is_hugging_face(path: Path) -> bool:
    try:
        found = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint(("model_type", "architectures"))


def _latest(root: Path, iterations: list[int]) -> int:
    note = root / LATEST
    if not note.is_file():
        return iterations[-1]
    text = note.read_text().strip()
    if not text.isdecimal() or int(text) not in iterations:
        raise CheckpointError(
            f"{note} names iteration {text!r}, but the whole checkpoints here are "
            f"{', '.join(map(str, iterations))}; correct or remove that file"
        )
    return int(text)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a crash leaves the old or the new one, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def commit(root: Path, iteration: int) -> Path:
    """Rename a fully written checkpoint into place and point the latest file at it.

    The same iteration written again (a run that was set back) replaces the older one; a crash in
    between leaves one of the two, which `tidy` puts in place.
    """
    final, replaced = root / checkpoint_name(iteration), _replaced_path(root, iteration)
    # What the new name leads to is on disk before the name is.
    sync(incomplete_path(root, iteration))
    if final.exists():
        # Of a replacement before, whose old half could not be removed then.
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(incomplete_path(root, iteration), final)
    sync(root)
    write_atomically(root / LATEST, f"{iteration}\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def set_aside(root: Path, iteration: int) -> Path:
    """Take a damaged checkpoint out of the way, and let the one before it be the latest.

    Returns:
        Where it lies now.
    """
    kept = root / f"damaged-{checkpoint_name(iteration)}"
    shutil.rmtree(kept, ignore_errors=True)
    os.rename(root / checkpoint_name(iteration), kept)
    sync(root)
    before = max(found for found in list_iterations(root) if found < iteration)
    write_atomically(root / LATEST, f"{before}\n")
    return kept


def remove_old(
    root: Path, iteration: int, keep_last: int | None, keep_every: int | None
) -> list[int]:
    """Remove checkpoints before `iteration`, which was just committed.

    Kept are the newest `keep_last` up to `iteration`, multiples of `keep_every`, and what lies
    after `iteration`: a run that was set back has not reached it again.

    Returns:
        The iterations removed.
    """
    if keep_last is None:
        return []
    old = [found for found in list_iterations(root) if found <= iteration][:-keep_last]
    removed = [found for found in old if not (keep_every and found % keep_every == 0)]
    for found in removed:
        # Under its final name a half-removed folder would look whole.
        hidden = incomplete_path(root, found)
        os.rename(root / checkpoint_name(found), hidden)
        shutil.rmtree(hidden)
    return removed


def tidy(root: Path) -> None:
    """Clear away what a crash left; only before a run starts to write."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        prefix, _, name = path.name.partition("-")
        if _NAME.match(name) is None:
            continue
        if prefix == ".replaced" and not (root / name).exists():
            os.rename(path, root / name)
        elif prefix in (".replaced", ".incomplete"):
            # What cannot go now (a file that someone still reads) is in nobody's way.
            shutil.rmtree(path, ignore_errors=True)


def _replaced_path(root: Path, iteration: int) -> Path:
    return root / f".replaced-{checkpoint_name(iteration)}"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    value = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            value.update(block)
    return value.hexdigest()


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Files of a checkpoint with their sizes and digests.

    Raises:
        CheckpointError: the manifest is damaged or of an unknown version.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: format_version {manifest.get('format_version')!r}; this version "
            f"of megatron-vlm reads {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise DamagedCheckpoint(
            f"{path / MANIFEST}: lists no sizes and digests; the checkpoint is damaged, use another"
        )
    return files


def read_state(path: Path) -> dict[str, Any]:
    """Counters, model, data stream and versions of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or lacks a part.
    """
    state = _read_json(path / STATE)
    for name, kind in STATE_PARTS.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(
                f"{path / STATE}: {name} is missing or no {kind.__name__}; the checkpoint is "
                "damaged or of an older version, use another"
            )
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
        return found
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{path}: missing; the checkpoint is damaged, use another"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
