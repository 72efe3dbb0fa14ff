"""The device's matrix throughput, which model FLOP utilisation is a share of."""

from __future__ import annotations

import time

import torch

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name; the first that fits.
_DATA_SHEET = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H800 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
}
_ROUNDS = 8
_SECONDS = 0.02
"""Of one round. The best counts: others may compete for the machine while a run starts."""


def peak_tflops(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> float:
    """TFLOP/s of the data sheet for known GPUs in bf16; else what square products reach here.

    On a CPU the measured rate is that of the threads this process may use. In fp8 the data sheets
    name twice the rate of bf16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, value in _DATA_SHEET.items():
            if part in name:
                return 2 * value if fp8 else value
    # On a GPU large products, many to a wait: else the wait is what is measured.
    size, together = (4096, 16) if device.type == "cuda" else (768, 1)
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones_like(left)
    torch.mm(left, right)
    _finish(device)
    best = 0.0
    for _ in range(_ROUNDS):
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < _SECONDS:
            for _ in range(together):
                torch.mm(left, right)
            _finish(device)
            count += together
        best = max(best, count / passed)
    return 2.0 * size**3 * best / 1e12


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
