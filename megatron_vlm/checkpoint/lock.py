"""One run at a time in a run folder: two would overwrite each other's metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megatron_vlm.errors import CheckpointError

_RETRY_SECONDS = 0.2

NAME = ".in-use"
"""File in a run folder that is locked, and says by whom."""


class RunLock:
    """Holds a run folder until it is released or the process ends, however that happens.

    The kernel keeps it (a POSIX record lock), so nothing is left behind by a crash, and helper
    processes that were forked do not hold it on. On file systems without such locks it is none.
    """

    def __init__(self, run_dir: Path, patience: float = 0.0) -> None:
        """Take the folder.

        Args:
            run_dir: the run's folder.
            patience: seconds for another process to leave it.

        Raises:
            CheckpointError: another process has it.
        """
        deadline = time.monotonic() + patience
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / NAME
        self._stream: IO[str] | None = open(path, "a+")
        while True:
            try:
                fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() < deadline:
                    time.sleep(_RETRY_SECONDS)
                    continue
                self._stream.seek(0)
                holder = self._stream.read().strip() or "another process"
                self.release()
                raise CheckpointError(
                    f"run_dir {run_dir} is in use by {holder}; wait until that run ends, stop it, "
                    "or choose another run_dir"
                ) from None
            except OSError:
                return
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._stream.flush()

    def release(self) -> None:
        """Let others have the folder."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
