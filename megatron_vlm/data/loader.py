"""Feeds one rank its batches, fetched ahead by a background thread.

The loader keeps no state worth saving: each step carries the place behind it (`LoadedStep.cursor`),
and that is all that another loader starts from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.data.collate import Document, TextBatch, collate_text, read_document
from megatron_vlm.data.decoders import PictureDecoder
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.picture_batch import PictureBatch, PictureFetch
from megatron_vlm.data.plan import StepPlan, plan_step
from megatron_vlm.data.row_table import untied_layout
from megatron_vlm.data.rows import Cursor, Row
from megatron_vlm.data.sharing import Sharing
from megatron_vlm.data.stream import RowStream
from megatron_vlm.data.untie import apply_layout
from megatron_vlm.data.workers import Task, WorkerPool

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig


@dataclass(frozen=True, slots=True)
class RankView:
    """What decides which part of a step a rank fetches."""

    rank: int
    """Rank in the world; it encodes the pictures planned for it."""
    replica: int
    """Data-parallel replica that the rank belongs to."""
    needs_text: bool
    """True on ranks that embed tokens or compute the loss."""
    sharing: Sharing
    """All ranks' replicas, and how pictures are shared out among them."""

    @classmethod
    def alone(cls) -> RankView:
        """One rank that fetches everything."""
        return cls(0, 0, True, Sharing((0,), EncoderCost(0.0, 1.0, 0.0)))


class Failure(NamedTuple):
    """A sample that this rank could not read."""

    document: int
    """Its number within the step."""
    name: str
    """Data set, sample, and its file."""
    reason: str


class LoadedStep(NamedTuple):
    """One step as one rank gets it."""

    plan: StepPlan
    """The whole step, the same on every rank."""
    pictures: PictureBatch
    """The pictures that this rank encodes; one that could not be read is blank."""
    texts: list[TextBatch | None]
    """One entry for each micro-batch of this rank's replica; null where text is not needed."""
    replica: int
    """The data-parallel replica that `texts` are of."""
    cursor: Cursor
    """The place behind the step."""
    is_last: bool = False
    """Whether the data end with it."""
    failures: tuple[Failure, ...] = ()
    """What this rank could not read; other ranks may have failures of their own."""

    def without(self, failed: NDArray[np.bool_], pad_id: int) -> LoadedStep:
        """The step once all ranks agree on what could not be read.

        Args:
            failed: bool [segments of the step].
            pad_id: what takes the place of their tokens.
        """
        for micro, text in zip(self.plan.micro_batches[self.replica], self.texts, strict=True):
            if text is None:
                continue
            bounds = micro.cu_seqlens
            for number in np.flatnonzero((micro.documents >= 0) & failed[micro.documents]):
                span = slice(int(bounds[number]), int(bounds[number + 1]))
                text.tokens[span] = text.labels[span] = pad_id
                text.loss_mask[span] = 0
        return self._replace(plan=self.plan.without(failed))


