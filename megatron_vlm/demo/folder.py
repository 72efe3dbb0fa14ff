"""The demo's run folder: only a folder that the demo has marked as its own is ever emptied."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.checkpoint import lock
from megatron_vlm.errors import ConfigError

RESULT = "result.json"
"""Numbers of a finished demo; written last."""

_MARKER = "demo.json"
_FORMAT = "megatron-vlm demo run 1"
_FOLDERS = ("checkpoints", "tensorboard", "logs")
ANSWERS = "answers.json"
_FILES = ("metrics.jsonl", "config.yaml", "answers.png", ANSWERS, lock.NAME, RESULT)


@dataclass
class DemoFolder:
    """A run folder that belongs to the demo."""

    path: Path
    samples: int | None
    """Training samples of the data set in it; null while that is not whole."""

    @property
    def finished(self) -> bool:
        """Whether a demo went to its end here."""
        return (self.path / RESULT).exists()

    def note_samples(self, samples: int | None) -> None:
        """Remember what the data set holds, so that an interrupted build is not taken for whole."""
        self.samples = samples
        _write_marker(self.path, samples)

    def clear(self) -> None:
        """Remove the run, so that another can start; the data set stays.

        Raises:
            ConfigError: something cannot be removed.
        """
        try:
            for name in (*_FILES, *_FOLDERS):
                doomed = self.path / name
                if doomed.is_dir() and not doomed.is_symlink():
                    shutil.rmtree(doomed)
                else:
                    doomed.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {self.path}: {error.filename} of the demo before cannot be removed "
                f"({error.strerror}); name another folder"
            ) from error


def claim(path: Path) -> DemoFolder:
    """Make `path` the demo's: a new or empty folder, or one that the demo has used before.

    Raises:
        ConfigError: it holds what the demo did not write, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        marker = _read_marker(path)
        if marker is None:
            if any(path.iterdir()):
                raise ConfigError(
                    f"--run-dir {path}: holds files and was not made by `mvlm demo`, which would "
                    "overwrite some; name a new folder, or empty this one"
                )
            _write_marker(path, None)
            marker = {}
    except OSError as error:
        raise ConfigError(
            f"--run-dir {path}: cannot be written ({error.strerror}); name another folder"
        ) from error
    samples = marker.get("samples")
    return DemoFolder(path, samples if isinstance(samples, int) else None)


def _read_marker(path: Path) -> dict[str, object] | None:
    """What the marker says; null where there is none of ours."""
    try:
        marker = json.loads((path / _MARKER).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("format") == _FORMAT else None


def _write_marker(path: Path, samples: int | None) -> None:
    text = json.dumps({"format": _FORMAT, "samples": samples}, indent=2)
    (path / _MARKER).write_text(text + "\n")
