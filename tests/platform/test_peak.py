"""The device's matrix throughput: the data sheet's where it is known, else measured."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_vlm.platform.peak import peak_tflops

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0)]
)
def test_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), torch.bfloat16) == tflops


def test_measured_elsewhere() -> None:
    """Above what one product alone reached just now, and below what no CPU core reaches."""
    size = 512
    left = torch.ones(size, size, dtype=torch.float64)
    torch.mm(left, left)
    start = time.perf_counter()
    torch.mm(left, left)
    once = 2 * size**3 / (time.perf_counter() - start) / 1e12
    measured = peak_tflops(torch.device("cpu"), torch.float64)
    # Wide: other processes share the cores.
    assert once / 10 < measured < 10
