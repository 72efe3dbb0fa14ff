"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one token further ahead.

Where the decoder predicts token i + 1 from what it saw up to i, this predicts token i + 2 from the
decoder's last hidden state at i and the embedding of token i + 1: both are normed, put side by
side, projected, and go through one more decoder layer and a norm of their own. Embedding and output
layer are the decoder's.

Ours rather than the engine's, which cannot be combined with packed rows in the combined 1F1B
schedule and weighs its loss by the layout. It runs where the loss is computed. It knows tokens
only: where token i + 1 is a picture's placeholder it sees the placeholder's embedding, and what it
predicts there is not counted in its loss.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_rank

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.models.language.packing import PackedRows
from megatron_vlm.models.language.replicated import ReplicatedLinear
from megatron_vlm.models.language.spec import layer_spec


class PredictionLayer(MegatronModule):
    """Norms, projection and decoder layer of one more token."""

    def __init__(
        self,
        language: LanguageConfig,
        config: Any,
        provider: BackendSpecProvider,
        pg_collection: Any,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        hidden = language.hidden_size

        def norm() -> torch.nn.Module:
            return build_module(
                provider.layer_norm(rms_norm=True),
                config=config,
                hidden_size=hidden,
                eps=language.layernorm_epsilon,
            )

        self.enorm, self.hnorm, self.final_layernorm = norm(), norm(), norm()
        self.eh_proj = ReplicatedLinear(2 * hidden, hidden, config)
        # The kind of the decoder's last layer.
        spec = layer_spec(language, provider, has_experts=bool(language.moe_layer_freq[-1]))
        # The layer adds the number of those on earlier stages: it is the one after the last.
        before = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        self.transformer_layer = build_module(
            spec,
            config=config,
            layer_number=language.num_layers + 1 - before,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.recompute_whole = config.recompute_granularity == "full"

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedded: torch.Tensor,
        rotary_pos_emb: Any,
        rows: PackedRows,
    ) -> torch.Tensor:
        """Hidden states of the further prediction.

        Args:
            hidden_states: `[tokens / cp (/ tp under sequence parallelism), 1, hidden]`, after the
                decoder's final norm.
            embedded: embeddings of each token's next one, the same shape.
            rotary_pos_emb: as the decoder's layers get it.
            rows: the micro-batch.

        Returns:
            The same shape, normed.
        """

        def run(hidden_states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
            both = torch.cat([self.enorm(embedded), self.hnorm(hidden_states)], dim=-1)
            hidden, _ = self.transformer_layer(
                self.eh_proj(both),
                attention_mask=None,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=rows,
            )
            return self.final_layernorm(hidden)

        if self.recompute_whole and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states, embedded)
        return run(hidden_states, embedded)


class MultiTokenPrediction(MegatronModule):
    """The layers that predict further ahead; DeepSeek-V3 has one."""

    def __init__(
        self,
        language: LanguageConfig,
        config: Any,
        provider: BackendSpecProvider,
        pg_collection: Any,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.layers = torch.nn.ModuleList(
            PredictionLayer(language, config, provider, pg_collection, vp_stage)
            for _ in range(language.mtp_num_layers or 0)
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Each layer's own, under its number: a list of modules has none in the engine."""
        state: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            state |= sharded_state_dict_default(
                layer, f"{prefix}layers.{number}.", sharded_offsets, metadata
            )
        return state
