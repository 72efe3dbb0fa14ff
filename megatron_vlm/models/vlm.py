"""The two towers of one rank: decoder chunks of its stage, and the whole encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer import TransformerConfig

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.models.language.engine_config import engine_config, parameter_dtype
from megatron_vlm.models.language.model import LanguageModel, build_language_chunks
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.topology.mesh import Topology


@dataclass
class VisionLanguageModel:
    """What one rank holds of the model; nothing here is wrapped for data parallelism."""

    engine: TransformerConfig
    chunks: list[LanguageModel]
    encoder: VisionEncoder | None
    topology: Topology

    def sharded_state_dict(self) -> dict[str, Any]:
        """Every parameter and persistent buffer by its name in checkpoints.

        Names carry no trace of the layout: `language.decoder.layers.3...` by layer number, and
        `vision.trunk...`, `vision.adapter...`. Values are ShardedTensor or ShardedTensorFactory.
        """
        state: dict[str, Any] = {}
        metadata = {"dp_cp_group": self.topology.language.dp_cp}
        for chunk in self.chunks:
            parts = chunk.sharded_state_dict(prefix="language.", metadata=metadata)
            # The key in the state names the layer by its place in the chunk; `key` by its number.
            # Objects are extra state of Transformer Engine (fp8 scaling history), not the model.
            state |= {
                entry.key: entry
                for entry in parts.values()
                if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
            }
        if self.encoder is not None:
            # The whole encoder on every rank: one copy counts as the owner.
            replica = (0, 0, self.topology.rank)
            for name, tensor in self.encoder.state_dict(keep_vars=True).items():
                key = f"vision.{name}"
                state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
        return state

    def freeze(self, parts: list[str]) -> None:
        """Stop gradients of `vision`, `adapter` or `language`."""
        if "language" in parts:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        if self.encoder is not None:
            if "vision" in parts:
                self.encoder.trunk.requires_grad_(False)
            if "adapter" in parts:
                self.encoder.adapter.requires_grad_(False)


def build_model(
    config: RunConfig, topology: Topology, predicts_ahead: bool = False
) -> VisionLanguageModel:
    """Build this rank's part on its device; weights are not filled yet.

    Args:
        config: the run.
        topology: this rank's place.
        predicts_ahead: whether multi-token prediction, if the model has it, is trained; else its
            weights are only held.
    """
    engine = engine_config(config, topology.layout)
    chunks = build_language_chunks(
        config.model.language, engine, topology.layout, topology.coordinates.pp, predicts_ahead
    )
    encoder = None
    if config.model.vision is not None:
        encoder = VisionEncoder(
            config.model.vision,
            config.model.adapter,
            config.model.language.hidden_size,
            recompute=config.recompute.vision,
        ).to(device=topology.device, dtype=parameter_dtype(config.training.precision))
    for chunk in chunks:
        chunk.to(device=topology.device)
    model = VisionLanguageModel(engine, chunks, encoder, topology)
    _mark_shards(model.sharded_state_dict())
    model.freeze(list(config.training.freeze))
    return model


def _mark_shards(state: dict[str, Any]) -> None:
    """Tell the engine which parameters are parts, not copies: else norms count only rank 0's.

    It marks them itself only where it also draws the initial weights.
    """
    for entry in state.values():
        pieces = nested_values(entry.build()) if hasattr(entry, "build") else [entry]
        piece = next(iter(pieces))
        parts = piece.axis_fragmentations[piece.prepend_axis_num :]
        # A gate-up pair counts as two fragments on one rank.
        least = 2 if hasattr(entry, "build") else 1
        if any(count > least for count in parts):
            entry.data.tensor_model_parallel = True


def has_gradients(module: torch.nn.Module) -> bool:
    """Whether any parameter of `module` is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
