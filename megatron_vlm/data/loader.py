"""Feeds one rank its batches, fetched ahead by a background thread.

The loader keeps no state worth saving: the number of the first row is all that it starts from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from threading import Condition, Thread
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from megatron_vlm.data.collate import PictureBatch, TextBatch, collate_pictures, collate_text
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.plan import StepPlan, plan_rows
from megatron_vlm.data.rows import RowSource

if TYPE_CHECKING:
    from megatron_vlm.config.schema import VisionConfig


@dataclass(frozen=True, slots=True)
class RankView:
    """What decides which part of a step a rank fetches."""

    rank: int
    """Rank in the world; it encodes the pictures planned for it."""
    world_size: int
    """Ranks that share the pictures."""
    replica: int
    """Data-parallel replica that the rank belongs to."""
    num_replicas: int
    """Data-parallel size."""
    needs_text: bool
    """True on ranks that embed tokens or compute the loss."""


class LoadedStep(NamedTuple):
    """One step as one rank gets it."""

    plan: StepPlan
    """The whole step, the same on every rank."""
    pictures: PictureBatch
    """The pictures that this rank encodes."""
    texts: list[TextBatch | None]
    """One entry for each micro-batch of this rank's replica; null where text is not needed."""


class StepLoader:
    """Iterates over steps. Close it, or use it as a context manager."""

    def __init__(
        self,
        source: RowSource,
        reader: SampleReader,
        rank_view: RankView,
        first_row: int = 0,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        vision: VisionConfig | None,
        prefetch_steps: int = 2,
        decode_threads: int = 1,
        batches: Iterable[Sequence[int]] | None = None,
    ) -> None:
        """Start fetching.

        Args:
            source: the rows.
            reader: reads the same data set.
            rank_view: this rank's part.
            first_row: rows consumed so far; the first step starts there.
            global_batch_size: rows of a step.
            micro_batch_size: rows of a forward pass.
            vision: the encoder's geometry; null for a text-only model.
            prefetch_steps: steps fetched ahead; 0 fetches in the calling thread.
            decode_threads: threads that decode pictures; at most 1 uses none of its own.
            batches: row numbers of each step, as `held_out_batches` gives them, instead of the
                endless run from `first_row`.
        """
        self._source = source
        self._reader = reader
        self._view = rank_view
        self._micro_batch_size = micro_batch_size
        self._vision = vision
        self._batches: Iterator[Sequence[int]] = iter(
            _endless(first_row, global_batch_size) if batches is None else batches
        )
        self._prefetch = prefetch_steps
        self._pool = ThreadPoolExecutor(decode_threads) if decode_threads > 1 else None
        self._changed = Condition()
        self._buffer: deque[LoadedStep] = deque()
        self._failure: BaseException | None = None
        self._stopping = False
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited for data."""
        self._thread: Thread | None = None
        if prefetch_steps:
            # A daemon, so that a consumer that dies without closing does not hang the process.
            self._thread = Thread(target=self._fetch_ahead, name="step-loader", daemon=True)
            self._thread.start()

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards so far, ahead of the consumer included."""
        return self._reader.bytes_read

    @property
    def pictures_decoded(self) -> int:
        """Pictures decoded so far, ahead of the consumer included."""
        return self._reader.pictures_decoded

    def __iter__(self) -> StepLoader:
        """Itself: a loader is passed over once."""
        return self

    def __next__(self) -> LoadedStep:
        """The next step, in order.

        Raises:
            StopIteration: `batches` are used up, or the loader was closed.
            BaseException: whatever the fetching thread met, unchanged, once the steps before it
                were handed out.
        """
        started = perf_counter()
        try:
            return self._take() if self._thread else self._fetch()
        finally:
            self.wait_seconds += perf_counter() - started

    def close(self) -> None:
        """Stop fetching and join the thread; what was fetched ahead is dropped."""
        with self._changed:
            self._stopping = True
            self._buffer.clear()
            self._changed.notify_all()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if self._thread:
            self._thread.join()

    def __enter__(self) -> StepLoader:
        """Itself; closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _fetch(self) -> LoadedStep:
        if self._stopping:
            raise StopIteration
        view = self._view
        plan = plan_rows(
            self._source,
            next(self._batches),
            self._micro_batch_size,
            view.num_replicas,
            view.world_size,
        )
        pictures = collate_pictures(plan, view.rank, self._reader, self._vision, self._pool)
        token_ids = self._reader.index.special_ids
        texts = [
            collate_text(micro, self._reader, token_ids) if view.needs_text else None
            for micro in plan.micro_batches[view.replica]
        ]
        return LoadedStep(plan, pictures, texts)

    def _take(self) -> LoadedStep:
        with self._changed:
            self._changed.wait_for(lambda: self._buffer or self._failure or self._stopping)
            if self._stopping:
                raise StopIteration
            if self._buffer:
                step = self._buffer.popleft()
                self._changed.notify_all()
                return step
            assert self._failure is not None
            raise self._failure

    def _fetch_ahead(self) -> None:
        try:
            while True:
                with self._changed:
                    # Before fetching, so that no more than `prefetch_steps` are ever held.
                    self._changed.wait_for(
                        lambda: len(self._buffer) < self._prefetch or self._stopping
                    )
                step = self._fetch()
                with self._changed:
                    self._buffer.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # the consumer raises it; StopIteration ends it
            with self._changed:
                self._failure = error
                self._changed.notify_all()


def _endless(first_row: int, global_batch_size: int) -> Iterator[Sequence[int]]:
    for first in count(first_row, global_batch_size):
        yield range(first, first + global_batch_size)
