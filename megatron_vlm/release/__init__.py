"""Weights to and from Hugging Face: planned whole, streamed, written all or not at all."""
