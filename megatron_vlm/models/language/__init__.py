"""The decoder: dots.llm1's traits as megatron-core specs through one layer provider."""

from megatron_vlm.platform import install

install()
