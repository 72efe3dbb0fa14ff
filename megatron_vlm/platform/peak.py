"""The device's matrix throughput, which model FLOP utilisation is a share of."""

from __future__ import annotations

import time

import torch

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name.
_DATA_SHEET = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
_SIZE, _SECONDS = 768, 0.1


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the data sheet for known GPUs in bf16; else what square products reach here.

    On a CPU the measured rate is that of the threads this process may use.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, value in _DATA_SHEET.items():
            if part in name:
                return value
    left = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    right = torch.ones_like(left)
    torch.mm(left, right)
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _SECONDS:
        torch.mm(left, right)
        torch.cuda.synchronize()
        count += 1
    return 2.0 * _SIZE**3 * count / passed / 1e12
