"""Where restored optimizer state lies: beside what steps it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("fused", [True, False])
def test_restored_step_count_lies_where_the_step_looks(fused: bool) -> None:
    """On a GPU torch's fused AdamW refuses a count in host memory; `meta` stands for one here."""
    from megatron_vlm.checkpoint.optimizer_state import _prepare

    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    adam = torch.optim.AdamW([weight])
    adam.param_groups[0]["fused"] = fused
    _prepare(SimpleNamespace(optimizer=adam, config=None, init_state_fn=lambda *_: None), step=7)
    assert adam.state[weight]["step"].device.type == ("meta" if fused else "cpu")


def test_gathered_pieces_own_their_memory() -> None:
    """The engine copies views of larger tensors once more before it writes them."""
    from megatron_vlm.checkpoint import optimizer_state

    weights = [torch.zeros(3), torch.zeros(2, 2)]
    owned = {
        id(weight): (slice(0, weight.numel()), {"exp_avg": torch.full((weight.numel(),), value)})
        for weight, value in zip(weights, (1.0, 2.0), strict=True)
    }
    reduced = []
    saved = optimizer_state.dist.all_reduce
    optimizer_state.dist.all_reduce = lambda tensor, group: reduced.append(tensor)
    try:
        written = {id(weight) for weight in weights}
        pieces = optimizer_state._gather(weights, "exp_avg", owned, False, None, written)
        (first, _) = optimizer_state._gather(weights, "exp_avg", owned, False, None, set())
    finally:
        optimizer_state.dist.all_reduce = saved
    assert [tensor.numel() for tensor in reduced] == [7, 7]
    assert first.device.type == "meta", "another rank writes it"
    assert pieces[0].tolist() == [1.0] * 3 and pieces[1].tolist() == [[2.0, 2.0]] * 2
    for piece in pieces:
        assert piece.untyped_storage().nbytes() == piece.nbytes
