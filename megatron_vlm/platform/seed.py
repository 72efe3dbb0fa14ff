"""Random state as a function of (seed, iteration), so that a resume needs none of it saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int, iteration: int) -> None:
    """Seed Python, numpy, torch on every device and the engine's tracker for one step.

    Every step starts from a state that depends on (seed, iteration) alone, so a run that was
    interrupted, or goes on in another layout, draws what an undisturbed one would have drawn.
    The engine's tracker adds the rank's place for what must differ between ranks.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    state = np.random.SeedSequence([seed, iteration]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) & 0xFFFFFFFF)
    torch.manual_seed(int(state[0]))
    # The engine adds up to a few hundred thousand for the rank: stay inside 63 bits.
    model_parallel_cuda_manual_seed(int(state[0]))
