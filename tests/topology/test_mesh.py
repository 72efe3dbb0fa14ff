"""The two meshes on real groups: the language model's, and the encoder's over every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.platform import World, start_distributed, stop
from tests.ranks import run_ranks
from tests.topology.words import resolved


def _members(group: dist.ProcessGroup) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))


def _look(world: World, text: str) -> dict[str, Any]:
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    layout = resolved(text, world.world_size)
    topology = build_topology(layout, start_distributed(world))
    language, vision = topology.language, topology.vision
    # A group is more than its list: ranks must meet in it.
    met = {}
    for name in ("dp", "tp"):
        value = torch.full((1,), 2.0**world.rank)
        dist.all_reduce(value, group=getattr(vision, name))
        met[name] = value.item()
    found = {
        "place": topology.coordinates,
        "roles": (topology.embeds_tokens, topology.computes_loss, topology.reports_loss),
        "language": {name: _members(getattr(language, name)) for name in ("tp", "cp", "dp", "pp")},
        "expert": {name: _members(getattr(language, name)) for name in ("ep", "expt_tp")},
        "vision_dp": _members(vision.dp),
        "vision_alone": [
            _members(getattr(vision, name))
            for name in ("tp", "pp", "cp", "ep", "mp", "tp_ep_pp", "expt_tp", "expt_dp")
        ],
        "vision_all": [_members(getattr(vision, name)) for name in ("dp_cp", "intra_dp_cp")],
        "met": met,
    }
    destroy_topology()
    # Another layout can follow in the same process.
    again = build_topology(resolved("", world.world_size), topology.device)
    found["again"] = _members(again.language.dp)
    destroy_topology()
    stop()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("text", ["tp=2 pp=2", "cp=2 ep=2", "tp=2 ep=2 etp=2"])
def test_groups(text: str) -> None:
    size = 4
    layout = resolved(text, size)
    everyone = list(range(size))
    for rank, found in enumerate(run_ranks(size, _look, text)):
        place = layout.coordinates(rank)
        assert found["place"] == place
        last, first = place.pp == layout.pp - 1, place.pp == 0
        assert found["roles"] == (first, last, last and place.tp == 0)
        for name in ("tp", "cp", "dp", "pp"):
            # Ranks that differ from this one in that coordinate alone.
            expected = [
                other
                for other in everyone
                if all(
                    getattr(layout.coordinates(other), axis) == getattr(place, axis)
                    for axis in ("tp", "cp", "dp", "pp")
                    if axis != name
                )
            ]
            assert found["language"][name] == expected
        assert len(found["expert"]["ep"]) == layout.ep
        assert len(found["expert"]["expt_tp"]) == layout.etp
        assert found["vision_dp"] == everyone and found["vision_all"] == [everyone, everyone]
        assert all(members == [rank] for members in found["vision_alone"])
        assert found["met"] == {"dp": 15.0, "tp": 2.0**rank}
        assert found["again"] == everyone
