"""The step: encode, exchange, pipeline, and the gradients' way back.

    plan --> every rank encodes its pictures --> all-to-all --> decoder pipeline, losses
                     ^                                                |
                     +---- all-to-all of the features' gradients <----+

Losses are divided by their denominators where they are computed, so every gradient of both towers
is a plain sum over ranks, whatever the layout; nothing is rescaled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.engine.clock import EngineTimers, StepClock, TimedSchedulePlan
from megatron_vlm.engine.delivery import FeatureDelivery, post_in
from megatron_vlm.engine.encode import Budget, EncoderRun, plan_chunks
from megatron_vlm.engine.exchange import cut_windows, plan_exchange
from megatron_vlm.engine.microbatch import MicroBatch, build_micro_batch
from megatron_vlm.engine.objective import Objective
from megatron_vlm.engine.routers import collect_router_statistics, reset_router_statistics
from megatron_vlm.engine.segments import local_segments
from megatron_vlm.models.language.model import LanguageModel
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.topology.mesh import Topology

if TYPE_CHECKING:
    from megatron_vlm.data.loader import LoadedStep
    from megatron_vlm.data.plan import StepPlan


@dataclass
class StepResult:
    """Numbers of one step, the same on every rank."""

    losses: dict[str, float]
    load_balancing_loss: float | None = None
    expert_imbalance: float | None = None


class TrainStep:
    """Runs forward and backward passes of a wrapped model over planned batches.

    `chunks` and `encoder` are the modules to call: data-parallel wrappers when training, the bare
    ones when only evaluating.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        model: VisionLanguageModel,
        objective: Objective,
        chunks: list[torch.nn.Module] | None = None,
        encoder: torch.nn.Module | None = None,
        reference: VisionLanguageModel | None = None,
        encoder_budget: Callable[[StepPlan], Budget] | None = None,
        window_features: int | None = None,
    ) -> None:
        """Takes over the model's outputs and its end of a step.

        Args:
            config: the run.
            topology: this rank's place.
            model: the bare modules.
            objective: what is trained.
            chunks: the decoder's modules to call; null: the bare ones.
            encoder: the encoder's; null: the bare one.
            reference: a model whose outputs the objective asks for.
            encoder_budget: memory for the encoder's activations in a step; null: any amount.
            window_features: that a rank may receive of a window; null: any number.
        """
        self.config, self.topology, self.model = config, topology, model
        self.objective, self.reference = objective, reference
        self.chunks: list[torch.nn.Module] = chunks if chunks is not None else list(model.chunks)
        self.encoder = encoder if encoder is not None else model.encoder
        for chunk in model.chunks:
            chunk.output = objective.output
        model.engine.finalize_model_grads_func = self._finalize
        self.clock = StepClock(topology.device)
        self._timers = model.engine.timers = EngineTimers(self.clock)
        self._denominators: dict[str, float] = {}
        self._data: LoadedStep | None = None
        self._delivery: FeatureDelivery | None = None
        self._encoder_budget, self._window_features = encoder_budget, window_features
        limits = encoder_budget, window_features, config.vision_parallel.exchange_window
        self._bounded = any(limit is not None for limit in limits)

    def train(self, data: LoadedStep) -> StepResult:
        """Forward and backward of one step; gradients are reduced and ready for the optimizer."""
        self._data = data
        self.clock.start_step()
        self._zero_gradients()
        self._set_mode(training=True)
        reset_router_statistics(self.model.chunks)
        micro_batches = self._micro_batches(data)
        encoded = self._encode(data, self.encoder, grad=True)
        self.objective.before_step(self, micro_batches)
        self._denominators = self._reduce_counts(micro_batches)
        sums = self._pipeline(self.chunks, micro_batches, self._objective_loss, forward_only=False)
        if encoded is not None and _is_trained(self.model.encoder):
            assert self._delivery is not None
            gradient = self._delivery.gradients()
            with self.clock.span("encode_backward"):
                encoded.backward(gradient, reduce_early=not self._bounded)
            with self.clock.span("reduce"):
                self.encoder.finish_grad_sync()  # type: ignore[union-attr, operator]
        self._delivery = None
        losses = self._reduce_losses(sums)
        balance, imbalance = collect_router_statistics(
            self.model.chunks, self.topology, self.config, self.objective.predicts_ahead
        )
        return StepResult(losses, balance, imbalance)

    @torch.no_grad()
    def evaluate(self, data: LoadedStep) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and denominators of each loss over one batch, without gradients."""
        self._data = data
        self.clock.start_step()
        self._set_mode(training=False)
        micro_batches = self._micro_batches(data)
        self._encode(data, self.encoder, grad=False)
        self.objective.before_step(self, micro_batches)
        counts = self._reduce_counts(micro_batches)
        self._denominators = dict.fromkeys(counts, 1.0)
        sums = self._pipeline(self.chunks, micro_batches, self._objective_loss, forward_only=True)
        self._delivery = None
        self._set_mode(training=True)
        return self._reduce_losses(sums), counts

    @torch.no_grad()
    def forward_only(
        self,
        model: VisionLanguageModel,
        micro_batches: list[MicroBatch],
        collect: Callable[[torch.Tensor, MicroBatch], Any],
    ) -> list[Any]:
        """One more forward of `model` (the trained one or a reference) over the micro-batches.

        A reference sees the pictures through its own encoder, in so far as the trained one differs.

        Returns:
            What `collect` made of each micro-batch's output, on the loss stage; elsewhere empty.
        """
        loss_free = _collecting(collect)
        with self._features_of(model):
            results = self._pipeline(
                list(model.chunks), micro_batches, loss_free, forward_only=True
            )
        return [result["collected"] for result in results]

    @contextmanager
    def _features_of(self, model: VisionLanguageModel) -> Iterator[None]:
        """While it lasts, the micro-batches get features of `model`'s encoder."""
        if model is self.model or not _is_trained(self.model.encoder):
            yield
            return
        assert self._data is not None
        kept = self._delivery
        self._encode(self._data, model.encoder, grad=False)
        try:
            yield
        finally:
            self._delivery = kept

    def _set_mode(self, training: bool) -> None:
        for module in (*self.chunks, *([self.encoder] if self.encoder is not None else [])):
            module.train(training)

    def _zero_gradients(self) -> None:
        for module in (*self.chunks, self.encoder):
            if isinstance(module, DistributedDataParallel):
                module.zero_grad_buffer()

    def _micro_batches(self, data: LoadedStep) -> list[MicroBatch]:
        plans = data.plan.micro_batches[self.topology.coordinates.dp]
        rows = sum(len(plan.rows) for plan in plans) * self.topology.layout.dp
        weight = self.config.model.language.moe_aux_loss_coeff / rows
        return [
            build_micro_batch(
                plan,
                text,
                self.topology,
                weight,
                predict_ahead=self.objective.predicts_ahead,
                multimodal=self.config.model.language.mrope_section is not None,
            )
            for plan, text in zip(plans, data.texts, strict=True)
        ]

    def _encode(
        self, data: LoadedStep, encoder: torch.nn.Module | None, grad: bool
    ) -> EncoderRun | None:
        """Encode this rank's pictures; their features are ready to go to the micro-batches."""
        if encoder is None:
            self._delivery = None
            return None
        topology, layout = self.topology, self.topology.layout
        hidden = self.config.model.language.hidden_size
        dtype = next(encoder.parameters()).dtype
        windows = cut_windows(
            data.plan, layout, self.config.vision_parallel.exchange_window, self._window_features
        )
        budget = self._encoder_budget(data.plan) if self._encoder_budget is not None else None
        with self.clock.span("encode"):
            pictures = data.pictures.to(topology.device, dtype)
            run = EncoderRun(
                encoder,
                local_segments(data.plan, pictures, topology.rank, topology.vision.dp),
                plan_chunks(data.plan, topology.rank, windows[0], budget),
                hidden,
            )
            trained = grad and _is_trained(self.model.encoder)
            self._delivery = FeatureDelivery(
                plan_exchange(data.plan, layout, topology.rank, windows),
                layout,
                topology.rank,
                run.features,
                post_in(topology.features_out),
                post_in(topology.features_back) if trained else None,
                self.clock,
            )
            run.forward(grad, first_window=partial(self._delivery.leave, 1))
        self._delivery.leave(2)
        return run

    def _reduce_counts(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        names = list(self.objective.loss_weights)
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.topology.device)
        if self.topology.reports_loss:
            for batch in micro_batches:
                counts = self.objective.counts(batch)
                totals += torch.stack([counts[name].to(totals) for name in names])
        dist.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))

    def _reduce_losses(self, results: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        names = list(self.objective.loss_weights)
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.topology.device)
        if self.topology.reports_loss:
            for result in results:
                totals += torch.stack([result[name].to(totals) for name in names])
        dist.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))

    def _objective_loss(
        self, batch: MicroBatch, output: Output, *further: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total: torch.Tensor | None = None
        reported = {}
        outputs = _parts(output, *further)
        for name, value in self.objective.losses(outputs[0], batch, *outputs[1:]).items():
            # A step in which nothing counts has nothing to average.
            scaled = value / (self._denominators[name] or 1.0)
            reported[name] = scaled.detach()
            weighted = scaled * self.objective.loss_weights[name]
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, torch.zeros((), dtype=torch.int), reported

    def _pipeline(
        self,
        chunks: list[torch.nn.Module],
        micro_batches: list[MicroBatch],
        loss: Callable[..., Any],
        forward_only: bool,
    ) -> list[Any]:
        layout = self.topology.layout
        interleaved = layout.vpp is not None
        iterators = [iter(micro_batches) for _ in chunks]
        if self._delivery is not None:
            iterators[0] = self._delivery.micro_batches(micro_batches, backward=not forward_only)
        with self._schedule_of(chunks[0], forward_only):
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, loss, self.clock),
                data_iterator=iterators if interleaved else iterators[0],
                model=chunks if interleaved else chunks[0],
                num_microbatches=len(micro_batches),
                # A micro-batch is one packed sequence to the engine, however many rows it has.
                seq_length=self.config.training.seq_length * self.config.training.micro_batch_size,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        if self._delivery is not None:
            self._delivery.finish()
        return results

    @contextmanager
    def _schedule_of(self, chunk: torch.nn.Module, forward_only: bool) -> Iterator[None]:
        # Forward alone, the combined schedule still counts one more micro-batch of warm-up.
        engine = get_model_config(chunk)
        overlap = engine.overlap_moe_expert_parallel_comm
        engine.overlap_moe_expert_parallel_comm = overlap and not forward_only
        self._timers.combined = engine.overlap_moe_expert_parallel_comm
        try:
            with self.clock.pipeline(forward_only):
                yield
        finally:
            engine.overlap_moe_expert_parallel_comm = overlap

    def _finalize(self, chunks: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        with self.clock.span("reduce"):
            # No token count: losses are already averages.
            finalize_model_grads(chunks, None, **kwargs)
            self._add_copied_gradients()

    def _add_copied_gradients(self) -> None:
        for chunk in self.model.chunks:
            weight = chunk.copied_embedding
            if weight is not None and weight.requires_grad:
                # Two stages hold it, each with the gradients of its own use.
                gradient: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
                dist.all_reduce(gradient, group=self.topology.language.embd)


Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""What the last stage returns: one tensor, or the logits of the next token and of the one after."""


def _parts(output: Output, *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output's parts; the combined schedule hands them over one by one."""
    return (*output, *further) if isinstance(output, tuple) else (output, *further)


def _is_trained(encoder: VisionEncoder | None) -> bool:
    """Whether any of it is; known alike on every rank."""
    return encoder is not None and any(p.requires_grad for p in encoder.parameters())


def _forward_step(
    loss: Callable[..., Any],
    clock: StepClock,
    data_iterator: Iterator[MicroBatch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Callable[[torch.Tensor], Any]]:
    batch = next(data_iterator)
    chunk: LanguageModel = get_attr_wrapped_model(model, "embed", return_model_obj=True)
    decoder_input = None
    if chunk.pre_process:
        assert batch.tokens is not None
        decoder_input = chunk.embed(batch.tokens, batch.features, batch.feature_rows)
    inputs = {
        "input_ids": batch.tokens,
        "position_ids": None,
        "attention_mask": None,
        "decoder_input": decoder_input,
        "packed_seq_params": batch.rows,
    }
    if return_schedule_plan:
        return TimedSchedulePlan.of(chunk.build_schedule_plan(**inputs), clock), partial(
            loss, batch
        )
    return model(**inputs), partial(loss, batch)


def _collecting(collect: Callable[[torch.Tensor, MicroBatch], Any]) -> Callable[..., Any]:
    def loss(batch: MicroBatch, output: Output, *further: torch.Tensor) -> Any:
        first = _parts(output, *further)[0]
        zero = torch.zeros((), device=first.device)
        return zero, torch.zeros((), dtype=torch.int), {"collected": collect(first, batch)}

    return loss
