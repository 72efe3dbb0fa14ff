"""Pictures a second and core, from tar to normalised patches, beside two peers.

    python benchmarks/data_images.py --photographs FOLDER ... --json result.json

Ours: bytes by offset from the tar, `CpuDecoder` on a thread for each core. Peers: megatron-energon
(Pillow's decode by its own decoder, then Pillow's bicubic and our own cutting in a task encoder)
and Hugging Face datasets with transformers' Qwen2VLImageProcessorPil; each with as many worker
processes as cores. All have the same pixel bounds, mean, deviation and patch size, and give float32
patches of whole batches. On a GPU, DALI and nvJPEG are measured as well.

The peers need packages that this project does not, and energon cannot be had at our own versions of
three others, so they go into an environment of their own:

    grep -Ev '^(filelock|python-dateutil|tzdata)=' constraints.txt > bench-constraints.txt
    python3.11 -m venv .bench-venv
    .bench-venv/bin/pip install -c bench-constraints.txt -e . transformers==5.23.0 \\
        scikit-image scikit-learn matplotlib megatron-energon==7.4.1 datasets==5.2.0
    .bench-venv/bin/python benchmarks/data_images.py --json result.json

Photographs are those that scikit-image, scikit-learn and matplotlib bring, and all JPEG files of
`--photographs`, of which pieces are cut at random (always the same), resized to mixed sizes and
encoded anew as JPEG, one in ten progressive.

Each side runs in a process of its own, in turn, in another order each round; `ratio_by_cpu_time`
counts the processor's seconds that a side used, which other load on the machine changes less.
Before anything is
timed, all sides' patches of the same pictures must agree to 2 of 255 levels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import parser_of, record, tell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PEERS = {
    "energon": ("megatron.energon", "megatron-energon"),
    "datasets": ("datasets", "datasets"),
}
GPU_SIDES = ("dali", "nvjpeg")
MIN_PIXELS, MAX_PIXELS = 3136, 1_003_520
"""Pixel bounds of all sides; a picture is at most 1,280 language tokens (Qwen2-VL's default)."""
SIDES_PIXELS = (400, 2600)
"""Longer sides of the pictures, drawn evenly on a logarithmic scale."""
BATCH = 8
CHECKED = 16
"""Pictures whose patches are compared."""
SHARDS = 4
TOLERANCE = 2

Batch = tuple[list[str], list[int], Any]
"""Names of pictures, their numbers of patches, and float32 [patches of all, 588]."""


def main() -> None:
    """Compare, print and, with `--json`, write the result."""
    args = parse()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    for module, package in PEERS.values():
        if find_spec(module.split(".")[0]) is None or find_spec(module) is None:
            raise SystemExit(f"{package} is not installed; see the top of {Path(__file__).name}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = compare(args, Path(folder))
    tell(result, args.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--pictures", type=int, default=160, help="made of the photographs")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="of each side in each round")
    parser.add_argument("--folder", type=Path, help="where to write the pictures for a while")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the pictures, check that all sides agree on them, and time them in turn."""
    import torch

    made = make_pictures(args, folder)
    sides = ["ours", *PEERS, *(GPU_SIDES if torch.cuda.is_available() else ())]
    spread = check(args, folder, sides)
    measured: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = sides[number % len(sides) :] + sides[: number % len(sides)]
        measured.append({side: start_side(args, folder, side) for side in order})
    rounds, busy = (
        [{side: found[key] for side, found in one.items()} for one in measured]
        for key in ("rate", "per_cpu_second")
    )
    rates = {side: statistics.median(one[side] for one in rounds) for side in sides}
    per_core = {side: round(rate / args.cores, 2) for side, rate in rates.items()}
    return {
        "ratio": round(statistics.median(one["ours"] / best_peer(one) for one in rounds), 3),
        "ours": per_core["ours"],
        "peer": best_peer(per_core),
        "unit": "pictures a second and core",
        "ratio_by_cpu_time": round(
            statistics.median(one["ours"] / best_peer(one) for one in busy), 3
        ),
        "pictures_per_cpu_second": {
            side: round(statistics.median(one[side] for one in busy), 2) for side in sides
        },
        "peers": {peer: per_core[peer] for peer in PEERS},
        "gpu_pictures_a_second": {
            side: round(rate, 1) for side, rate in rates.items() if side in GPU_SIDES
        },
        "data": f"real photographs: {made['photographs']} cut and encoded anew to "
        f"{made['pictures']} JPEG of {made['megapixels']:.2f} megapixels on average, "
        f"{made['sides'][0]} to {made['sides'][1]} pixels on the longer side, one in ten "
        "progressive",
        "routing": "none",
        "largest_difference_in_levels": spread,
        "rounds": [
            {side: round(rate / args.cores, 2) for side, rate in one.items()} for one in rounds
        ],
        "cores": args.cores,
        **record(
            *("torch", "pillow", "simplejpeg", "numpy", "megatron-energon"),
            *("datasets", "transformers"),
            gpu=True,
        ),
    }


def best_peer(rates: dict[str, float]) -> float:
    """The faster peer's rate in one round."""
    return max(rates[peer] for peer in PEERS)


def photographs(folders: list[Path]) -> list[Path]:
    """The packages' photographs, and all JPEG files of the folders."""
    found = []
    for package, names in {
        "skimage": ("data/rocket.jpg", "data/chelsea.png", "data/coffee.png", "data/astronaut.png"),
        "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
        "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    }.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found += [Path(spec.origin).parent / name for name in names]
    return found + jpeg_files(folders)


def jpeg_files(folders: list[Path]) -> list[Path]:
    """All JPEG files of the folders."""
    found = []
    for folder in folders:
        given = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
        if not given:
            raise SystemExit(f"--photographs {folder}: no JPEG files there")
        found += given
    return found


def make_pictures(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the tars, and energon's record of them."""
    import numpy as np
    from PIL import Image

    sources = photographs(args.photographs)
    images = [Image.open(path).convert("RGB") for path in sources]
    draw = np.random.default_rng(0)
    sizes = []
    tars = [tarfile.open(folder / f"shard-{shard}.tar", "w") for shard in range(SHARDS)]
    for number in range(args.pictures):
        image = images[number % len(images)]
        # A piece of 60 to 100 % of each side, so that aspects differ.
        width, height = (int(side * draw.uniform(0.6, 1)) for side in image.size)
        left, top = (
            int(draw.integers(whole - part + 1))
            for whole, part in zip(image.size, (width, height), strict=True)
        )
        longer = np.exp(draw.uniform(*np.log(SIDES_PIXELS)))
        scale = longer / max(width, height)
        size = (max(28, round(width * scale)), max(28, round(height * scale)))
        box = (left, top, left + width, top + height)
        piece = image.resize(size, Image.Resampling.LANCZOS, box=box)
        buffer = io.BytesIO()
        piece.save(buffer, "JPEG", quality=90, progressive=number % 10 == 9)
        entry = tarfile.TarInfo(f"{number:05}.jpg")
        entry.size = len(buffer.getvalue())
        tars[number % SHARDS].addfile(entry, io.BytesIO(buffer.getvalue()))
        sizes.append(size)
    for tar in tars:
        tar.close()
    prepare_energon(folder)
    return {
        "photographs": len(sources),
        "pictures": args.pictures,
        "megapixels": statistics.mean(width * height for width, height in sizes) / 1e6,
        "sides": (min(map(max, sizes)), max(map(max, sizes))),
    }


def prepare_energon(folder: Path) -> None:
    """What `energon prepare` writes."""
    from megatron.energon import BaseWebdatasetFactory

    names = [f"shard-{shard}.tar" for shard in range(SHARDS)]
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1.0)], workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: ImageWebdataset\nfield_map:\n  image: jpg\n"
    )


def start_side(args: argparse.Namespace, folder: Path, side: str, *options: str) -> dict[str, Any]:
    """Run one side in a process of its own, and what it prints last."""
    command = [sys.executable, __file__, "--side", side, "--data", str(folder)]
    command += ["--cores", str(args.cores), "--seconds", str(args.seconds), *options]
    # Each thread and worker of a side has a core; none starts more of its own.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check(args: argparse.Namespace, folder: Path, sides: list[str]) -> dict[str, float]:
    """Largest difference of each side from ours, in levels; ends where that is too much."""
    import numpy as np

    found = {}
    for side in sides:
        file = folder / f"{side}.npz"
        start_side(args, folder, side, "--check", str(file))
        with np.load(file) as arrays:
            found[side] = {name: arrays[name] for name in arrays.files}
        file.unlink()
    levels = 255 * np.repeat(settings().image_std, settings().patch_size ** 2)
    spread = {}
    for side, patches in found.items():
        if {name: one.shape for name, one in patches.items()} != {
            name: one.shape for name, one in found["ours"].items()
        }:
            raise SystemExit(f"{side} gives patches of other shapes than ours")
        spread[side] = round(
            max(
                float((np.abs(one - found["ours"][name]) * levels).max())
                for name, one in patches.items()
            ),
            2,
        )
        # nvJPEG repeats chroma samples where libjpeg interpolates them.
        if spread[side] > TOLERANCE and side != "nvjpeg":
            raise SystemExit(f"{side} differs from ours by {spread[side]} levels")
    return {side: most for side, most in spread.items() if side != "ours"}


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """In its own process: the rate of one side, or its patches of the first pictures."""
    allowed = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, allowed)
    if args.side in PEERS:
        batches, ahead = {"energon": energon, "datasets": hf_datasets}[args.side](args)
    else:
        batches, ahead = ours(args)
    if args.check is not None:
        return save_first(batches, args.check)
    # Workers fetch ahead before the clock starts; this much is thrown away.
    for _ in range(ahead + 2):
        next(batches)
    started, busy = time.perf_counter(), cpu_seconds()
    pictures = 0
    while (passed := time.perf_counter() - started) < args.seconds:
        pictures += len(next(batches)[0])
    return {"rate": pictures / passed, "per_cpu_second": pictures / (cpu_seconds() - busy)}


def cpu_seconds() -> float:
    """What this process and its workers have used of the processor."""
    import psutil

    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def save_first(batches: Iterator[Batch], file: Path) -> dict[str, Any]:
    """Write the patches of the pictures with the lowest numbers."""
    import numpy as np

    wanted = {f"{number:05}" for number in range(CHECKED)}
    found: dict[str, Any] = {}
    for names, counts, patches in batches:
        for name, part in zip(names, patches.cpu().split(counts), strict=True):
            if name in wanted:
                found[name] = part.numpy()
        if len(found) == len(wanted):
            break
    np.savez(file, **found)
    return {}


def settings() -> Any:
    """The encoder that all sides cut patches for."""
    from megatron_vlm.config.model_schema import VisionConfig

    return VisionConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=64,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
    )


