"""When a failed run is started again, and when its failures are told instead."""

from __future__ import annotations

import pytest

from megatron_vlm.resilience.policy import Failure, RestartPolicy, signature

pytestmark = pytest.mark.unit


def _died(step: int, text: str = "RuntimeError: x", node: str = "n1", rank: int = 0) -> Failure:
    return Failure("rank died", step, text, (rank,), (node,))


def test_waits_longer_while_nothing_is_gained() -> None:
    policy = RestartPolicy(max_restarts=20, crash_loop=99)
    waits = [policy.decide(_died(5, f"error {n}")).wait for n in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert policy.decide(_died(6, "error")).wait == 0, "the run got further"


def test_gives_up_after_too_many() -> None:
    policy = RestartPolicy(max_restarts=2, crash_loop=99)
    found = [policy.decide(_died(5, f"error {n}")) for n in "abc"]
    assert [decision.give_up is None for decision in found] == [True, True, False]
    assert "3 failures in a row without getting beyond step 5" in str(found[2].give_up)
    assert "error c" in str(found[2].give_up)


def test_the_same_error_at_the_same_step_is_the_codes_own() -> None:
    policy = RestartPolicy(max_restarts=99, crash_loop=3)
    assert policy.decide(_died(5, node="n1")).give_up is None
    assert policy.decide(_died(5, node="n2", rank=3)).give_up is None
    why = policy.decide(_died(5, node="n1")).give_up
    assert why is not None and "3 times at step 5 (ranks 0, 3" in why and "n1, n2" in why
    assert "the code or the data" in why


def test_on_one_node_it_is_the_nodes() -> None:
    policy = RestartPolicy(max_restarts=99, crash_loop=2)
    policy.decide(_died(5))
    assert "always on n1: look at that node" in str(policy.decide(_died(5)).give_up)


@pytest.mark.parametrize(
    "between",
    [_died(6), _died(5, "another"), Failure("node lost", 5, "", (0,), ("n1",))],
)
def test_another_failure_breaks_the_chain(between: Failure) -> None:
    policy = RestartPolicy(max_restarts=99, crash_loop=2)
    for failure in (_died(5), between, _died(5)):
        assert policy.decide(failure).give_up is None


def test_what_comes_from_outside_is_no_crash_loop() -> None:
    policy = RestartPolicy(max_restarts=9, crash_loop=2)
    for _ in range(9):
        assert policy.decide(Failure("node lost", 5, "")).give_up is None
        # A rank that was killed from outside says nothing that could be the same.
    policy = RestartPolicy(max_restarts=9, crash_loop=2)
    for _ in range(9):
        assert policy.decide(_died(5, signature(["iteration 5"], -9))).give_up is None


def test_a_node_that_fails_again_is_avoided() -> None:
    policy = RestartPolicy(max_restarts=99, crash_loop=99)
    assert policy.decide(_died(1, node="n1")).avoid == ()
    assert policy.decide(_died(2, node="n2")).avoid == ()
    assert policy.decide(_died(3, node="n1")).avoid == ("n1",)


def test_signature() -> None:
    lines = ["mvlm: CudaError: at 0xbeef12, tried 20.5 MiB of 80", "  "]
    again = ["mvlm: CudaError: at 0xfeed00, tried 33.1 MiB of 80"]
    assert signature(lines, 1) == signature(again, 1) == "mvlm: CudaError: at #, tried #.# MiB of #"
    assert signature([], 7) == "status 7"
    assert signature(["whatever"], -9) == ""
    assert signature(["Bus error"], -7) == "Bus error"
