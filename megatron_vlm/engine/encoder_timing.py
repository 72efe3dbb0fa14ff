"""What encoding pictures takes here: a few timed passes of the encoder, and the cost they fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.models.vision.encoder import VisionEncoder

_BATCH_PATCHES = 4096
"""Patches of a timed pass of small pictures: enough that starting kernels is a small part."""
_MOST_PATCHES = 16_384
"""Largest picture that is timed; the fit is a parabola, which larger ones follow."""
_ROUNDS = 3
_SENT_BYTES = 16 * 2**20


def measure_cost(encoder: VisionEncoder, largest: int) -> EncoderCost:
    """Seconds of forward and backward, by picture, by patch, and by pair of patches.

    Args:
        encoder: on its device, in its precision; gradients that it holds are left alone.
        largest: patches of the largest picture that the model takes.
    """
    unit = encoder.trunk.config.spatial_merge_size
    shapes = timed_shapes(min(largest, _MOST_PATCHES), unit)
    seconds = [_timed(encoder, [side] * count) for side, count in shapes]
    counts = np.array([count for _, count in shapes], np.float64)
    patches = np.array([side * side for side, _ in shapes], np.float64)
    return fit_cost(counts, patches, np.array(seconds))


def timed_shapes(largest: int, unit: int) -> list[tuple[int, int]]:
    """(side in patches, pictures) of each timed pass, the largest picture alone."""
    found = []
    side = 2 * unit
    while side * side < largest:
        found.append((side, max(1, _BATCH_PATCHES // (side * side))))
        side *= 2
    last = max(int(largest**0.5) // unit, 1) * unit
    return [*found, (last, 1)]


def fit_cost(
    counts: NDArray[np.float64], patches: NDArray[np.float64], seconds: NDArray[np.float64]
) -> EncoderCost:
    """The cost without negative terms that fits best, relative to each measurement.

    Args:
        counts: [measurements] equal pictures in each.
        patches: [measurements] of one of them.
        seconds: [measurements].
    """
    terms = counts[:, None] * np.stack([np.ones_like(patches), patches, patches**2], axis=1)
    scaled = terms / seconds[:, None]
    best, least = np.zeros(3), np.inf
    # Three terms: all subsets are tried, which is what non-negative least squares comes down to.
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.square(scaled[:, chosen] @ found - 1).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(3), error
                best[list(chosen)] = found
    return EncoderCost(*best.tolist())


def seconds_per_byte(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that a byte takes to a neighbouring rank, both ways at once; collective.

    0 where there is one rank, or this one has no neighbour.
    """
    rank = dist.get_rank(group)
    peer = rank ^ 1
    if peer >= dist.get_world_size(group):
        return 0.0
    sent = torch.zeros(_SENT_BYTES, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    found = []
    for _ in range(_ROUNDS + 1):
        _wait(device)
        began = time.perf_counter()
        operations = [
            dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
            dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        _wait(device)
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:])) / _SENT_BYTES


def _timed(encoder: VisionEncoder, sides: Sequence[int]) -> float:
    """Median seconds of a forward and, where anything is trained, a backward pass."""
    parameter = next(encoder.parameters())
    config = encoder.trunk.config
    grids = torch.tensor([(side, side) for side in sides], device=parameter.device)
    width = config.in_channels * config.patch_size**2
    pixels = torch.zeros(int(grids.prod(dim=1).sum()), width).to(parameter)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    found = []
    for _ in range(_ROUNDS + 1):
        _wait(parameter.device)
        began = time.perf_counter()
        with torch.set_grad_enabled(bool(trained)):
            out = encoder(pixels, grids)
            if trained:
                # Not `backward`, which would add to the gradients that the wrapper reduces.
                torch.autograd.grad(out.sum(), trained, allow_unused=True)
        _wait(parameter.device)
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
