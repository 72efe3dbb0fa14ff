"""Which decoder a run uses."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megatron_vlm.data.decoders.cpu import CpuDecoder
from megatron_vlm.data.decoders.job import PictureDecoder
from megatron_vlm.errors import ConfigError

DECODERS = ("auto", "cpu", "dali", "nvjpeg")
"""Names of decoders."""

_NEEDS = {"dali": "nvidia.dali", "nvjpeg": "torchvision"}
_REMEDY = {
    "dali": "pip install 'megatron-vlm[gpu]'",
    "nvjpeg": "install the torchvision that belongs to this torch",
}


def choose_decoder(name: str, device: torch.device, threads: int = 1) -> PictureDecoder:
    """The decoder of that name.

    Args:
        name: one of `DECODERS`. `auto` is dali on a GPU with DALI, else nvjpeg on a GPU with
            torchvision, else cpu.
        device: of the process. A `cpu` decoder leaves its patches in the processor's memory
            whatever this is.
        threads: of the processor that decode.

    Raises:
        ConfigError: there is no decoder of that name, or it cannot run here.
    """
    if name not in DECODERS:
        raise ConfigError(f"decoder {name!r}: expected one of {', '.join(DECODERS)}")
    gpu = device.type == "cuda" and torch.cuda.is_available()
    if name == "auto":
        name = next((one for one in _NEEDS if gpu and _installed(_NEEDS[one])), "cpu")
    if name == "cpu":
        return CpuDecoder(threads)
    if not gpu:
        raise ConfigError(
            f"decoder {name!r} needs a GPU, and this process runs on {device.type}; use 'auto' or "
            "'cpu'"
        )
    if not _installed(_NEEDS[name]):
        raise ConfigError(
            f"decoder {name!r} needs {_NEEDS[name]}, which is not installed; {_REMEDY[name]}, or "
            "use 'auto' or 'cpu'"
        )
    if name == "dali":
        from megatron_vlm.data.decoders.dali import DaliDecoder

        return DaliDecoder(device, threads)
    from megatron_vlm.data.decoders.nvjpeg import NvjpegDecoder

    return NvjpegDecoder(device, threads)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
