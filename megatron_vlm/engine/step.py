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
from megatron_vlm.engine.exchange import FeatureExchange, plan_exchange
from megatron_vlm.engine.microbatch import MicroBatch, build_micro_batch
from megatron_vlm.engine.objective import Objective
from megatron_vlm.engine.routers import collect_router_statistics, reset_router_statistics
from megatron_vlm.engine.segments import LocalSegments, local_segments
from megatron_vlm.models.language.model import LanguageModel
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.topology.mesh import Topology

if TYPE_CHECKING:
    from megatron_vlm.data.loader import LoadedStep


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
    ) -> None:
        self.config, self.topology, self.model = config, topology, model
        self.objective, self.reference = objective, reference
        self.chunks: list[torch.nn.Module] = chunks if chunks is not None else list(model.chunks)
        self.encoder = encoder if encoder is not None else model.encoder
        for chunk in model.chunks:
            chunk.output = objective.output
        model.engine.finalize_model_grads_func = self._finalize
        self._denominators: dict[str, float] = {}
        self._data: LoadedStep | None = None

    def train(self, data: LoadedStep) -> StepResult:
        """Forward and backward of one step; gradients are reduced and ready for the optimizer."""
        self._data = data
        self._zero_gradients()
        self._set_mode(training=True)
        reset_router_statistics(self.model.chunks)
        micro_batches = self._micro_batches(data)
        encoded, exchange = self._encode(data, micro_batches, self.encoder, grad=True)
        self.objective.before_step(self, micro_batches)
        self._denominators = self._reduce_counts(micro_batches)
        sums = self._pipeline(self.chunks, micro_batches, self._objective_loss, forward_only=False)
        self._backward_encoder(encoded, exchange)
        losses = self._reduce_losses(sums)
        balance, imbalance = collect_router_statistics(
            self.model.chunks, self.topology, self.config, self.objective.predicts_ahead
        )
        return StepResult(losses, balance, imbalance)

    @torch.no_grad()
    def evaluate(self, data: LoadedStep) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and denominators of each loss over one batch, without gradients."""
        self._data = data
        self._set_mode(training=False)
        micro_batches = self._micro_batches(data)
        self._encode(data, micro_batches, self.encoder, grad=False)
        self.objective.before_step(self, micro_batches)
        counts = self._reduce_counts(micro_batches)
        self._denominators = dict.fromkeys(counts, 1.0)
        sums = self._pipeline(self.chunks, micro_batches, self._objective_loss, forward_only=True)
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
        with self._features_of(model, micro_batches):
            results = self._pipeline(
                list(model.chunks), micro_batches, loss_free, forward_only=True
            )
        return [result["collected"] for result in results]

    @contextmanager
    def _features_of(
        self, model: VisionLanguageModel, micro_batches: list[MicroBatch]
    ) -> Iterator[None]:
        """While it lasts, the micro-batches hold features of `model`'s encoder."""
        if model is self.model or not _is_trained(self.model.encoder):
            yield
            return
        assert self._data is not None
        kept = [batch.features for batch in micro_batches]
        self._encode(self._data, micro_batches, model.encoder, grad=False)
        try:
            yield
        finally:
            for batch, features in zip(micro_batches, kept, strict=True):
                batch.features = features

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
        self,
        data: LoadedStep,
        micro_batches: list[MicroBatch],
        encoder: torch.nn.Module | None,
        grad: bool,
    ) -> tuple[torch.Tensor | None, FeatureExchange | None]:
        """Encode this rank's pictures and hand the features to the micro-batches."""
        if encoder is None:
            return None, None
        topology = self.topology
        inner: VisionEncoder = get_attr_wrapped_model(encoder, "trunk", return_model_obj=True)
        dtype = next(inner.parameters()).dtype
        plan = plan_exchange(data.plan, topology.layout, topology.rank)
        with torch.set_grad_enabled(grad):
            segments = local_segments(
                data.plan,
                data.pictures.to(topology.device, dtype),
                topology.rank,
                topology.vision.dp,
            )
            encoded = _run_encoder(encoder, inner, segments)
        hidden = self.config.model.language.hidden_size
        exchange = FeatureExchange(
            plan, topology.layout, topology.rank, hidden, dtype, topology.device
        )
        features = exchange.forward(encoded.detach()[: plan.encoded_tokens])
        for batch, leaf, rows in zip(micro_batches, features, plan.feature_rows, strict=True):
            batch.features = leaf
            batch.feature_rows = torch.from_numpy(rows).to(topology.device)
        return encoded, exchange

    def _backward_encoder(
        self, encoded: torch.Tensor | None, exchange: FeatureExchange | None
    ) -> None:
        if encoded is None or exchange is None or not _is_trained(self.model.encoder):
            return
        gradient = exchange.backward()
        full = encoded.new_zeros(encoded.shape)
        full[: gradient.size(0)] = gradient
        encoded.backward(full)
        self.encoder.finish_grad_sync()  # type: ignore[union-attr, operator]

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
        with _schedule_of(chunks[0], forward_only):
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, loss),
                data_iterator=iterators if interleaved else iterators[0],
                model=chunks if interleaved else chunks[0],
                num_microbatches=len(micro_batches),
                # A micro-batch is one packed sequence to the engine, however many rows it has.
                seq_length=self.config.training.seq_length * self.config.training.micro_batch_size,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _finalize(self, chunks: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        # No token count: losses are already averages.
        finalize_model_grads(chunks, None, **kwargs)
        for chunk in self.model.chunks:
            weight = chunk.copied_embedding
            if weight is not None and weight.requires_grad:
                # Two stages hold it, each with the gradients of its own use.
                gradient: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
                dist.all_reduce(gradient, group=self.topology.language.embd)


@contextmanager
def _schedule_of(chunk: torch.nn.Module, forward_only: bool) -> Iterator[None]:
    # Forward alone, the combined schedule still counts one more micro-batch of warm-up.
    engine = get_model_config(chunk)
    overlap = engine.overlap_moe_expert_parallel_comm
    engine.overlap_moe_expert_parallel_comm = overlap and not forward_only
    try:
        yield
    finally:
        engine.overlap_moe_expert_parallel_comm = overlap


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
    output = chunk.build_schedule_plan(**inputs) if return_schedule_plan else model(**inputs)
    return output, partial(loss, batch)


def _collecting(collect: Callable[[torch.Tensor, MicroBatch], Any]) -> Callable[..., Any]:
    def loss(batch: MicroBatch, output: Output, *further: torch.Tensor) -> Any:
        first = _parts(output, *further)[0]
        zero = torch.zeros((), device=first.device)
        return zero, torch.zeros((), dtype=torch.int), {"collected": collect(first, batch)}

    return loss


def _run_encoder(
    encoder: torch.nn.Module,
    inner: VisionEncoder,
    segments: LocalSegments,
) -> torch.Tensor:
    """Features `[tokens, hidden]`; a rank without pictures encodes one blank unit.

    Its gradient is zero, but it keeps the encoder's gradient and parameter collectives matched.
    """
    pixels, grid_hw = segments.pixel_values, segments.grid_hw
    if grid_hw.size(0) == 0:
        merge = inner.trunk.config.spatial_merge_size
        channels = inner.trunk.config.in_channels * inner.trunk.config.patch_size**2
        pixels = pixels.new_zeros(merge * merge, channels)
        grid_hw = grid_hw.new_full((1, 2), merge)
    return encoder(pixels, grid_hw, segments.shared)