def ours(args: argparse.Namespace) -> tuple[Iterator[Batch], int]:
    """Positioned reads and one of our decoders."""
    import torch

    from megatron_vlm.data.decoders import choose_decoder

    on_gpu = args.side in GPU_SIDES
    device = torch.device("cuda" if on_gpu else "cpu")
    decoder = choose_decoder(args.side if on_gpu else "cpu", device, threads=args.cores)
    vision = settings()
    pictures = our_index(args.data, vision)
    files = [os.open(args.data / f"shard-{shard}.tar", os.O_RDONLY) for shard in range(SHARDS)]
    size = BATCH * (1 if not on_gpu else 8) * args.cores

    def batches() -> Iterator[Batch]:
        from megatron_vlm.data.decoders import PatchJob

        place = 0
        while True:
            chosen = [pictures[(place + k) % len(pictures)] for k in range(size)]
            place += size
            jobs = [
                PatchJob(os.pread(files[shard], length, offset), *sizes)
                for _, shard, offset, length, sizes in chosen
            ]
            counts = [job.grid_h * job.grid_w for job in jobs]
            out = torch.empty(sum(counts), 3 * vision.patch_size**2, device=device)
            for result in decoder.decode(jobs, vision, out):
                if not isinstance(result, torch.Tensor):
                    raise result
            if on_gpu:
                torch.cuda.synchronize()
            yield [one[0] for one in chosen], counts, out

    return batches(), 0


