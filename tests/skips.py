"""The habits every test is held to: it belongs to a set, and CI skips nothing silently.

Imported by conftest.py, whose hooks these are.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

SETS = ("unit", "distributed", "gpu", "cluster")
"""Each test bears at least one of these markers; `slow` comes on top."""

ALLOWED_REASONS = (
    "needs a GPU",
    "needs Transformer Engine",
    "needs Apex",
    "needs DALI",
    "needs MPI",
)
"""Beginnings of the reasons for which a test may be skipped in CI: what `make setup` cannot
install. Any other skip there is a failure, since a test that never runs proves nothing."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all runs but `-m gpu`: ranks of the other tests talk through gloo."""
    if not (config.option.markexpr or "").startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that belongs to no set: no selection by marker would ever name it."""
    lost = [item.nodeid for item in items if not any(map(item.get_closest_marker, SETS))]
    if lost:
        raise pytest.UsageError(
            f"mark these tests as one of {', '.join(SETS)} "
            f"(`pytestmark = pytest.mark.unit` for a file): {', '.join(lost)}"
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and to be asked for: pytest -m gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, turn the skip of a test into a failure."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI, turn the skip of a whole file into a failure."""
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    # An expected failure is reported as a skip, but it ran.
    if not (in_ci and report.skipped) or hasattr(report, "wasxfail"):
        return
    longrepr = report.longrepr
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_REASONS):
        report.outcome = "failed"
        report.longrepr = (
            f"skipped in CI: {reason!r}. Make it run, or add what it needs to ALLOWED_REASONS in "
            "tests/skips.py."
        )
