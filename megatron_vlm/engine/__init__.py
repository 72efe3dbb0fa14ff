"""One training step: encode, exchange, pipeline, losses."""

from megatron_vlm.platform import install

install()
