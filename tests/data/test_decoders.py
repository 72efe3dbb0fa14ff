"""Every decoder against Pillow: all formats and sizes, bad pictures among good ones, choosing."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from megatron_vlm.data import pictures
from megatron_vlm.data.decoders import CpuDecoder, PatchJob, PictureDecoder, choose_decoder
from megatron_vlm.data.decoders import choose as choose_module
from megatron_vlm.data.decoders import device as device_module
from megatron_vlm.data.decoders.device import DeviceDecoder
from megatron_vlm.data.pictures import decode_picture, patches
from megatron_vlm.errors import ConfigError, DataError
from tests.data.photographs import NAMES, by_pillow, job_of, levels, photograph
from tests.data.samples import VISION, encoded, picture

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
TOLERANCE = 2 + 1e-3
"""Levels; the rest is rounding in float32."""


class Backend:
    """A decoder of batches like a GPU's: one bad picture and none is decoded."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.refused: set[bytes] = set()

    def __call__(self, encoded: Sequence[bytes]) -> list[torch.Tensor]:
        self.batches.append(len(encoded))
        try:
            if self.refused.intersection(encoded):
                raise ValueError("refused")
            return [torch.from_numpy(simplejpeg.decode_jpeg(one, "RGB")) for one in encoded]
        except ValueError as error:
            raise RuntimeError(f"batch failed: {error}") from error


