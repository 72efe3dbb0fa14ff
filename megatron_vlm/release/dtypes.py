"""What weights become when they are imported or exported: the choices, by name, without torch."""

from __future__ import annotations

CHOICES = ("keep", "bfloat16", "float32")
"""What `--dtype` takes; `keep` leaves each weight in its own."""

MAIN_WEIGHTS = "optimizer.fp32_param."
"""Where names of the optimizer's float32 weights begin, which `float32` takes if there are any."""
