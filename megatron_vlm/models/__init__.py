"""What is computed: the encoder, the adapter, the decoder, and the two joined."""

from megatron_vlm.platform import install

install()