def torchvision_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision.io, which does not install beside a torch of the processor."""

    def decode(data: list[torch.Tensor], mode: str, device: torch.device) -> list[torch.Tensor]:
        assert mode == "RGB" and all(one.dtype == torch.uint8 and one.ndim == 1 for one in data)
        found = Backend()([one.numpy().tobytes() for one in data])
        return [pixels.permute(2, 0, 1).contiguous().to(device) for pixels in found]

    io = ModuleType("torchvision.io")
    io.decode_jpeg = decode  # type: ignore[attr-defined]
    io.ImageReadMode = type("ImageReadMode", (), {"RGB": "RGB"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", io)


def has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


GPU = (
    pytest.param("dali_gpu", marks=pytest.mark.gpu),
    pytest.param("nvjpeg_gpu", marks=pytest.mark.gpu),
)


@pytest.fixture(params=["cpu", "cpu_threads", "device", "nvjpeg", "dali", *GPU])
def decoder(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PictureDecoder]:
    found: PictureDecoder
    kind = request.param
    if kind.startswith("dali") and not has_dali():
        pytest.skip("needs DALI")
    if kind == "cpu":
        found = CpuDecoder()
    elif kind == "cpu_threads":
        found = CpuDecoder(threads=3)
    elif kind == "device":
        found = DeviceDecoder(Backend(), CPU)
    elif kind == "nvjpeg":
        torchvision_like(monkeypatch)
        from megatron_vlm.data.decoders.nvjpeg import NvjpegDecoder

        found = NvjpegDecoder(CPU)
    elif kind == "dali":
        from megatron_vlm.data.decoders.dali import DaliDecoder

        found = DaliDecoder(CPU, decode_device="cpu")
    else:
        found = choose_decoder(kind.removesuffix("_gpu"), torch.device("cuda"))
    yield found
    found.close()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def see_through(image: Image.Image) -> Image.Image:
    clear = image.convert("RGBA")
    clear.putalpha(picture(image.height, image.width, 5).convert("L"))
    return clear


def deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 201)


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=90),
    "jpeg_full_chroma": lambda image: encoded(image, "JPEG", subsampling=0),
    "jpeg_progressive": lambda image: encoded(image, "JPEG", progressive=True),
    "jpeg_gray": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg_cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "jpeg_rgb": lambda image: encoded(image, "JPEG", keep_rgb=True),
    "mpo": lambda image: encoded(image, "MPO", save_all=True, append_images=[picture(8, 8)]),
    "png": encoded,
    "png_palette": lambda image: encoded(image.convert("P")),
    "png_clear_palette": lambda image: encoded(image.convert("P"), transparency=3),
    "png_alpha": lambda image: encoded(see_through(image)),
    "png_gray_alpha": lambda image: encoded(see_through(image).convert("LA")),
    "png_gray": lambda image: encoded(image.convert("L")),
    "png_deep_gray": lambda image: encoded(deep(image)),
    "png_bits": lambda image: encoded(image.convert("1")),
    "png_turned": lambda image: encoded(image, exif=turned(8)),
    "webp": lambda image: encoded(image, "WEBP"),
    "webp_turned": lambda image: encoded(image, "WEBP", exif=turned(3)),
    "gif": lambda image: encoded(image, "GIF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "tiff": lambda image: encoded(image, "TIFF"),
    "tiff_cmyk": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "ppm": lambda image: encoded(image, "PPM"),
    "jpeg2000": lambda image: encoded(image, "JPEG2000"),
    "avif": lambda image: encoded(image, "AVIF"),
    **{
        f"jpeg_turned_{n}": lambda image, n=n: encoded(image, "JPEG", exif=turned(n))
        for n in range(2, 9)
    },
}

SIZES = [(31, 80), (190, 131), (28, 56), (400, 50), (9, 300), (112, 112)]


def upright(encoded: bytes) -> tuple[int, int]:
    height, width, _ = decode_picture(encoded).shape
    return height, width


def check(result: torch.Tensor | DataError, job: PatchJob, name: str = "") -> None:
    assert isinstance(result, torch.Tensor), f"{name}: {result}"
    assert result.dtype == torch.float32
    assert result.shape == (job.grid_h * job.grid_w, 588)
    expected = by_pillow(job, Image.open(BytesIO(job.encoded)))
    difference = np.abs(levels(result.cpu().numpy(), job.grid_h, job.grid_w) - expected)
    assert difference.max() <= TOLERANCE, name
    assert difference.mean() < 0.1, name


def test_every_kind_of_picture_in_one_batch_of_sizes(decoder: PictureDecoder) -> None:
    cases = [(kind, size) for size in SIZES for kind in KINDS]
    files = [KINDS[kind](picture(*size)) for kind, size in cases]
    jobs = [job_of(file, *upright(file)) for file in files]
    assert len({(job.grid_h, job.grid_w) for job in jobs}) > len(SIZES)
    for result, job, case in zip(decoder.decode(jobs, VISION), jobs, cases, strict=True):
        check(result, job, f"{case}")


def test_photographs(decoder: PictureDecoder) -> None:
    files = [photograph(name) for name in NAMES]
    jobs = [job_of(file, *upright(file)) for file in files]
    for result, job, name in zip(decoder.decode(jobs, VISION), jobs, NAMES, strict=True):
        check(result, job, name)


def bad_jobs() -> list[tuple[PatchJob, str]]:
    jpeg, png = encoded(picture(40, 60), "JPEG"), encoded(picture(40, 60))
    header = jpeg[: jpeg.index(b"\xff\xda") + 12]
    bomb = bytearray(jpeg)
    place = bomb.index(b"\xff\xc0")
    bomb[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    return [
        (PatchJob(b"", 40, 60, 2, 4), "cannot be decoded"),
        (PatchJob(b"text", 40, 60, 2, 4), "no known format"),
        (PatchJob(header, 40, 60, 2, 4), "cannot be decoded"),
        (PatchJob(jpeg[: len(jpeg) // 2], 40, 60, 2, 4), "cannot be decoded"),
        (PatchJob(png[: len(png) // 2], 40, 60, 2, 4), "cannot be decoded"),
        (PatchJob(jpeg, 60, 40, 2, 4), "40x60 pixels .*index says 60x40"),
        (PatchJob(png, 41, 60, 2, 4), "40x60 pixels .*index says 41x60"),
        (PatchJob(bytes(bomb), 65535, 65535, 2, 4), "more than 80000000 pixels"),
    ]


def test_bad_pictures_leave_their_neighbours_alone(decoder: PictureDecoder) -> None:
    for bad, reason in bad_jobs():
        among_good_ones(decoder, bad, reason)


def among_good_ones(decoder: PictureDecoder, bad: PatchJob, reason: str) -> None:
    files = [KINDS["jpeg"](picture(50, 70, seed)) for seed in range(4)]
    files[3] = KINDS["png"](picture(50, 70, 3))
    good = [job_of(file, 50, 70) for file in files]
    jobs = [bad, good[0], bad, good[1], good[2], good[3], bad]
    out = torch.full((sum(job.grid_h * job.grid_w for job in jobs), 588), torch.nan)
    out = out.to(decoder.device)
    results = decoder.decode(jobs, VISION, out)
    for place in (0, 2, 6):
        error = results[place]
        assert isinstance(error, DataError)
        with pytest.raises(DataError, match=reason):
            raise error
    start = 0
    for job, result in zip(jobs, results, strict=True):
        size = job.grid_h * job.grid_w
        if job is not bad:
            check(result, job)
            assert isinstance(result, torch.Tensor)
            assert result.data_ptr() == out[start:].data_ptr()
        start += size


def test_no_jobs(decoder: PictureDecoder) -> None:
    assert decoder.decode([], VISION) == []
    assert decoder.decode([], VISION, torch.empty(0, 588, device=decoder.device)) == []


def test_generation_sees_the_same_pixels(decoder: PictureDecoder) -> None:
    file = photograph("flower")
    job = job_of(file, *upright(file))
    (result,) = decoder.decode([job], VISION)
    assert isinstance(result, torch.Tensor)
    generated = patches(decode_picture(file), job.grid_h, job.grid_w, VISION)
    if isinstance(decoder, CpuDecoder):
        np.testing.assert_array_equal(result.numpy(), generated)
    else:
        np.testing.assert_allclose(result.cpu().numpy(), generated, atol=TOLERANCE / 255 / 0.26)


def test_one_bad_picture_is_found_by_halving(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    files = [KINDS["jpeg"](picture(40, 40, seed)) for seed in range(8)]
    backend.refused = {files[5]}  # which is sound
    jobs = [job_of(file, 40, 40) for file in files]
    with caplog.at_level(logging.WARNING):
        results = DeviceDecoder(backend, CPU).decode(jobs, VISION)
    for result, job in zip(results, jobs, strict=True):
        check(result, job)
    assert backend.batches == [8, 4, 4, 2, 1, 1, 2]
    assert "was decoded by the processor" in caplog.text


def test_the_device_is_waited_for_before_its_backend_is_called_again() -> None:
    """A backend may overwrite the pixels that it gave last, which the device may still read."""
    events: list[str] = []
    files = [KINDS["jpeg"](picture(40, 40, seed)) for seed in range(5)]

    class Recording(DeviceDecoder):
        def _wait(self) -> None:
            events.append("wait")

    def backend(encoded: Sequence[bytes]) -> list[torch.Tensor]:
        events.append("call")
        if files[2] in encoded:
            raise RuntimeError("refused")
        events.append("pixels")
        return [torch.from_numpy(simplejpeg.decode_jpeg(one, "RGB")) for one in encoded]

    Recording(backend, CPU).decode([job_of(file, 40, 40) for file in files], VISION)
    after = [events[place + 1] for place, event in enumerate(events) if event == "pixels"]
    assert after == ["wait", "wait"]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    files = [KINDS["jpeg"](picture(40, 40, seed)) for seed in range(5)]
    jobs = [job_of(file, 40, 40) for file in files]
    monkeypatch.setattr(device_module, "MAX_BATCH", 3)
    DeviceDecoder(backend, CPU).decode(jobs, VISION)
    monkeypatch.setattr(device_module, "MAX_PICTURE_PIXELS", 3300)
    DeviceDecoder(backend, CPU).decode(jobs, VISION)
    assert backend.batches == [3, 2, 2, 2, 1]


def test_what_does_not_go_to_the_device() -> None:
    backend = Backend()
    kinds = ("png", "jpeg_cmyk", "webp", "gif")
    files = [KINDS[kind](picture(40, 40)) for kind in kinds]
    jobs = [job_of(file, 40, 40) for file in files]
    reduced = KINDS["jpeg"](picture(300, 40))
    jobs.append(PatchJob(reduced, 300, 40, 2, 2))
    for result, job in zip(DeviceDecoder(backend, CPU).decode(jobs, VISION), jobs, strict=True):
        check(result, job)
    assert backend.batches == []


def test_pixels_of_another_size_are_not_used() -> None:
    def backend(encoded: Sequence[bytes]) -> list[torch.Tensor]:
        return [torch.zeros(40, 50, 3, dtype=torch.uint8) for _ in encoded]

    file = KINDS["jpeg_turned_6"](picture(40, 50))
    job = job_of(file, 50, 40)
    (right,) = DeviceDecoder(backend, CPU).decode([job], VISION)
    assert isinstance(right, torch.Tensor) and right.unique().numel() == 3
    file = KINDS["jpeg_turned_6"](picture(50, 40))
    job = job_of(file, 40, 50)
    (result,) = DeviceDecoder(backend, CPU).decode([job], VISION)
    check(result, job)


def test_want_of_device_memory_is_not_the_picture_s_fault() -> None:
    def backend(encoded: Sequence[bytes]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("none left")

    job = job_of(KINDS["jpeg"](picture(40, 50)), 40, 50)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceDecoder(backend, CPU).decode([job], VISION)


def test_threads_share_the_bound_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.data.decoders import cpu

    monkeypatch.setattr(pictures, "MAX_PICTURE_PIXELS", 2500)
    decode, lock = cpu.decode_jpeg, threading.Lock()
    inside = most = 0

    def counted(*args: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.03)
        with lock:
            inside -= 1
        return decode(*args)

    monkeypatch.setattr(cpu, "decode_jpeg", counted)
    file = KINDS["jpeg"](picture(30, 40))
    jobs = [job_of(file, 30, 40)] * 8
    decoder = CpuDecoder(threads=6)
    for result in decoder.decode(jobs, VISION):
        check(result, jobs[0])
    decoder.close()
    assert most == 2


def test_want_of_memory_is_not_the_picture_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.data.decoders import cpu

    def fail(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(cpu, "decode_jpeg", fail)
    job = job_of(KINDS["jpeg"](picture(30, 40)), 30, 40)
    with pytest.raises(MemoryError):
        CpuDecoder().decode([job], VISION)


@pytest.mark.parametrize(
    ("installed", "gpu", "expected"),
    [
        ({"nvidia.dali", "torchvision"}, True, "DaliDecoder"),
        ({"torchvision"}, True, "NvjpegDecoder"),
        (set(), True, "CpuDecoder"),
        ({"nvidia.dali", "torchvision"}, False, "CpuDecoder"),
    ],
)
def test_auto(
    installed: set[str], gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in (("dali", "DaliDecoder"), ("nvjpeg", "NvjpegDecoder")):
        stand_in = type(kind, (), {"__init__": lambda self, device, threads: None})
        module = ModuleType(name)
        setattr(module, kind, stand_in)
        monkeypatch.setitem(sys.modules, f"megatron_vlm.data.decoders.{name}", module)
    monkeypatch.setattr(choose_module, "_installed", installed.__contains__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    device = torch.device("cuda" if gpu else "cpu")
    assert type(choose_decoder("auto", device)).__name__ == expected
    assert type(choose_decoder("cpu", device)) is CpuDecoder
    for name, package in (("dali", "nvidia.dali"), ("nvjpeg", "torchvision")):
        if gpu and package in installed:
            assert type(choose_decoder(name, device)).__name__.lower() == f"{name}decoder"
        else:
            words = f"decoder '{name}' needs {'a GPU' if not gpu else package}"
            with pytest.raises(ConfigError, match=words):
                choose_decoder(name, device)


def test_names() -> None:
    with pytest.raises(ConfigError, match="decoder 'gpu': expected one of auto, cpu, dali, nvjpeg"):
        choose_decoder("gpu", CPU)
    assert not choose_module._installed("no_such_package")
    assert not choose_module._installed("no_such_package.at_all")
    assert choose_module._installed("simplejpeg")
