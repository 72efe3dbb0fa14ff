"""Hugging Face's side of a model: names, shapes and config.json, without torch or a model built.

One file a family (`dots1.py`, `deepseek_v3.py`, ...): a table of names, read in both directions,
and its config.json in both directions.
"""
