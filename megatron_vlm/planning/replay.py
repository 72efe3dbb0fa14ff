"""A step replayed on virtual ranks: which rank does what when, from the cost of each part.

    every rank:      encode 0, 1, ... -> forward and backward passes -> encoder backward 0, 1, ...
    embedding stage: features of w -> forward of w ...  last backward of w -> gradients of w

Every rank works through a list of its own, in the engine's order of passes (`schedule.passes`); a
task begins once the rank is free and what it needs from others has come. The lists of all replicas
are alike and nothing is decided on the way, so a task is replayed once for all replicas and all
tensor and context ranks of a pipeline rank: as arrays of seconds [replicas, inner ranks].

With `all_ranks`, every rank encodes all windows before its passes, as the engine does. The features
of window 0 leave once it is encoded, those of window 1 before the passes, those of window w + 1
when the rank comes to its own forward pass of the first micro-batch of window w; only the embedding
stage waits for them. The gradients of a window leave after the embedding stage's last backward pass
of it; each rank takes them in, and runs the encoder's backward passes, after its own passes.

What is simplified, all of it to the good of the step: a transfer keeps neither end from other work,
as with the engine's overlapped sends, while its plain 1F1B waits for the receiver; features leave
before the pass's input has come; ranks that share a picture do not wait for each other within it.
To its harm, passes that the engine runs at once to hide the experts' all-to-all stand one after the
other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.planning.schedule import passes
from megatron_vlm.planning.step_work import StepWork
from megatron_vlm.planning.timeline import KINDS, Kind, Timeline
from megatron_vlm.topology.layout import Layout

Times: TypeAlias = NDArray[np.float64]


class Task(NamedTuple):
    """What a pipeline rank has to do; -1 where a number does not apply."""

    kind: Kind
    micro_batch: int = -1
    chunk: int = -1
    window: int = -1


Done: TypeAlias = tuple[Kind, int, int]
"""What others may wait for: a kind of work, on which stage (virtual for passes, else a pipeline
rank), of which micro-batch or window."""


def replay(layout: Layout, work: StepWork) -> Timeline:
    """One step of `layout` in virtual time.

    Raises:
        PlanError: costs that do not fit the layout.
    """
    work.check(layout)
    machine = _Machine(layout, work)
    lists = [list(tasks_of(layout, work, pp)) for pp in range(layout.pp)]
    places = [0] * layout.pp
    moved = True
    while moved:
        moved = False
        for pp, tasks in enumerate(lists):
            while places[pp] < len(tasks) and machine.is_ready(pp, tasks[places[pp]]):
                machine.run(pp, tasks[places[pp]])
                places[pp] += 1
                moved = True
    # Features wait for forward passes of earlier windows alone, gradients for none.
    assert all(place == len(tasks) for place, tasks in zip(places, lists, strict=True))
    machine.finish()
    return machine.timeline()


def tasks_of(layout: Layout, work: StepWork, pp: int) -> Iterator[Task]:
    """What pipeline rank `pp` does in a step, in order, until gradients are reduced."""
    if work.num_windows(layout) and work.placement == "all_ranks":
        yield from _with_windows(layout, work, pp)
        return
    embed_chunk = _embedding_stage(layout) // layout.pp
    encodes = work.encode_seconds is not None and pp == layout.embedding_stage
    trains = encodes and work.encode_backward_seconds is not None
    for forward, chunk, micro_batch in passes(layout, pp):
        if encodes and forward and chunk == embed_chunk:
            yield Task("encode", micro_batch, window=micro_batch)
        yield Task("forward" if forward else "backward", micro_batch, chunk)
        if trains and not forward and chunk == embed_chunk:
            yield Task("encode_backward", micro_batch, window=micro_batch)


def _with_windows(layout: Layout, work: StepWork, pp: int) -> Iterator[Task]:
    size, count = work.window_size, work.num_windows(layout)
    trains, embeds = work.encode_backward_seconds is not None, pp == layout.embedding_stage
    embed_chunk = _embedding_stage(layout) // layout.pp
    last_of = {min((w + 1) * size, layout.num_micro_batches) - 1: w for w in range(count)}
    yield Task("encode", window=0)
    yield Task("exchange", window=0)
    yield from (Task("encode", window=window) for window in range(1, count))
    left = 1
    for forward, chunk, micro_batch in passes(layout, pp):
        # The first chunk's pass of a window's first micro-batch: the other chunks' come later.
        begun = micro_batch // size
        if forward and micro_batch % size == 0 and begun + 2 > left < count:
            yield Task("exchange", window=left)
            left += 1
        yield Task("forward" if forward else "backward", micro_batch, chunk)
        done = not forward and chunk == embed_chunk and micro_batch in last_of
        if trains and embeds and done:
            yield Task("exchange_back", window=last_of[micro_batch])
    if trains:
        if not embeds:
            yield from (Task("exchange_back", window=window) for window in range(count))
        yield from (Task("encode_backward", window=window) for window in range(count))


def _embedding_stage(layout: Layout) -> int:
    """The virtual stage that embeds tokens."""
    return next(i for i, stage in enumerate(layout.stages) if "E" in stage)


class _Machine:
    """Virtual ranks and their clocks, one task at a time for all replicas of a pipeline rank."""

    def __init__(self, layout: Layout, work: StepWork) -> None:
        self.layout, self.work = layout, work
        self.inner = layout.tp * layout.cp
        self.embed = _embedding_stage(layout)
        self.windowed = work.placement == "all_ranks" and work.num_windows(layout) > 0
        self.group, self.coupled = work.group_replicas(layout), work.coupled_replicas(layout)
        self.free = np.zeros((layout.pp, layout.dp, self.inner))
        self.left: dict[Done, Times] = {}
        """When a result is there for who needs it: [replicas], or [replicas, inner ranks]."""
        self._arrived: dict[tuple[Kind, int], Times] = {}
        self._records: list[list[tuple[Task, Times, Times]]] = [[] for _ in range(layout.pp)]

    def needs(self, pp: int, task: Task) -> list[Done]:
        """What must be done elsewhere before `task` may begin."""
        stages = len(self.layout.stages)
        stage = task.chunk * self.layout.pp + pp
        if task.kind == "forward":
            needs: list[Done] = [("forward", stage - 1, task.micro_batch)] if stage else []
            if self.windowed and stage == self.embed:
                window = task.micro_batch // self.work.window_size
                needs += [("exchange", rank, window) for rank in range(self.layout.pp)]
            return needs
        if task.kind == "backward":
            own: list[Done] = [("forward", stage, task.micro_batch)]
            return own + [("backward", stage + 1, task.micro_batch)] * (stage + 1 < stages)
        embedding = self.layout.embedding_stage
        sends = task.kind == "exchange_back" and pp == embedding
        if self.windowed and not sends and task.kind in ("exchange_back", "encode_backward"):
            return [("exchange_back", embedding, task.window)]
        return []

    def is_ready(self, pp: int, task: Task) -> bool:
        """Whether all that `task` needs is done, at whatever time."""
        return all(need in self.left for need in self.needs(pp, task))

    def run(self, pp: int, task: Task) -> None:
        """Let the clocks of pipeline rank `pp` pass over `task`."""
        if task.kind in ("forward", "backward"):
            self._run_pass(pp, task)
            return
        start = self.free[pp]
        if self.needs(pp, task):
            gradients = self._of_group("exchange_back", task.window, [self.layout.embedding_stage])
            start = np.maximum(start, gradients[:, None])
        end = start + self._seconds(task, pp)
        self.left[task.kind, pp, task.window] = end
        self._record(pp, task, start, end)
        self.free[pp] = end

    def _run_pass(self, pp: int, task: Task) -> None:
        work, stage = self.work, task.chunk * self.layout.pp + pp
        # Tensor and context ranks pass together: the last of them to be ready begins.
        start = self.free[pp].max(axis=1)
        if task.kind == "forward":
            seconds, before, hop = work.forward_seconds, stage - 1, stage - 1
            if self.windowed and stage == self.embed:
                window = task.micro_batch // work.window_size
                features = self._of_group("exchange", window, list(range(self.layout.pp)))
                start = np.maximum(start, features)
        else:
            seconds, before, hop = work.backward_seconds, stage + 1, stage
        if 0 <= before < len(self.layout.stages):
            sent = self.left[task.kind, before, task.micro_batch]
            start = np.maximum(start, sent + work.send_seconds[hop])
        start = _slowest(start, self.coupled)
        end = start + seconds[:, task.micro_batch, stage]
        # Who is done first waits in the experts' collectives for the slowest.
        released = _slowest(end, self.coupled)
        self.left[task.kind, stage, task.micro_batch] = released
        self._record(pp, task, start[:, None], end[:, None])
        self.free[pp] = released[:, None]

    def _of_group(self, kind: Kind, window: int, ranks: list[int]) -> Times:
        """[replicas] when a window has come from these pipeline ranks of the balance group."""
        known = self._arrived.get((kind, window))
        if known is None:
            last = np.max([self.left[kind, pp, window].max(axis=1) for pp in ranks], axis=0)
            known = self._arrived[kind, window] = _slowest(last, self.group)
        return known

    def _seconds(self, task: Task, pp: int) -> Times:
        """[replicas, inner ranks] of a task that each rank does for itself."""
        seconds = {
            "encode": self.work.encode_seconds,
            "exchange": self.work.exchange_seconds,
            "exchange_back": self.work.exchange_back_seconds,
            "encode_backward": self.work.encode_backward_seconds,
        }[task.kind]
        if seconds is None:
            return np.zeros_like(self.free[pp])
        return np.asarray(seconds[task.window], np.float64).reshape(self.free.shape)[pp]

    def finish(self) -> None:
        """Reduction and update: a barrier before each."""
        # The encoder's weights are on all ranks, or, as a stage's, on all replicas of one.
        shared = self.windowed and self.work.encode_backward_seconds is not None
        axes = (0, 1, 2) if shared else (1, 2)
        start = np.broadcast_to(self.free.max(axis=axes, keepdims=True), self.free.shape)
        reduced = start + np.asarray(self.work.reduce_seconds).reshape(self.free.shape)
        last = np.full_like(reduced, reduced.max())
        updated = last + np.asarray(self.work.optimizer_seconds).reshape(self.free.shape)
        for pp in range(self.layout.pp):
            self._record(pp, Task("reduce"), start[pp], reduced[pp])
            self._record(pp, Task("optimizer"), last[pp], updated[pp])

    def _record(self, pp: int, task: Task, start: Times, end: Times) -> None:
        # `free` is overwritten in place by the next task.
        self._records[pp].append((task, start.copy(), end))

    def timeline(self) -> Timeline:
        """All that was run."""
        shape = self.free.shape[1:]
        lane = shape[0] * shape[1]
        columns: list[list[NDArray]] = [[] for _ in range(7)]
        for pp, records in enumerate(self._records):
            tasks, starts, ends = zip(*records, strict=True)
            numbers = [(KINDS.index(t.kind), t.micro_batch, t.chunk, t.window) for t in tasks]
            columns[0].append(np.repeat(np.arange(pp * lane, (pp + 1) * lane), len(tasks)))
            for column, values in zip(columns[1:5], np.array(numbers).T, strict=True):
                column.append(np.tile(values, lane))
            for column, times in zip(columns[5:], (starts, ends), strict=True):
                whole = np.stack([np.broadcast_to(time, shape) for time in times])
                column.append(whole.reshape(len(tasks), lane).T.ravel())
        rank, kind, micro_batch, chunk, window, start, end = map(np.concatenate, columns)
        return Timeline(
            ranks=self.layout.world_size,
            rank=rank.astype(np.int32),
            kind=kind.astype(np.int8),
            micro_batch=micro_batch.astype(np.int32),
            chunk=chunk.astype(np.int32),
            window=window.astype(np.int32),
            start=start,
            end=end,
        )


def _slowest(times: Times, together: int) -> Times:
    """[replicas] the latest time among so many neighbours."""
    if together == 1:
        return times
    return times.reshape(-1, together).max(axis=1).repeat(together)
