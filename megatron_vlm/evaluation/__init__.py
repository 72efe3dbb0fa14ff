"""What a checkpoint can do: answers to questions about pictures."""

from megatron_vlm.platform import install

install()
