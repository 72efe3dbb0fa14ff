"""What autograd really saves: bytes of unique storages, parameters left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from megatron_vlm.config import RunConfig
from megatron_vlm.platform import World, seed_step, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout


def saved_bytes(function: Callable[[], Any], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that calling `function` keeps for its backward pass, each storage counted once.

    Storages that the function itself has emptied by its end count nothing.
    """
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    # By the storage's identity: an address may be given to another once its tensor is freed.
    storages: dict[int, torch.UntypedStorage] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    size = sum(storage.nbytes() for storage in storages.values())
    del result
    return size


def decoder_layers(world: World, cases: list[tuple[RunConfig, list[int]]]) -> list[list[int]]:
    """Per case the saved bytes of the first chunk's layers, their input included.

    Args:
        world: this rank's place.
        cases: a configuration and the segment lengths of its micro-batch, which fill its rows.
    """
    from megatron_vlm.data.plan import MicroBatchPlan
    from megatron_vlm.engine.microbatch import build_micro_batch
    from megatron_vlm.models.initialize import initialize
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    device = start_distributed(world)
    found = []
    for config, lengths in cases:
        layout = resolve_layout(config, world.world_size)
        topology = build_topology(layout, device)
        seed_step(1, 0)
        model = build_model(config, topology)
        initialize(model.sharded_state_dict(), config.model, 1)
        plan = MicroBatchPlan(
            rows=(None,) * config.training.micro_batch_size,  # type: ignore[arg-type]
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            segment_lengths=np.array(lengths, dtype=np.int32),
            documents=np.arange(len(lengths), dtype=np.int32),
            max_seqlen=max(lengths),
            picture_spans=np.zeros((0, 2), dtype=np.int64),
            picture_columns=np.zeros(0, dtype=np.int64),
        )
        batch = build_micro_batch(plan, None, topology, balance_weight=0.01)
        tokens = sum(lengths) // layout.cp // (layout.tp if layout.sequence_parallel else 1)
        chunk = model.chunks[0]
        parameters = list(chunk.parameters())
        rotary = chunk.rotary_pos_emb(max(lengths), packed_seq=True)
        sizes = []
        for layer in chunk.decoder.layers:
            entry = torch.randn(
                tokens,
                1,
                config.model.language.hidden_size,
                dtype=parameters[0].dtype,
                device=device,
                requires_grad=True,
            )

            def run(layer: Any = layer, entry: torch.Tensor = entry) -> Any:
                return layer(
                    entry,
                    attention_mask=None,
                    rotary_pos_emb=rotary,  # noqa: B023 - called before the next case
                    packed_seq_params=batch.rows,  # noqa: B023
                )

            sizes.append(entry.nbytes + saved_bytes(run, [*parameters, entry]))
        found.append(sizes)
        destroy_topology()
    stop()
    return found