class StepLoader:
    """Iterates over steps. Close it, or use it as a context manager."""

    def __init__(
        self,
        stream: RowStream,
        readers: Sequence[SampleReader],
        rank_view: RankView,
        cursor: Cursor | None = None,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        vision: VisionConfig | None,
        decoder: PictureDecoder,
        prefetch_steps: int = 2,
        num_workers: int = 1,
        max_rows: int | None = None,
        warn_seconds: float = 30.0,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Start fetching.

        Args:
            stream: the rows.
            readers: read the data sets of `stream.sources`, in their order.
            rank_view: this rank's part.
            cursor: where the first step starts; null: at the first row.
            global_batch_size: rows of a step.
            micro_batch_size: rows of a forward pass.
            vision: the encoder's geometry; null for a text-only model.
            decoder: turns encoded pictures into patches.
            prefetch_steps: steps fetched ahead; 0 fetches only when asked.
            num_workers: threads that read and decode. Steps do not depend on it.
            max_rows: end after so many rows; null: where the data end.
            warn_seconds: a sample that takes longer is named in the log.
            timeout_seconds: a sample that takes longer is given up.
        """
        self._stream = stream
        self._readers = readers
        self._view = rank_view
        self._cursor = stream.start() if cursor is None else cursor
        self._rows_left = max_rows
        self._batch_size = global_batch_size, micro_batch_size
        self._vision = vision
        self._decoder = decoder
        self._prefetch = prefetch_steps
        self._pool = WorkerPool(num_workers, warn_seconds, timeout_seconds)
        self._changed = Condition()
        self._buffer: deque[LoadedStep] = deque()
        self._failure: BaseException | None = None
        self._stopping = False
        self.pictures_decoded = 0
        """Pictures decoded so far, ahead of the consumer included."""
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
        return sum(reader.bytes_read for reader in self._readers)

    def __iter__(self) -> StepLoader:
        """Itself: a loader is passed over once."""
        return self

    def __next__(self) -> LoadedStep:
        """The next step, in order.

        Raises:
            StopIteration: the data have ended, or the loader was closed.
            BaseException: whatever the fetching thread met, unchanged, once the steps before it
                were handed out.
        """
        started = perf_counter()
        try:
            return self._take() if self._thread else self._fetch()
        finally:
            self.wait_seconds += perf_counter() - started

    def close(self) -> None:
        """Stop fetching; what was fetched ahead is dropped."""
        with self._changed:
            self._stopping = True
            self._buffer.clear()
            self._changed.notify_all()
        self._pool.close()
        if self._thread:
            self._thread.join()

    def __enter__(self) -> StepLoader:
        """Itself; closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _fetch(self) -> LoadedStep:
        plan = self._plan()
        micro_batches = plan.micro_batches[self._view.replica]
        pictures = PictureFetch(plan, self._view.rank, self._readers, self._decoder, self._vision)
        picture_tasks = pictures.tasks()
        numbers, text_tasks = self._text_tasks(plan)
        outcomes = self._pool.run([*picture_tasks, *text_tasks])
        if outcomes is None:
            raise StopIteration
        batch, failed = pictures.finish(outcomes[: len(picture_tasks)])
        self.pictures_decoded += len(batch.indices)
        documents: dict[int, Document] = {}
        for number, task, outcome in zip(
            numbers, text_tasks, outcomes[len(picture_tasks) :], strict=True
        ):
            if outcome.error is None:
                documents[number] = outcome.value
            else:
                failed.append((number, task.describe(), str(outcome.error)))
        pad = self._readers[0].index.special_ids.pad
        texts = [
            collate_text(micro, documents, pad) if self._view.needs_text else None
            for micro in micro_batches
        ]
        failures = tuple(Failure(*failure) for failure in failed)
        # Looked up here, in the background: it may mean to pack the next window.
        is_last = not self._stream.take(self._cursor, 1)[0]
        return LoadedStep(plan, batch, texts, self._view.replica, self._cursor, is_last, failures)

    def _plan(self) -> StepPlan:
        global_batch_size, micro_batch_size = self._batch_size
        if self._stopping or self._rows_left == 0:
            raise StopIteration
        planned = plan_step(
            self._stream,
            self._cursor,
            global_batch_size,
            micro_batch_size,
            self._view.sharing,
            self._rows_left,
        )
        if planned is None:
            raise StopIteration
        plan, cursor = planned
        if self._rows_left is not None:
            self._rows_left -= cursor.rows - self._cursor.rows
        self._cursor = cursor
        return plan

    def _text_tasks(self, plan: StepPlan) -> tuple[list[int], list[Task]]:
        """Numbers of the samples whose text this rank needs, and the task that reads each."""
        numbers: list[int] = []
        tasks: list[Task] = []
        if not self._view.needs_text:
            return numbers, tasks
        for micro in plan.micro_batches[self._view.replica]:
            numbers += micro.documents[micro.documents >= 0].tolist()
            for row in micro.rows:
                if row.untied:
                    tasks.append(self._untied_task(row))
                    continue
                for piece in zip(
                    row.source.tolist(),
                    row.sample.tolist(),
                    row.offset.tolist(),
                    row.length.tolist(),
                    strict=True,
                ):
                    tasks.append(self._text_task(*piece))
        return numbers, tasks

    def _text_task(self, source: int, sample: int, offset: int, length: int) -> Task:
        reader, samples = self._readers[source], self._stream.sources[source].samples
        return Task(
            lambda: reader.index.describe(sample),
            lambda: read_document(reader, samples, sample, offset, length),
        )

    def _untied_task(self, row: Row) -> Task:
        number = int(row.source[0])
        reader, source = self._readers[number], self._stream.sources[number]

        def read() -> Document:
            documents = [
                read_document(reader, source.samples, sample, offset, length)
                for sample, offset, length in zip(
                    row.sample.tolist(), row.offset.tolist(), row.length.tolist(), strict=True
                )
            ]
            pairs = [(document.ids, document.flags) for document in documents]
            return Document(*apply_layout(untied_layout(self._stream, row), pairs, reader.knots))

        def describe() -> str:
            named = ", ".join(str(sample) for sample in row.sample.tolist())
            return f"{reader.index.path}: an untied row of samples {named}"

        return Task(describe, read)

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
