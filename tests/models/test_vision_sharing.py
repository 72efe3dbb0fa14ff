"""One picture over several ranks against one process that encodes the same pictures.

Features, the gradient of every parameter (summed over ranks), who talks to whom, and what happens
where ranks do not agree. That one process is right is test_vision_encoder.py's to show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.sharing import (
    KeyValueExchange,
    Part,
    SharedPictures,
    plan_sharing,
)
from megatron_vlm.platform import World, start_distributed, stop
from tests.models.test_vision_encoder import LANGUAGE, VISION, build, pack, pictures
from tests.planning.saved import saved_bytes
from tests.ranks import run_ranks

SIZES = [(112, 112), (56, 84), (168, 84), (28, 28), (84, 112)]
"""Height and width in pixels: pictures of 64, 24, 72, 4 and 48 patches."""
UNIT = 4


@dataclass(frozen=True)
class Case:
    """Who holds what. A picture that is not shared is whole on the rank that lists it."""

    local: tuple[tuple[int, ...], ...]
    """Per rank, its pictures in the order of its segments; none: a blank unit."""
    shared: dict[int, dict[int, int]]
    """Per shared picture, patches of each rank, in the order of the patches."""


CASES = {
    "equal": Case(((0,), (0,)), {0: {0: 32, 1: 32}}),
    "unequal": Case(((0,), (0,)), {0: {1: 4, 0: 60}}),
    "among_whole_ones": Case(((1, 0, 3), (4, 0)), {0: {0: 20, 1: 44}}),
    "two_in_other_orders": Case(((2, 3, 0), (0, 2, 1)), {0: {0: 24, 1: 40}, 2: {1: 8, 0: 64}}),
    "four_ranks": Case(((0,), (1, 0), (0, 4), (0,)), {0: {2: 4, 0: 28, 3: 20, 1: 12}}),
    "overlapping_sets": Case(
        ((0, 1), (4, 0, 2), (2, 0), (3, 2, 4)),
        {0: {0: 16, 1: 20, 2: 28}, 2: {3: 12, 2: 24, 1: 36}, 4: {1: 24, 3: 24}},
    ),
    "whole_and_blank": Case(((1, 4), (2,), (), (2,)), {2: {3: 40, 1: 32}}),
}
RECOMPUTE = ("none", "selective", "full")


def _parts(case: Case, rank: int, group: Any) -> SharedPictures:
    parts = []
    for segment, picture in enumerate(case.local[rank]):
        if picture in case.shared:
            ranks, patches = zip(*case.shared[picture].items(), strict=True)
            parts.append(Part(segment, picture, ranks, patches, ranks.index(rank)))
    return SharedPictures(tuple(parts), group)


def _local(case: Case, rank: int, rows: list[Tensor], per_row: int = 1) -> Tensor:
    """What this rank holds of `rows` [patches / per_row, ...] of each picture."""
    found = []
    for picture in case.local[rank]:
        patches = case.shared.get(picture, {rank: len(rows[picture]) * per_row})
        ranks = list(patches)
        first = sum(patches[other] for other in ranks[: ranks.index(rank)])
        found.append(rows[picture][first // per_row : (first + patches[rank]) // per_row])
    return torch.cat(found) if found else rows[0].new_zeros(UNIT // per_row, *rows[0].shape[1:])


def _inputs() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Patches of each picture, all grids, and a weight for every feature."""
    pixels, grid_hw = pack(pictures(SIZES))
    patches = list(pixels.split(grid_hw.prod(1).tolist()))
    draw = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(len(rows) // UNIT, LANGUAGE, generator=draw, dtype=torch.float64)
        for rows in patches
    ]
    return patches, grid_hw, weights


def _grids(case: Case, rank: int, grid_hw: Tensor) -> Tensor:
    if not case.local[rank]:
        return torch.tensor([[2, 2]])
    return grid_hw[list(case.local[rank])]


Prepare = Callable[[VisionEncoder], None]


def _everything(encoder: VisionEncoder) -> None:
    """All of it is trained."""


def _adapter_only(encoder: VisionEncoder) -> None:
    encoder.trunk.requires_grad_(False)


def _later_blocks(encoder: VisionEncoder) -> None:
    encoder.trunk.patch_embed.requires_grad_(False)
    encoder.trunk.blocks[0].requires_grad_(False)


def _values_of_the_first(encoder: VisionEncoder) -> None:
    """No input of a block needs gradients, and in the first one just what follows attention."""
    encoder.trunk.patch_embed.requires_grad_(False)
    encoder.trunk.blocks[0].requires_grad_(False)
    encoder.trunk.blocks[0].proj.requires_grad_(True)


