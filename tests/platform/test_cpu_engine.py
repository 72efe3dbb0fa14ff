"""The seam to a machine without CUDA: a no-op beside CUDA, exactly the listed calls elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.platform import World, cpu_engine, install, is_cpu, start_distributed, stop
from tests.ranks import run_ranks

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU to be absent")

SUBSTITUTED = {
    "torch.cuda": (
        "current_device device_count set_device init _lazy_init _lazy_call synchronize "
        "empty_cache ipc_collect is_current_stream_capturing Stream ExternalStream Event "
        "current_stream default_stream set_stream stream get_rng_state set_rng_state "
        "manual_seed manual_seed_all default_generators memory_allocated max_memory_allocated "
        "memory_reserved max_memory_reserved utilization temperature power_draw clock_rate "
        "reset_peak_memory_stats memory_stats mem_get_info get_device_properties "
        "get_device_capability"
    ),
    "torch.cuda.random": "get_rng_state set_rng_state",
    "torch.cuda.nvtx": "range_push range_pop mark range",
    "torch": (
        "tensor as_tensor empty zeros ones full rand randn randint arange linspace eye empty_like "
        "zeros_like ones_like full_like rand_like randn_like empty_strided"
    ),
    "torch.Tensor": "cuda to pin_memory record_stream type",
    "torch.nn.Module": "cuda",
    "torch.distributed": "all_gather",
    "torch.distributed.ProcessGroupGloo": "__init__",
}
"""What the room's docstring lists, owner by owner."""

ENGINE = {
    "megatron.core.transformer.moe.token_dispatcher": "maybe_move_tensor_to_cpu",
}

# Records every attribute of every owner, installs, and prints what became of them.
_PROBE = """
import importlib, json, sys
import torch, torch.cuda.random, torch.cuda.nvtx, torch.distributed
cuda, with_engine = sys.argv[1] == "cuda", sys.argv[2:]
if cuda:
    torch.cuda.is_available = lambda: True

def owner(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last) if last[0].isupper() else (
        importlib.import_module(name))

names = ["torch.cuda", "torch.cuda.random", "torch.cuda.nvtx", "torch", "torch.Tensor",
         "torch.nn.Module", "torch.distributed", "torch.distributed.ProcessGroupGloo",
         *with_engine]
# Names alone would not do: an attribute may be inherited.
before = {name: {key: getattr(owner(name), key) for key in dir(owner(name))} for name in names}
import megatron_vlm.platform
installed = megatron_vlm.platform.install()
changed = {
    name: sorted(
        key for key, value in before[name].items()
        # Those of a module are made anew at every look.
        if (not key.startswith("__") or key == "__init__" and isinstance(owner(name), type))
        and getattr(owner(name), key) is not value
    )
    for name in names
}
engine = "megatron.core" in sys.modules
print(json.dumps({"installed": installed, "changed": changed, "engine": engine}))
"""


