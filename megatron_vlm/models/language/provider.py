"""One choice, made at start: layers from Transformer Engine where it can run, else plain torch."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from megatron_vlm.models.language.attention import PackedCoreAttention
from megatron_vlm.models.language.experts import GroupedExperts
from megatron_vlm.models.language.norm import Norm


class TorchProvider(LocalSpecProvider):
    """The engine's own parallel linears with our norm, attention and experts: CPU and GPU."""

    name = "torch"

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """RMS norm that knows sequence parallelism."""
        return Norm

    def core_attention(self) -> type:
        """Packed attention with context parallelism."""
        return PackedCoreAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, None]:
        """Grouped experts."""
        return GroupedExperts, None


@functools.lru_cache(maxsize=1)
def transformer_engine_usable() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_serves(dtype: torch.dtype) -> bool:
    """Whether layers of this dtype come from it: its packed attention knows bf16 alone."""
    return transformer_engine_usable() and dtype == torch.bfloat16


def choose_provider(dtype: torch.dtype) -> BackendSpecProvider:
    """Transformer Engine's layers where they can run, else torch's."""
    if not transformer_engine_serves(dtype):
        return TorchProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TransformerEngineProvider(TESpecProvider):
        """Transformer Engine's layers; experts stay ours, so checkpoints are alike."""

        name = "transformer_engine"

        def grouped_mlp_modules(self, *_: Any, **__: Any) -> tuple[type, None]:
            """Grouped experts."""
            return GroupedExperts, None

    return TransformerEngineProvider()