FREEZE: dict[str, Prepare] = {
    "adapter_only": _adapter_only,
    "later_blocks": _later_blocks,
    "inside_a_block": _values_of_the_first,
}


def _gradients(encoder: VisionEncoder) -> list[Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in encoder.parameters()
        if p.requires_grad
    ]


def _one_process(case: Case, option: str, prepare: Prepare) -> tuple[list[Tensor], list[Tensor]]:
    """Features of each picture, and gradients."""
    patches, grid_hw, weights = _inputs()
    encoder = build(option=option)
    prepare(encoder)
    held = {picture for local in case.local for picture in local}
    tokens = encoder(torch.cat(patches), grid_hw).split([len(rows) for rows in weights])
    loss = sum(((tokens[picture] * weights[picture]).sum() for picture in held), torch.zeros(()))
    loss.backward()
    return [rows.detach() for rows in tokens], _gradients(encoder)


def _on_rank(world: World, case: Case, option: str, prepare: Prepare) -> dict[str, dict[str, Any]]:
    start_distributed(world)
    sharing = _parts(case, world.rank, dist.group.WORLD)
    patches, grid_hw, weights = _inputs()
    pixels = _local(case, world.rank, patches)
    grids = _grids(case, world.rank, grid_hw)
    found = {}
    for recompute in RECOMPUTE:
        encoder = build(recompute, option=option)
        prepare(encoder)
        with torch.no_grad():
            quiet = encoder(pixels, grids, sharing)
        tokens = encoder(pixels, grids, sharing)
        (tokens * _local(case, world.rank, weights, UNIT)).sum().backward()
        gradients = _gradients(encoder)
        for gradient in gradients:
            dist.all_reduce(gradient)
        found[recompute] = {"tokens": tokens.detach(), "quiet": quiet, "gradients": gradients}
    stop()
    return found


def _check(case: Case, option: str, prepare: Prepare) -> None:
    features, gradients = _one_process(case, option, prepare)
    found = run_ranks(len(case.local), _on_rank, case, option, prepare)
    for rank, recompute in itertools.product(range(len(found)), RECOMPUTE):
        result = found[rank][recompute]
        assert torch.equal(result["tokens"], result["quiet"])
        if case.local[rank]:
            expected = _local(case, rank, features, UNIT)
            torch.testing.assert_close(result["tokens"], expected, rtol=0, atol=1e-12)
        for mine, other in zip(result["gradients"], gradients, strict=True):
            largest = float(other.abs().max())
            assert largest > 0
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12 * max(largest, 1.0))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str) -> None:
    _check(CASES[name], "dots", _everything)


@pytest.mark.distributed
def test_equals_one_process_with_normalised_keys() -> None:
    _check(CASES["overlapping_sets"], "seed", _everything)


@pytest.mark.distributed
@pytest.mark.parametrize("frozen", FREEZE)
def test_equals_one_process_with_frozen_parts(frozen: str) -> None:
    _check(CASES["two_in_other_orders"], "dots", FREEZE[frozen])


def _traffic(world: World, case: Case) -> dict[str, Any]:
    """Bytes received from each rank: forward of each kind of recompute, and its backward."""
    start_distributed(world)
    sharing = _parts(case, world.rank, dist.group.WORLD)
    patches, grid_hw, _ = _inputs()
    pixels = _local(case, world.rank, patches).double()
    received: dict[int, int] = {}
    real = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            # Messages of integers are those that compare plans.
            if operation.op is dist.irecv and operation.tensor.is_floating_point():
                size = operation.tensor.nbytes
                received[operation.peer] = received.get(operation.peer, 0) + size
        return real(operations)

    dist.batch_isend_irecv = counted
    found: dict[str, Any] = {}
    for recompute in RECOMPUTE:
        encoder = build(recompute)
        tokens = encoder(pixels, _grids(case, world.rank, grid_hw), sharing)
        forward = dict(received)
        received.clear()
        tokens.sum().backward()
        found[recompute] = (forward, dict(received))
        received.clear()
    stop()
    return found


