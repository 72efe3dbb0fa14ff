"""The linear loop, the optimizer and its schedule, stages, metrics."""

from megatron_vlm.platform import install

install()
