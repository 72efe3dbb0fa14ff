"""Sharded save and load, sync and async; atomic, verified, kept or removed by rule."""

from megatron_vlm.platform import install

install()