def our_index(folder: Path, vision: Any) -> list[tuple[str, int, int, int, tuple[int, ...]]]:
    """(name, shard, offset, bytes, (height, width, grid_h, grid_w)): what a build writes down."""
    from megatron_vlm.data.geometry import grid, target_size
    from megatron_vlm.data.pictures import check_picture

    found = []
    for shard in range(SHARDS):
        with tarfile.open(folder / f"shard-{shard}.tar") as tar:
            for entry in tar:
                stream = tar.extractfile(entry)
                assert stream is not None
                height, width, _ = check_picture(stream.read())
                sizes = (height, width, *grid(*target_size(height, width, vision), vision))
                found.append((entry.name[:5], shard, entry.offset_data, entry.size, sizes))
    return found


def energon(args: argparse.Namespace) -> tuple[Iterator[Batch], int]:
    """megatron-energon: Pillow's decode by its own decoder, the rest in a task encoder."""
    import numpy as np
    import torch
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
    )
    from PIL import Image

    from megatron_vlm.data.geometry import target_size
    from megatron_vlm.data.pictures import cut

    vision = settings()

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: Any) -> tuple[str, np.ndarray]:
            image = sample.image
            height, width = target_size(image.height, image.width, vision)
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            return sample.__key__.rsplit("/", 1)[-1], cut(np.asarray(resized), vision)

        def batch(self, samples: list[tuple[str, np.ndarray]]) -> Batch:
            parts = [part for _, part in samples]
            return (
                [name for name, _ in samples],
                [len(part) for part in parts],
                torch.from_numpy(np.concatenate(parts)),
            )

        def encode_batch(self, batch: Batch) -> Batch:
            return batch

    dataset = get_train_dataset(
        args.data,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=args.cores),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    return iter(get_loader(dataset)), 2 * args.cores


def hf_datasets(args: argparse.Namespace) -> tuple[Iterator[Batch], int]:
    """Hugging Face datasets, read from its Arrow cache, and transformers' processor for Pillow."""
    import torch
    from datasets import load_dataset
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = settings()
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=1,
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )
    dataset = load_dataset(
        "webdataset",
        data_files={"train": [str(path) for path in sorted(args.data.glob("*.tar"))]},
        split="train",
        cache_dir=str(args.data / "cache"),
    )

    def collate(samples: list[dict[str, Any]]) -> Batch:
        done = processor([sample["jpg"] for sample in samples], return_tensors="pt")
        counts = done["image_grid_thw"].prod(dim=1).tolist()
        return [sample["__key__"] for sample in samples], counts, done["pixel_values"]

    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=args.cores,
        collate_fn=collate,
        persistent_workers=True,
    )

    def endless() -> Iterator[Batch]:
        while True:
            yield from loader

    return endless(), 2 * args.cores


if __name__ == "__main__":
    main()
