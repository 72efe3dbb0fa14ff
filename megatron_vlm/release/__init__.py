"""Checkpoints to and from Hugging Face folders, and releases of a run."""
