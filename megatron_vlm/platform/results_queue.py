"""The queue through which the engine's checkpoint writers report, held by a helper process.

The engine would start that process by itself at the first save. Launchers send SIGTERM to whole
process groups, and a helper that dies of it fails the very save that the signal asks for: so it is
started here, with those signals blocked.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.managers import SyncManager

import torch

_manager: SyncManager | None = None


def start_results_queue() -> None:
    """Give the engine its queue, if it has none yet."""
    global _manager
    if _manager is not None:
        return
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    # Beside CUDA a process must be spawned; a forked one starts in milliseconds.
    method = "spawn" if torch.cuda.is_available() else "fork"
    _manager = SyncManager(ctx=multiprocessing.get_context(method))
    blocked = {signal.SIGTERM, signal.SIGUSR1}
    # A function of the standard library: a spawned process need not import this package.
    _manager.start(signal.pthread_sigmask, (signal.SIG_BLOCK, blocked))
    filesystem_async._results_queue = _manager.Queue()


def stop_results_queue() -> None:
    """End the helper process, if there is one."""
    global _manager
    if _manager is not None:
        import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

        _manager.shutdown()
        _manager = filesystem_async._results_queue = None
