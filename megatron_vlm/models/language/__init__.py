"""The decoder: dots.llm1's traits as megatron-core specs through one layer provider."""
