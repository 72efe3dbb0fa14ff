"""The helper that holds checkpoint writers' results outlives signals that ask for a save."""

from __future__ import annotations

import os
import signal
import time

import pytest

pytestmark = pytest.mark.unit


def test_helper_outlives_requests_to_stop() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    from megatron_vlm.platform import results_queue

    results_queue.start_results_queue()
    try:
        queue = filesystem_async._get_write_results_queue()
        assert results_queue._manager is not None
        helper = results_queue._manager._process  # type: ignore[attr-defined]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(helper.pid, number)
        time.sleep(0.2)
        assert helper.is_alive()
        queue.put("written")
        assert queue.get() == "written"
        results_queue.start_results_queue()
        assert filesystem_async._get_write_results_queue() is queue
    finally:
        results_queue.stop_results_queue()
    assert filesystem_async._results_queue is None and not helper.is_alive()