def _probe(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROBE, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.unit
def test_beside_cuda_nothing_is_substituted() -> None:
    found = _probe("cuda")
    assert found["installed"] is False
    assert found["changed"] == {name: [] for name in SUBSTITUTED}
    assert not found["engine"], "the engine is imported by whoever needs it, not by the seam"


@pytest.mark.unit
@on_cpu
def test_without_cuda_exactly_the_listed_calls_are() -> None:
    found = _probe("cpu")
    assert found["installed"] is True
    assert found["changed"] == {name: sorted(SUBSTITUTED[name].split()) for name in SUBSTITUTED}


@pytest.mark.unit
def test_docstring_names_every_call() -> None:
    said = " ".join((cpu_engine.__doc__ or "").split())
    together = {
        "memory and device statistics": (
            "memory_allocated max_memory_allocated memory_reserved max_memory_reserved utilization "
            "temperature power_draw clock_rate reset_peak_memory_stats memory_stats mem_get_info"
        ),
        "device properties and capability": "get_device_properties get_device_capability",
        "nvtx": SUBSTITUTED["torch.cuda.nvtx"],
        "factory functions": SUBSTITUTED["torch"],
        "ProcessGroupGloo": SUBSTITUTED["torch.distributed.ProcessGroupGloo"],
    }
    phrase = {name: words for words, names in together.items() for name in names.split()}
    for listed in (*SUBSTITUTED.values(), *ENGINE.values()):
        for name in listed.split():
            assert re.search(rf"\b{phrase.get(name, name)}\b", said), name


@pytest.mark.unit
@on_cpu
def test_engine_functions_are_ours_on_cpu() -> None:
    for owner, name in ENGINE.items():
        function = getattr(importlib.import_module(owner), name)
        assert function.__module__ == "megatron_vlm.platform.cpu_engine", (owner, name)


@pytest.mark.unit
@on_cpu
def test_second_install_changes_nothing() -> None:
    before = (torch.zeros, torch.Tensor.to, torch.cuda.Stream, dist.all_gather)
    assert install() is True
    assert before == (torch.zeros, torch.Tensor.to, torch.cuda.Stream, dist.all_gather)
    assert is_cpu()


@pytest.mark.unit
@on_cpu
def test_substitutes_are_distinct_objects() -> None:
    """torch._dynamo refuses one function under two torch names."""
    functions = [
        getattr(torch.cuda, name)
        for name in SUBSTITUTED["torch.cuda"].split()
        if isinstance(getattr(torch.cuda, name), types.FunctionType)
    ]
    assert len(functions) > 20
    assert len({id(function) for function in functions}) == len(functions)
    # The same call under both of its names is one thing to torch too.
    assert torch.cuda.random.get_rng_state is not torch.cuda.set_rng_state


@pytest.mark.unit
@on_cpu
def test_streams_and_events() -> None:
    cuda = torch.cuda
    outer, other = cuda.current_stream(), cuda.Stream()
    assert cuda.default_stream() is outer
    with cuda.stream(other):
        assert cuda.current_stream() is other
        with cuda.stream(None):  # type: ignore[arg-type]
            assert cuda.current_stream() is other
        with cuda.stream(cuda.ExternalStream(0)):
            assert cuda.current_stream() is not other
        other.wait_stream(outer)
        first = other.record_event()
        other.wait_event(first)
        time.sleep(0.02)
        second = cuda.Event(enable_timing=True)
        second.record()
        assert other.query() and first.query() and second.query()
        for thing in (other, first, second):
            thing.synchronize()
        second.wait()
    assert cuda.current_stream() is outer
    assert 15 <= first.elapsed_time(second) < 5000, "milliseconds"
    cuda.set_stream(other)
    assert cuda.current_stream() is other
    cuda.set_stream(outer)
    cuda.synchronize()
    assert cuda.is_current_stream_capturing() is False


@pytest.mark.unit
@on_cpu
def test_random_state_round_trip() -> None:
    cuda = torch.cuda
    state = cuda.get_rng_state()
    drawn = torch.rand(5)
    assert not torch.equal(torch.rand(5), drawn)
    cuda.set_rng_state(state, device="cuda:0")
    assert torch.equal(torch.rand(5), drawn)
    cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(5), drawn)
    assert torch.equal(cuda.default_generators[0].get_state(), cuda.random.get_rng_state())
    assert len(cuda.default_generators) == 1
    for seed in (cuda.manual_seed, cuda.manual_seed_all):
        seed(31)
        mine = torch.rand(5)
        torch.default_generator.manual_seed(31)
        assert torch.equal(mine, torch.rand(5))