@pytest.mark.distributed
def test_only_those_that_share_talk_and_as_little_as_told() -> None:
    case = CASES["overlapping_sets"]
    per_patch = 2 * VISION.hidden_size * 8 * VISION.num_layers
    found = run_ranks(4, _traffic, case)
    # Rank 0 shares one picture with ranks 1 and 2; rank 3 is none of its business.
    keys, gradients = {1: 20, 2: 28}, {1: 16, 2: 16}
    for recompute in RECOMPUTE:
        forward, backward = found[0][recompute]
        assert forward == {peer: count * per_patch for peer, count in keys.items()}
        again = recompute != "none"
        assert backward == {
            peer: (gradients[peer] + again * keys[peer]) * per_patch for peer in gradients
        }
        # What others hold of two pictures.
        assert found[1][recompute][0] == {
            0: 16 * per_patch,
            2: (28 + 24) * per_patch,
            3: (12 + 24) * per_patch,
        }


def _saved(world: World) -> dict[str, int]:
    """Bytes that the forward pass of a picture over two ranks keeps, besides parameters."""
    start_distributed(world)
    case = CASES["equal"]
    sharing = _parts(case, world.rank, dist.group.WORLD)
    patches, grid_hw, _ = _inputs()
    pixels, grids = _local(case, world.rank, patches), _grids(case, world.rank, grid_hw)
    found = {}
    for recompute in RECOMPUTE:
        encoder = build(recompute)

        def forward(encoder: VisionEncoder = encoder) -> Tensor:
            return encoder(pixels, grids, sharing)

        found[recompute] = saved_bytes(forward, encoder.parameters())
        dist.barrier()
    stop()
    return found


@pytest.mark.distributed
def test_recompute_keeps_no_gathered_keys() -> None:
    """Of the other rank's keys and values nothing is kept, unless nothing is computed again."""
    found = run_ranks(2, _saved)[0]
    patches, _, _ = _inputs()
    half = patches[0][:32].clone()

    for recompute in ("selective", "full"):
        encoder = build(recompute)
        alone = saved_bytes(
            lambda encoder=encoder: encoder(half, torch.tensor([[4, 8]])), encoder.parameters()
        )
        assert found[recompute] == alone
    assert found["none"] > found["selective"] > found["full"]


def _half(world: World, dtype: torch.dtype) -> list[Tensor]:
    start_distributed(world)
    case = CASES["overlapping_sets"]
    sharing = _parts(case, world.rank, dist.group.WORLD)
    patches, grid_hw, weights = _inputs()
    pixels, grids = _local(case, world.rank, patches), _grids(case, world.rank, grid_hw)
    runs = []
    for _ in range(2):
        encoder = build("selective", dtype)
        tokens = encoder(pixels.to(dtype), grids, sharing)
        weight = _local(case, world.rank, weights, UNIT)
        (tokens.double() * weight).sum().backward()
        runs.append([tokens.detach(), *_gradients(encoder)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second), "the same bits every time"
    for gradient in runs[0][1:]:
        dist.all_reduce(gradient)
    stop()
    return runs[0]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    case = CASES["overlapping_sets"]
    features, gradients = _one_process(case, "dots", _everything)
    tolerance = 6e-2 if dtype is torch.bfloat16 else 1e-5
    for rank, (tokens, *found) in enumerate(run_ranks(4, _half, dtype)):
        assert tokens.dtype == dtype
        pairs = [(tokens, _local(case, rank, features, UNIT)), *zip(found, gradients, strict=True)]
        for mine, other in pairs:
            largest = float(other.abs().max())
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance * largest)


def _sums(world: World) -> Tensor:
    """Rank 0's gradients, of which the ranks hold 256, 1, 1 and 1."""
    start_distributed(world)
    part = Part(0, 0, (0, 1, 2, 3), (4, 4, 4, 4), world.rank)
    sharing = SharedPictures((part,), dist.group.WORLD)
    exchange = KeyValueExchange(sharing, torch.tensor([[4, 4]]), UNIT)
    value = 256.0 if world.rank == 0 else 1.0
    home = exchange.bring_home(torch.full((16, 2, 1, 4), value, dtype=torch.bfloat16))
    stop()
    return home


@pytest.mark.distributed
def test_half_precision_is_rounded_once() -> None:
    # In bfloat16 256 + 1 is 256 again; 259 rounds to 260.
    for home in run_ranks(4, _sums):
        assert torch.equal(home, torch.full((4, 2, 1, 4), 260.0, dtype=torch.bfloat16))


