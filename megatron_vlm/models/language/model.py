"""One chunk of the decoder: the engine's GPT model with picture features in its input."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.models.language.mtp import MultiTokenPrediction
from megatron_vlm.models.language.packing import PackedRows
from megatron_vlm.models.language.provider import choose_provider
from megatron_vlm.models.language.rotary import inverse_frequencies, multimodal_angles
from megatron_vlm.models.language.spec import decoder_spec
from megatron_vlm.topology.layout import Layout


class LanguageModel(GPTModel):
    """Layers of one pipeline stage (or one virtual chunk of it).

    `output` says what the last stage returns for the objective to work on: `logits`
    `[1, tokens, vocab / tp]`, or `hidden` states `[1, tokens, hidden]` after the final norm. A
    model that predicts further ahead returns a pair of logits where the micro-batch carries
    `next_tokens`: the second is of the token after the next.
    """

    output: Literal["logits", "hidden"] = "logits"

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        layers: range,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        predicts_ahead: bool,
    ) -> None:
        """Build layers `layers` (numbers from 0); weights are not filled.

        Args:
            language: the decoder.
            config: the same as the engine knows it.
            layers: those of this chunk.
            pre_process: whether it embeds tokens.
            post_process: whether it ends in the output layer.
            vp_stage: its number among this rank's chunks; null if there is one alone.
            predicts_ahead: whether multi-token prediction is trained.
        """
        provider = choose_provider(config.params_dtype)
        super().__init__(
            config=config,
            transformer_layer_spec=decoder_spec(language, provider, layers),
            vocab_size=language.vocab_size,
            max_sequence_length=language.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=language.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=language.rotary_base,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb.inv_freq = inverse_frequencies(
            language, self.rotary_pos_emb.inv_freq.device
        )
        self.language = language
        self.multi_token: MultiTokenPrediction | None = None
        if language.mtp_num_layers is not None:
            self._add_prediction(language, config, provider, predicts_ahead)

    def _add_prediction(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        provider: BackendSpecProvider,
        trained: bool,
    ) -> None:
        alone = self.pre_process and self.post_process
        if self.post_process:
            self.multi_token = MultiTokenPrediction(
                language,
                config,
                provider,
                self.pg_collection,
                self.vp_stage,
            ).requires_grad_(trained)
            if trained and not alone:
                self.embedding = LanguageModelEmbedding(
                    config=config,
                    vocab_size=self.vocab_size,
                    max_sequence_length=self.max_sequence_length,
                    position_embedding_type="rope",
                    tp_group=self.pg_collection.tp,
                )
                # A copy: left out of norms.
                self.embedding.word_embeddings.weight.shared = True
        if trained and not alone and (self.pre_process or self.post_process):
            # The distributed optimizer then keeps it in a bucket of its own, so that the ranks of
            # both stages own the same parts of it.
            self.embedding.word_embeddings.weight.shared_embedding = True

    @property
    def copied_embedding(self) -> torch.nn.Parameter | None:
        """The embedding, if another stage holds it too: gradients of both are to be added up."""
        if getattr(self, "embedding", None) is None or self.share_embeddings_and_output_weights:
            return None
        weight = self.embedding.word_embeddings.weight
        return weight if getattr(weight, "shared_embedding", False) else None

    def embed(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor | None,
        feature_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """The decoder's input: token embeddings, with picture features in their places.

        Args:
            tokens: `[1, tokens / cp]` ids of this context-parallel rank.
            features: `[pictures' tokens here, hidden]`, those that fall into this rank's part.
            feature_rows: `[pictures' tokens here]` their rows in the result.

        Returns:
            `[tokens / cp (/ tp under sequence parallelism), 1, hidden]`, always requiring a
            gradient: the combined 1F1B schedule cannot run a stage without one.
        """
        embedded = self.embedding(input_ids=tokens, position_ids=None)
        if features is not None and feature_rows is not None and feature_rows.numel():
            zeros = torch.zeros_like(feature_rows)
            embedded = embedded.index_put((feature_rows, zeros), features.to(embedded.dtype))
        if torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_()
        return embedded

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The engine's, with the further prediction under `mtp.` and a copied embedding marked."""
        own, known = f"{prefix}multi_token.", f"{prefix}mtp."
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in [name for name in state if name.startswith(own)]:
            entry = state.pop(name)
            entry.key = known + entry.key.removeprefix(own)
            state[known + name.removeprefix(own)] = entry
        if not self.pre_process and self.copied_embedding is not None:
            entry = state[f"{prefix}embedding.word_embeddings.weight"]
            entry.replica_id = (1, *entry.replica_id[1:])
        return state

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = super()._preprocess(*args, **kwargs)
        rows = kwargs.get("packed_seq_params")
        if not isinstance(rows, PackedRows) or rows.rotary_positions is None:
            return found
        # An angle for every token of the micro-batch. The engine knows a table of that length to
        # be one, and cuts it for context parallelism as it cuts the segments.
        angles = multimodal_angles(
            self.language, rows.rotary_positions, self.rotary_pos_emb.inv_freq
        )
        return found[0], angles, *found[2:]

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.get("packed_seq_params")
        if self.post_process and self.output == "hidden":
            if self.config.sequence_parallel:
                # Every tensor rank computes the same loss, so the gradient is split, not summed.
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            return hidden_states.transpose(0, 1).contiguous()
        logits = super()._postprocess(hidden_states, *args, **kwargs)
        if self.multi_token is None or not isinstance(rows, PackedRows) or rows.next_tokens is None:
            return logits
        embedded = self.embedding(input_ids=rows.next_tokens, position_ids=None)
        (layer,) = self.multi_token.layers
        ahead = layer(hidden_states, embedded, kwargs["rotary_pos_emb"], rows)
        return logits, super()._postprocess(ahead, *args, **kwargs)


def build_language_chunks(
    language: LanguageConfig,
    config: TransformerConfig,
    layout: Layout,
    pp_rank: int,
    predicts_ahead: bool,
) -> list[LanguageModel]:
    """The chunks of pipeline rank `pp_rank`, in the engine's order; weights not yet filled."""
    chunks = []
    for chunk in range(layout.num_chunks):
        stage = layout.stages[chunk * layout.pp + pp_rank]
        chunks.append(
            LanguageModel(
                language,
                config,
                layout.layers_of(pp_rank, chunk),
                pre_process="E" in stage,
                post_process="L" in stage,
                vp_stage=chunk if layout.vpp is not None else None,
                predicts_ahead=predicts_ahead,
            )
        )
    return chunks