@pytest.mark.unit
@on_cpu
def test_engine_random_tracker() -> None:
    """The engine's named random states fork, go on where they stopped, and leave the outer one."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("inner", 5)
    torch.manual_seed(6)
    outer = torch.rand(3)
    torch.manual_seed(6)
    with tracker.fork("inner"):
        first = torch.rand(3)
    # By what it draws: the bytes of a state hold gaps that mean nothing and differ now and then.
    assert torch.equal(torch.rand(3), outer)
    with tracker.fork("inner"):
        second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first) and torch.equal(torch.rand(3), second)


@pytest.mark.unit
@on_cpu
def test_tensors_and_modules_stay_where_they_are() -> None:
    x = torch.arange(4.0)
    assert x.cuda() is x and x.cuda(0) is x and x.pin_memory() is x
    x.record_stream(torch.cuda.Stream())
    for moved in (
        x.to("cuda"),
        x.to("cuda:0"),
        x.to(0),
        x.to(torch.device("cuda", 0)),
        x.to(device="cuda"),
        x.to(device="cuda", dtype=torch.float64),
        x.to("cuda", torch.float64),
        x.to("cuda", non_blocking=True),
    ):
        assert moved.device.type == "cpu" and torch.equal(moved.to(x.dtype), x)
    assert x.to(torch.float16).dtype == torch.float16
    assert x.to(torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
    assert x.to(x.device) is x
    layer = torch.nn.Linear(2, 2)
    assert layer.cuda() is layer and layer.cuda(0) is layer
    assert layer.to("cuda").weight.device.type == "cpu"
    with pytest.raises(RuntimeError):
        x.to("meta_or_nothing")


@pytest.mark.unit
@on_cpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), 0])
def test_factories_on_the_cuda_device(device: Any) -> None:
    like = torch.ones(2, 3)
    arguments: dict[str, tuple] = {
        "tensor": ([1.0, 2.0],),
        "as_tensor": ([1.0, 2.0],),
        "full": ((2,), 7.0),
        "randint": (0, 5, (3,)),
        "arange": (4,),
        "linspace": (0, 1, 5),
        "eye": (3,),
        "full_like": (like, 2.0),
        "empty_strided": ((2, 3), (3, 1)),
    }
    for name in SUBSTITUTED["torch"].split():
        given = arguments.get(name, (like,) if name.endswith("_like") else (2, 3))
        made = getattr(torch, name)(*given, device=device)
        assert made.device.type == "cpu", name
        expected = getattr(torch, name)(*given)
        assert made.shape == expected.shape and made.dtype == expected.dtype, name
        if not name.startswith(("empty", "rand")):
            assert torch.equal(made, expected), name


@pytest.mark.unit
@on_cpu
def test_factories_elsewhere_are_untouched() -> None:
    assert torch.empty(2, pin_memory=True).is_pinned() is False
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros(2, device="cpu", dtype=torch.int32).dtype == torch.int32
    assert torch.tensor(3).item() == 3


def _ask_type(tensor: torch.Tensor, *arguments: Any) -> Any:
    return tensor.type(*arguments)


@pytest.mark.unit
@on_cpu
def test_type_name_differs_for_engine_callers_alone() -> None:
    from_engine = types.FunctionType(_ask_type.__code__, {"__name__": "megatron.core.somewhere"})
    ours = types.FunctionType(_ask_type.__code__, {"__name__": "megatron_vlm.somewhere"})
    x = torch.zeros(2)
    assert _ask_type(x) == ours(x) == "torch.FloatTensor"
    assert from_engine(x) == "torch.cuda.FloatTensor"
    assert from_engine(x.bfloat16()) == "torch.cuda.BFloat16Tensor"
    for caller in (_ask_type, from_engine):
        assert caller(x, torch.float64).dtype == torch.float64
        assert caller(x, "torch.DoubleTensor").dtype == torch.float64


@pytest.mark.unit
@on_cpu
def test_statistics_and_properties() -> None:
    cuda = torch.cuda
    assert cuda.device_count() == 1 and torch.device(cuda.current_device()).type == "cpu"
    cuda.set_device(0)
    cuda.empty_cache()
    cuda.ipc_collect()
    cuda.reset_peak_memory_stats()
    assert cuda.memory_allocated() == cuda.max_memory_allocated() == cuda.memory_reserved() == 0
    assert cuda.memory_stats()["num_alloc_retries"] == 0
    free, total = cuda.mem_get_info()
    properties = cuda.get_device_properties(0)
    assert 0 < free <= total == properties.total_memory
    assert (properties.major, properties.minor) == cuda.get_device_capability() == (0, 0)
    with cuda.nvtx.range("part"):
        cuda.nvtx.range_push("inner")
        cuda.nvtx.range_pop()
    called = []
    cuda._lazy_call(lambda: called.append(1))
    assert called == [1]


def _gather(world: World, sizes: list[int], asynchronous: bool) -> list[torch.Tensor]:
    start_distributed(world)
    mine = _rows(world.rank, sizes[world.rank])
    targets = [torch.full((size, 2), -1.0) for size in sizes]
    work = dist.all_gather(targets, mine, async_op=asynchronous)
    if asynchronous:
        work.wait()
    stop()
    return targets


def _rows(rank: int, size: int) -> torch.Tensor:
    return torch.arange(2.0 * size).view(size, 2) + 100 * rank


@pytest.mark.distributed
@on_cpu
@pytest.mark.parametrize("sizes", [[2, 5, 1], [3, 0, 3], [2, 2, 2]])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_gather_of_uneven_rows(sizes: list[int], asynchronous: bool) -> None:
    for gathered in run_ranks(3, _gather, sizes, asynchronous):
        for rank, (found, size) in enumerate(zip(gathered, sizes, strict=True)):
            assert torch.equal(found, _rows(rank, size))


def _threads_of_gloo(world: World) -> list[int]:
    start_distributed(world)
    shards = [torch.full((4,), float(10 * bucket + world.rank)) for bucket in range(32)]
    gathered = [torch.zeros(8) for _ in shards]
    pending = []
    for whole, shard in zip(gathered, shards, strict=True):
        # As the engine gathers a bucket of weights.
        with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=True) as work:
            dist.all_gather_into_tensor(whole, shard, async_op=True)
        pending.append(work)
    for work in pending:
        work.wait()
    for bucket, whole in enumerate(gathered):
        assert whole.tolist() == [10.0 * bucket] * 4 + [10.0 * bucket + 1] * 4
    # A thread has its name once it works.
    found = [_threads("pt_gloo_runloop")]
    dist.barrier(dist.new_group([0, 1]))
    found.append(_threads("pt_gloo_runloop"))
    stop()
    return found


def _threads(name: str) -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().strip() == name for task in tasks)


@pytest.mark.distributed
@on_cpu
def test_gloo_works_in_one_thread() -> None:
    """With torch's own two, several gathers in flight break the heap: a crash within seconds when
    nothing else is done, within hundreds of steps in training."""
    assert run_ranks(2, _threads_of_gloo) == [[1, 2], [1, 2]]
