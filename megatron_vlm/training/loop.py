"""A run from start to end, in the order in which it happens.

check (no process group yet) -> join -> build -> initialise or load -> steps -> last checkpoint
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.checkpoint.checkpointer import (
    Checkpointer,
    Progress,
    fall_back,
    find_start,
    hold_run_dir,
    load_model,
    load_run,
)
from megatron_vlm.checkpoint.folder import write_atomically
from megatron_vlm.config import RunConfig, dump_yaml, with_absolute_paths
from megatron_vlm.data.decoders import choose_decoder
from megatron_vlm.data.loader import LoadedStep, StepLoader
from megatron_vlm.data.rows import Cursor
from megatron_vlm.engine.objective import Objective, build_objective
from megatron_vlm.engine.routers import update_bias
from megatron_vlm.engine.step import StepResult, TrainStep
from megatron_vlm.engine.trainable import make_trainable
from megatron_vlm.errors import CheckpointNotSaved, DamagedCheckpoint, UserError
from megatron_vlm.models.initialize import initialize
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.planning.activations import Device
from megatron_vlm.planning.step_memory import StepMemoryModel, device_memory
from megatron_vlm.planning.vision_limits import encoder_patches, window_features
from megatron_vlm.platform import World, detect_world, seed_step, start_distributed, stop
from megatron_vlm.platform.memory import device_bytes, release_unused
from megatron_vlm.resilience import attempts, events, heartbeat
from megatron_vlm.topology.layout import Layout, resolve_layout
from megatron_vlm.topology.mesh import Topology, build_topology, destroy_topology
from megatron_vlm.training.chat import chat_template
from megatron_vlm.training.console import StepBar, logger, open_logs
from megatron_vlm.training.datasets import (
    OpenData,
    data_stream,
    left_out,
    open_held_out_data,
    open_training_data,
)
from megatron_vlm.training.encoder_cost import given_cost, settled_cost
from megatron_vlm.training.encoder_memory import encoder_budget
from megatron_vlm.training.feed import agreed, open_loader, rank_view, share_out
from megatron_vlm.training.guard import Guard, judged_loss, window_around
from megatron_vlm.training.held_out import validate
from megatron_vlm.training.meter import StepMeter
from megatron_vlm.training.metrics import (
    MetricsWriter,
    log_line,
    validation_line,
)
from megatron_vlm.training.schedule import learning_rate
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.timelines import align_clocks, record_timeline

_RELEASE_INTERVAL = 25
"""Steps between returns of unused host memory: it takes 20 ms then."""


def train(config: RunConfig, world: World | None = None) -> Progress:
    """Run `config` in this process, which is one rank of the run.

    Raises:
        UserError: bad input, found before the process group starts where that is possible.
    """
    world = world or detect_world()
    layout = resolve_layout(config, world.world_size)
    data = open_training_data(config)
    held_out = open_held_out_data(config, data)
    # For their refusals, before there is a process group.
    given_cost(config)
    encoder_patches(config, "cuda" if torch.cuda.is_available() else "cpu")
    window_features(config, layout)
    chat_template(config, data, None)
    device = start_distributed(world)
    failed = True
    try:
        topology = build_topology(layout, device)
        run = Run(config, topology, data, held_out)
        progress = run.run()
        failed = False
    finally:
        destroy_topology()
        stop(failed)
    if run.interrupted:
        # Saved and left in order; what started this process learns what it was.
        raise KeyboardInterrupt
    return progress


class Run:
    """One rank's run: built once, then stepped to the end."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        data: OpenData,
        held_out: dict[str, OpenData],
    ) -> None:
        self.config, self.topology = config, topology
        self.interrupted = False
        """Whether Ctrl-C has ended the run."""
        self.data, self.held_out = data, held_out
        self.decoder = choose_decoder(config.data.decoder, topology.device)
        self.run_dir = Path(config.run_dir)
        self.is_main = topology.rank == 0
        self.guard = Guard(config.guard, self.run_dir, self.is_main, self._anyone)
        self._lock = hold_run_dir(config)
        open_logs(self.run_dir, topology.rank)
        seed_step(config.training.seed, 0)
        self.objective = build_objective(config.training.objective, topology, config.model)
        model = build_model(config, topology, self.objective.predicts_ahead)
        initialize(model.sharded_state_dict(), config.model, config.training.seed)
        self.trainable = make_trainable(model, config)
        cost = settled_cost(config, model)
        self.view = rank_view(topology, share_out(config, topology.layout, cost))
        self._tokenizer = data.stream.sources[0].samples.index.tokenizer_path.read_text()
        self._stream = data_stream(config, data)
        start, self.progress = self._start()
        self._saved_at = self.progress.iteration
        template = chat_template(config, data, start)
        self.checkpointer = Checkpointer(config, self._tokenizer, template, self._stream)
        self._step_started = self._waited = 0.0
        self._device: Device = "cuda" if topology.device.type == "cuda" else "cpu"
        self._memory_model = StepMemoryModel(config, topology.layout, self._device)
        self._device_memory = device_memory(config, device_bytes(topology.device))
        self.step = TrainStep(
            config,
            topology,
            model,
            self.objective,
            chunks=list(self.trainable.chunks),
            encoder=self.trainable.encoder,
            reference=self._reference(self.objective),
            encoder_budget=encoder_budget(config, self._device),
            window_features=window_features(config, topology.layout),
        )
        self._meter = StepMeter(config, topology, self.step.clock)

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> Progress:
        """Step to `train_iters` or until asked to stop, then save.

        Args:
            on_step: called with every step's metrics, on every rank.
        """
        started_at = self.progress.iteration
        self._announce()
        with StopRequest() as request, _short_collections():
            with StepBar(started_at, self.config.training.train_iters, self.is_main) as bar:
                while (left := self._stretch(request, bar, on_step)) is None:
                    self._set_back()
                    bar.set_back(self.progress.iteration)
            # Inside, since signals come more than once: a second one must not end the save.
            if self._saved_at != self.progress.iteration:
                self._save()
            heartbeat.enter("save")
            self.checkpointer.close()
        asked, ended = left
        progress, total = self.progress, self.config.training.train_iters
        if self._lock is not None:
            self._lock.release()
        self.interrupted = request.received == signal.SIGINT
        if self.is_main:
            if ended or progress.iteration >= total:
                attempts.mark_finished(self.run_dir, progress.iteration)
            self._farewell(asked and progress.iteration < total, ended, started_at)
        return progress

    def _stretch(
        self, request: StopRequest, bar: StepBar, on_step: Callable[[dict[str, Any]], None] | None
    ) -> tuple[bool, bool] | None:
        """Step until the run ends: whether it was asked to, and whether the data have ended.

        Null where it is to be set back first.
        """
        config = self.config
        total = config.training.train_iters
        writer = MetricsWriter(self.run_dir, self.progress.iteration) if self.is_main else None
        asked = ended = False
        try:
            with self._loader() as loader:
                while self.progress.iteration < total and not asked and not ended:
                    loaded = self._next(loader)
                    if loaded is None:  # resumed where the data had ended already
                        return asked, True
                    metrics = self._one_step(loaded)
                    if metrics is None:
                        return None
                    ended = loaded.is_last
                    asked = self._anyone(request.received is not None)
                    ends = ended or self.progress.iteration == total
                    # Who sends a signal may kill soon after: what counts then is the save.
                    validated: dict[str, float] = {}
                    if (ends or self._due(config.training.eval_interval)) and not asked:
                        validated = self._validate()
                        metrics |= validated
                    if writer is not None:
                        self._report(writer, metrics, validated)
                    on_cpu = self.topology.device.type == "cpu"
                    if on_cpu and self.progress.iteration % _RELEASE_INTERVAL == 0:
                        release_unused()
                    bar.advance(metrics["step_time_s"])
                    if on_step is not None:
                        on_step(metrics)
                    self._attempt(self.checkpointer.poll)
                    due = self._due(config.checkpoint.save_interval)
                    if due and self._attempt(self._save):
                        self._saved_at = self.progress.iteration
        finally:
            if writer is not None:
                writer.close()
        return asked, ended

    def _report(
        self, writer: MetricsWriter, metrics: dict[str, Any], validated: dict[str, float]
    ) -> None:
        attempts.check_ours(self.run_dir)
        writer.write(metrics)
        training = self.config.training
        if self.progress.iteration % training.log_interval == 0:
            world = self.topology.layout.world_size
            logger.info(log_line(metrics, training.train_iters, world))
        if validated:
            logger.info(validation_line(self.progress.iteration, validated))

    def _set_back(self) -> None:
        """Go back to the newest checkpoint, to pass over the data of a spike from there on."""
        spike, before = self.progress.iteration + 1, self.progress
        self.checkpointer.wait()
        _, self.progress = self._start()
        skipped = set(before.iterations_to_skip) | set(window_around(spike, self.config.guard))
        self.progress.iterations_to_skip = sorted(skipped)
        self.progress.rollbacks = before.rollbacks + 1
        self._saved_at = self.progress.iteration
        if self.is_main:
            done = self.progress.iteration
            logger.warning("loss spike at iteration %d: back to iteration %d", spike, done)
            events.tell(self.run_dir, "rolled back", spike=spike, to=done, skips=sorted(skipped))

    def _attempt(self, save: Callable[[], None]) -> bool:
        """Save, or finish an asynchronous save; whether that went well.

        A full disk does not end a run: there may be room for the next checkpoint.
        """
        try:
            save()
        except CheckpointNotSaved as error:
            if self.is_main:
                logger.warning("%s; training goes on without it", error)
                events.tell(self.run_dir, "not saved", what=str(error))
            return False
        return True

    def _save(self) -> None:
        heartbeat.enter("save")
        started = time.perf_counter()
        if self.is_main:
            attempts.check_ours(self.run_dir)
        self.checkpointer.save(self.trainable, self.progress)
        if self.is_main:
            how = "being saved" if self.config.checkpoint.async_save else "saved"
            seconds = time.perf_counter() - started
            logger.info("iteration %d %s (%.1f s)", self.progress.iteration, how, seconds)

    def _farewell(self, stopped: bool, ended: bool, started_at: int) -> None:
        iteration = self.progress.iteration
        if ended:
            logger.info(
                "every source of data.train has had its max_epochs: the run ends at iteration %d",
                iteration,
            )
        elif stopped:
            logger.info("asked to stop: saved iteration %d and left", iteration)
        elif iteration == started_at:
            logger.info("nothing was trained: iteration %d is as it was", iteration)
        else:
            place = self.run_dir / "checkpoints"
            logger.info("done at iteration %d; checkpoints are in %s", iteration, place)

    def _next(self, loader: StepLoader) -> LoadedStep | None:
        """The next step, without what could not be read; null where the data have ended."""
        heartbeat.enter("data", self.progress.iteration + 1)
        self._step_started, waited = time.perf_counter(), loader.wait_seconds
        loaded = next(loader, None)
        self._waited = loader.wait_seconds - waited
        if loaded is None:
            return None
        if self._device_memory is not None:
            # On every rank alike, since all have the same plan.
            iteration = self.progress.iteration + 1
            self._memory_model.refuse_beyond(self._device_memory, loaded.plan, iteration)
        return agreed(loaded, self.config, self.data, self.topology)

    def _one_step(self, loaded: LoadedStep) -> dict[str, Any] | None:
        """Its metrics; null where the run is to be set back instead."""
        config, progress = self.config, self.progress
        iteration = progress.iteration + 1
        seed_step(config.training.seed, iteration)
        rate = learning_rate(config, iteration)
        passed_over = {*config.training.iterations_to_skip, *progress.iterations_to_skip}
        if iteration in passed_over:
            self.step.clock.start_step()
            self._advance(loaded, taken=False)
            return self._measured(loaded, None, math.nan, rate)
        recorded = self._due(config.training.timeline_interval, iteration)
        ahead = align_clocks(self.topology) if recorded else 0.0
        self.trainable.optimizer.zero_grad()
        result = self.step.train(loaded)
        verdict = self.guard.judge(result.losses, progress)
        if verdict == "rollback":
            return None
        if verdict == "skip":
            norm = math.nan
            self._advance(loaded, taken=False)
        else:
            with self.step.clock.span("optimizer"):
                norm = self._update(result, rate)
            self._count(loaded, result, norm)
        metrics = self._measured(loaded, result, norm, rate)
        if recorded:
            record_timeline(self.step.clock, ahead, self.topology, self.run_dir, iteration)
        return metrics

    def _measured(
        self, loaded: LoadedStep, result: StepResult | None, norm: float, rate: float
    ) -> dict[str, Any]:
        elapsed = time.perf_counter() - self._step_started
        return self._meter.of_step(self.progress, loaded, result, norm, rate, elapsed, self._waited)

    def _update(self, result: StepResult, rate: float) -> float:
        """Step the optimizer and the router bias, or neither."""
        losses_finite = all(math.isfinite(value) for value in result.losses.values())
        if not losses_finite:
            return math.nan
        norm = self.trainable.step(rate, self.config.optimizer.clip_grad)
        if math.isfinite(norm):
            update_bias(self.step.model.chunks, self._bias_rate())
        return norm

    def _bias_rate(self) -> float:
        frozen = "language" in self.config.training.freeze
        return 0.0 if frozen else self.config.model.language.moe_router_bias_update_rate

    def _count(self, loaded: LoadedStep, result: StepResult, norm: float) -> None:
        """Count a step that was taken if its numbers were finite.

        Raises:
            UserError: too many in a row were not.
        """
        progress, limit = self.progress, self.config.training.skip_non_finite_limit
        finite = math.isfinite(norm)
        self._advance(loaded, finite)
        if finite:
            progress.failures_in_a_row = 0
            newest = [*progress.recent_losses, judged_loss(result.losses)]
            progress.recent_losses = newest[-self.config.guard.spike_window :]
            return
        progress.nan_iterations += 1
        progress.failures_in_a_row += 1
        if self.is_main:
            events.tell(self.run_dir, "non-finite step", iteration=progress.iteration)
        if progress.failures_in_a_row > limit:
            raise UserError(
                f"{progress.failures_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (training.skip_non_finite_limit {limit}); lower optimizer.lr or look at "
                f"the data from row {progress.consumed_samples}"
            )

    def _advance(self, loaded: LoadedStep, taken: bool) -> None:
        progress = self.progress
        progress.iteration += 1
        progress.cursor = loaded.cursor.as_json()
        progress.consumed_samples = loaded.cursor.rows
        progress.consumed_documents += loaded.plan.documents
        progress.consumed_tokens += loaded.plan.tokens
        progress.failed_samples += loaded.plan.failed
        progress.optimizer_steps = self.trainable.steps
        progress.skipped_iterations += not taken

    def _validate(self) -> dict[str, float]:
        if not self.held_out:
            return {}
        heartbeat.enter("validate")
        return validate(self.config, self.step, self.held_out, self.decoder, self.view)

    def _loader(self) -> StepLoader:
        cursor = self.progress.cursor
        return open_loader(
            self.config,
            self.data,
            self.view,
            self.decoder,
            None if cursor is None else Cursor.from_json(cursor),
            prefetch_steps=self.config.data.prefetch_steps,
        )

    def _start(self) -> tuple[Path | None, Progress]:
        """Load what the run starts from, if anything; its place, and where it then stands."""
        while True:
            try:
                start, with_optimizer = find_start(self.config, self._stream, self._tokenizer)
                if start is None:
                    return None, Progress()
                progress = load_run(start, self.trainable, self.config, with_optimizer)
            except DamagedCheckpoint as error:
                done = fall_back(self.config, error)
                if self.is_main:
                    logger.warning("%s", done)
                    events.tell(self.run_dir, "damaged checkpoint", what=done)
                continue
            self.trainable.steps = progress.optimizer_steps
            return start, progress

    def _reference(self, objective: Objective) -> VisionLanguageModel | None:
        """The starting model, frozen: from `checkpoint.load`, else from the seed."""
        if not objective.needs_reference:
            return None
        model = build_model(self.config, self.topology)
        initialize(model.sharded_state_dict(), self.config.model, self.config.training.seed)
        if self.config.checkpoint.load is not None:
            load_model(Path(self.config.checkpoint.load), model, self.config)
        model.freeze(["vision", "adapter", "language"])
        for chunk in model.chunks:
            chunk.output = objective.output
            chunk.eval()
        return model

    def _announce(self) -> None:
        if not self.is_main:
            return
        write_atomically(self.run_dir / "config.yaml", dump_yaml(with_absolute_paths(self.config)))
        layout: Layout = self.topology.layout
        logger.info(
            "%d processes (%s), %s, run folder %s",
            layout.world_size,
            layout.describe(),
            self.config.training.precision,
            self.run_dir,
        )
        for line in left_out(self.data, self.held_out.values()):
            logger.warning("%s", line)
        done, total = self.progress.iteration, self.config.training.train_iters
        if done >= total:
            logger.info(
                "already at iteration %d of training.train_iters %d; raise it to go on", done, total
            )
        elif done:
            logger.info("resumed at iteration %d", done)

    def _due(self, interval: int | None, iteration: int | None = None) -> bool:
        now = self.progress.iteration if iteration is None else iteration
        return interval is not None and now % interval == 0

    def _anyone(self, mine: bool) -> bool:
        found = torch.tensor(mine, dtype=torch.int32, device=self.topology.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Keep what is alive now out of Python's garbage collections while it lasts.

    Modules and the model are hundreds of thousands of objects. To look through them all again and
    again was seen to take a twentieth of a CPU step, and holds up the other ranks at any moment.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
