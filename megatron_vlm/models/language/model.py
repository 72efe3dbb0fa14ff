"""One chunk of the decoder: the engine's GPT model with picture features in its input."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_vlm.config.schema import LanguageConfig
from megatron_vlm.models.language.provider import choose_provider
from megatron_vlm.models.language.spec import decoder_spec
from megatron_vlm.topology.layout import Layout


class LanguageModel(GPTModel):
    """Layers of one pipeline stage (or one virtual chunk of it).

    `output` says what the last stage returns for the objective to work on: `logits`
    `[1, tokens, vocab / tp]`, or `hidden` states `[1, tokens, hidden]` after the final norm.
    """

    output: Literal["logits", "hidden"] = "logits"

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

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.post_process and self.output == "hidden":
            if self.config.sequence_parallel:
                # Every tensor rank computes the same loss, so the gradient is split, not summed.
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
                )
            return hidden_states.transpose(0, 1).contiguous()
        return super()._postprocess(hidden_states, *args, **kwargs)


def build_language_chunks(
    language: LanguageConfig, config: TransformerConfig, layout: Layout, pp_rank: int
) -> list[LanguageModel]:
    """The chunks of pipeline rank `pp_rank`, in the engine's order; weights not yet filled."""
    provider = choose_provider(config.params_dtype)
    chunks = []
    for chunk in range(layout.num_chunks):
        stage = layout.stages[chunk * layout.pp + pp_rank]
        chunks.append(
            LanguageModel(
                config=config,
                transformer_layer_spec=decoder_spec(
                    language, provider, layout.layers_of(pp_rank, chunk)
                ),
                vocab_size=language.vocab_size,
                max_sequence_length=language.max_position_embeddings,
                pre_process="E" in stage,
                post_process="L" in stage,
                parallel_output=True,
                share_embeddings_and_output_weights=language.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=language.rotary_base,
                vp_stage=chunk if layout.vpp is not None else None,
            )
        )
    return chunks
