"""What the ranks of a step agree on before they compute: which samples could be read.

A sample may fail on the one rank that decodes its picture, or that reads its text. Every rank has
to leave it out alike: the loss and its denominator, the experts' load, and the counters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vlm.data.loader import LoadedStep
from megatron_vlm.errors import TaskFailed


def agree_on_failures(
    loaded: LoadedStep, device: torch.device, pad_id: int, max_failed_share: float
) -> LoadedStep:
    """The step without the samples that any rank could not read; collective over all ranks.

    Args:
        loaded: this rank's part of the step.
        device: of this rank.
        pad_id: what takes the place of their tokens.
        max_failed_share: most of a step's samples that may fail.

    Raises:
        TaskFailed: more failed; on every rank.
    """
    found = torch.zeros(len(loaded.plan.document_tokens), dtype=torch.uint8)
    found[[failure.document for failure in loaded.failures]] = 1
    found = found.to(device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    failed = found.cpu().numpy().astype(bool)
    count = int(failed.sum())
    if not count:
        return loaded
    if count > max_failed_share * len(failed):
        # Every rank says the same, since only one of them may be heard; the reasons are logged by
        # the rank that met them.
        raise TaskFailed(
            f"{count} of a step's {len(failed)} samples cannot be read, more than "
            f"data.max_failed_share {max_failed_share:g}; the ranks' logs name them: restore the "
            "data and start again, which goes on from the last checkpoint"
        )
    return loaded.without(failed, pad_id)