def _refused(world: World, what: str) -> str:
    start_distributed(world)
    patches, mine = (32, 32), world.rank
    grid_hw, frozen = torch.tensor([[8, 8]]), False
    picture = 7
    if mine == 1:
        patches = (28, 36) if what == "patches" else patches
        grid_hw = torch.tensor([[4, 16]]) if what == "grid" else grid_hw
        frozen = what == "frozen"
        picture = 8 if what == "picture" else picture
    encoder = build("full" if what == "recompute" and mine else "none")
    encoder.trunk.requires_grad_(not frozen)
    part = Part(0, picture, (0, 1), patches, mine)
    pixels = torch.zeros(patches[mine], 588, dtype=torch.float64)
    with torch.set_grad_enabled(not (what == "no_grad" and mine)), pytest.raises(RuntimeError) as e:
        encoder(pixels, grid_hw, SharedPictures((part,), dist.group.WORLD))
    dist.barrier()
    stop()
    return str(e.value)


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["patches", "grid", "picture", "frozen", "no_grad", "recompute"])
def test_ranks_that_disagree_are_told_so(what: str) -> None:
    """Instead of a wait without end."""
    for rank, message in enumerate(run_ranks(2, _refused, what)):
        assert f"ranks {rank} and {1 - rank} disagree about the pictures they share" in message
        assert "1 of 64 patches with gradients on rank 0" in message
        flow = "without" if what in ("frozen", "no_grad") else "with"
        assert f"1 of 64 patches {flow} gradients on rank 1" in message


def _pixels_missing(world: World) -> None:
    start_distributed(world)
    part = Part(0, 0, (0, 1), (32, 32), world.rank)
    sharing = SharedPictures((part,), dist.group.WORLD)
    pixels, grid_hw = torch.zeros(64, 588, dtype=torch.float64), torch.tensor([[8, 8]])
    with pytest.raises(ValueError, match=r"holds 64 patches.* adds up to 32 on this rank"):
        build()(pixels, grid_hw, sharing)
    beyond = Part(0, 0, (world.rank, 2), (32, 32), 0)
    with pytest.raises(ValueError, match="the group has ranks 0 to 1"):
        build()(pixels[:32], grid_hw, SharedPictures((beyond,), dist.group.WORLD))
    stop()


@pytest.mark.distributed
def test_pixels_and_ranks_that_do_not_fit_are_refused() -> None:
    run_ranks(2, _pixels_missing)


@pytest.mark.unit
def test_the_plan_of_a_rank() -> None:
    parts = [Part(3, 2, (1, 5), (8, 4), 1), Part(1, 9, (5, 1, 3), (4, 8, 12), 0)]
    plan = plan_sharing(parts, [20, 24, 4, 12], UNIT, rank=5)
    assert plan.lengths == (20, 4, 4, 4)
    assert plan.key_lengths == (20, 24, 4, 12)
    # The first picture and the part behind it; a picture; the end of the last one.
    assert plan.runs == ((0, 24), (44, 4), (56, 4))
    second, first = plan.held
    assert (second.start, second.local, second.patches, second.place) == (56, 28, 4, 1)
    assert [(s.peer, s.start, s.patches, s.tag) for s in second.others] == [(1, 48, 8, 0)]
    assert (first.start, first.local, first.patches, first.place) == (20, 20, 4, 0)
    assert [(s.peer, s.start, s.patches, s.tag) for s in first.others] == [
        (1, 24, 8, 1),
        (3, 32, 12, 0),
    ]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(2, 0, (0, 1), (4, 4), 0)], "there are 2 local segments"),
        ([(0, 0, (0, 1), (4, 8), 0)], "add up to 12, but the picture has 8"),
        ([(0, 0, (0, 1), (6, 2), 0)], "expected positive multiples of 4 patches"),
        ([(0, 0, (0, 1), (8, 0), 0)], "expected positive multiples of 4 patches"),
        ([(0, 0, (0, 1), (4, 4), 1)], "place 1 is that of another rank; this one is 0"),
        ([(0, 0, (0, 1), (4, 4), 2)], "place must be from 0 to 1"),
        ([(0, 0, (0, 0), (4, 4), 0)], "expected each rank once"),
        ([(0, 0, (0,), (8,), 0)], "at least two of them"),
        ([(0, 0, (0, 1), (8,), 0)], "expected patches for each of the ranks"),
        ([(0, 0, (0, 1), (4, 4), 0), (0, 1, (0, 1), (4, 4), 0)], "segment 0 is also Part"),
        ([(0, 3, (0, 1), (4, 4), 0), (1, 3, (0, 1), (4, 4), 0)], r"pictures \[3, 3\]: a rank"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sharing([Part(*part) for part in parts], [8, 8], UNIT, rank=0)
