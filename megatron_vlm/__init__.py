"""megatron-vlm: train vision-language mixture-of-experts models, from a laptop to a cluster."""

__version__ = "0.1.0"
