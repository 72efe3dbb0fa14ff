"""Give every torch.cuda call that megatron-core makes a meaning on a machine without CUDA.

`install()` is called once, before megatron.core is imported, by every room that uses the engine
(in its `__init__`). Where CUDA is present it does nothing at all. No file of the installed
package is edited; what is replaced, call by call:

torch.cuda
    current_device, device_count, set_device, init, _lazy_init, _lazy_call, synchronize,
    empty_cache, ipc_collect, is_current_stream_capturing; Stream, ExternalStream, Event,
    current_stream, default_stream, set_stream, stream (CPU work is in order: waits are no-ops);
    get_rng_state, set_rng_state (here and in torch.cuda.random), manual_seed, manual_seed_all,
    default_generators (the CPU generator); memory and device statistics (zero), device properties
    and capability; nvtx.
torch
    factory functions given device="cuda" or pin_memory=True; Tensor.cuda, to, pin_memory,
    record_stream; Module.cuda; Tensor.type() for callers inside megatron, whose optimizers sort
    parameters by the name of the CUDA tensor type.
torch.distributed
    all_gather of tensors that differ in their first size, which gloo refuses and the expert
    tensor parallel dispatcher needs: padded to the longest, then cut.
    ProcessGroupGloo works off its queue in one thread instead of two. After every collective each
    thread writes the collective's name into one string of the group, unguarded (torch 2.13): two
    coalesced gathers in flight, as with overlap_param_gather, and the heap is broken now and then.
megatron.core
    the jit fuser is off (no C++ compiler at run time); token_dispatcher.maybe_move_tensor_to_cpu
    is the identity; names that exist only with Transformer Engine are defined as absent.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_installed = False
_FACTORIES = (
    "tensor as_tensor empty zeros ones full rand randn randint arange linspace eye empty_like "
    "zeros_like ones_like full_like rand_like randn_like empty_strided"
).split()
# A stand-in for "as much as there is": the engine only compares and prints it.
_MEMORY_BYTES = 1 << 40


def is_cpu() -> bool:
    """Whether this process computes on the CPU."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Substitute what is listed above; returns whether anything was (False where CUDA is)."""
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available():
        return False
    _installed = True
    _substitute_device()
    _substitute_random()
    _substitute_statistics()
    _substitute_tensors()
    _substitute_collectives()
    _import_engine()
    _substitute_engine()
    return True


class Stream:
    """A stream on a machine where all work is already in order."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0
    device_type = 0
    priority = 0
    device = _CPU

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record the present time in `event` (a new one when none is given)."""
        event = event if event is not None else Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ExternalStream(Stream):
    """A stream made elsewhere; here the same as any other."""


class Event:
    """A point in time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember the present time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """The event has happened."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds from this event to `other`."""
        return (other._seconds - self._seconds) * 1e3


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _returning(value: Any = None) -> Callable[..., Any]:
    # torch._dynamo refuses one function object under two torch names: a fresh one each time.
    return lambda *_, **__: value


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _substitute_device() -> None:
    cuda: Any = torch.cuda
    default, stack = Stream(), []
    stack.append(default)

    @contextlib.contextmanager
    def stream_context(stream: Stream | None) -> Iterator[Stream | None]:
        stack.append(stream if stream is not None else stack[-1])
        try:
            yield stream
        finally:
            stack.pop()

    cuda.current_device = _returning(_CPU)
    cuda.device_count = _returning(1)
    cuda._lazy_call = lambda call, **_: call()
    for name in "set_device init _lazy_init synchronize empty_cache ipc_collect".split():
        setattr(cuda, name, _returning())
    cuda.Stream, cuda.ExternalStream, cuda.Event = Stream, ExternalStream, Event
    cuda.current_stream = lambda device=None: stack[-1]
    cuda.default_stream = lambda device=None: default
    cuda.set_stream = lambda stream: stack.__setitem__(-1, stream)
    cuda.stream = stream_context
    cuda.is_current_stream_capturing = _returning(False)


def _substitute_random() -> None:
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.default_generators = _Generators()


def _substitute_statistics() -> None:
    cuda: Any = torch.cuda
    for name in (
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
        "utilization temperature power_draw clock_rate"
    ).split():
        setattr(cuda, name, _returning(0))
    cuda.reset_peak_memory_stats = _returning()
    cuda.memory_stats = lambda *_, **__: collections.defaultdict(int)
    cuda.mem_get_info = _returning((_MEMORY_BYTES, _MEMORY_BYTES))
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=_MEMORY_BYTES, multi_processor_count=1
    )
    cuda.get_device_capability = _returning((0, 0))
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _returning())
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()


def _substitute_tensors() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return wrapper

    # torch lists its factories on first use, to find them under `with torch.device(...)`: it must
    # see the real ones.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    tensor: Any = torch.Tensor
    real_to, real_type = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)) and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return real_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kw: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, non_blocking, **kw)
        name = real_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name

    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = _returning()
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _substitute_collectives() -> None:
    dist: Any = torch.distributed
    if not dist.is_available():
        return
    real = dist.all_gather

    @functools.wraps(real)
    def all_gather(tensor_list: list, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = [item.size(0) if item.dim() else 0 for item in tensor_list]
        if len(set(sizes)) <= 1:
            return real(tensor_list, tensor, *args, **kwargs)
        longest = max(sizes)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        work = real(gathered, padded, *args, **kwargs)
        if work is not None:
            work.wait()
        for target, source, size in zip(tensor_list, gathered, sizes, strict=True):
            target.copy_(source[:size])
        return work

    dist.all_gather = all_gather
    _substitute_gloo(dist.distributed_c10d)


def _substitute_gloo(c10d: Any) -> None:
    group = c10d.ProcessGroupGloo
    start = group.__init__

    @functools.wraps(start)
    def start_with_one_thread(
        self: Any, store: Any, rank: int, size: int, timeout: timedelta = c10d.default_pg_timeout
    ) -> None:
        # As torch chooses them.
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        devices = [group.create_device(interface=name) for name in interfaces]
        options = group._Options()
        options._devices = devices or [group.create_default_device()]
        options._threads, options._timeout = 1, timeout
        start(self, store, rank, size, options)

    group.__init__ = start_with_one_thread


def _import_engine() -> None:
    real_compile = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.core.jit

            megatron.core.jit.disable_jit_fuser()
            import megatron.core.dist_checkpointing
            import megatron.core.distributed
            import megatron.core.models.gpt
            import megatron.core.optimizer
            import megatron.core.pipeline_parallel
    finally:
        torch.compile = real_compile


def _substitute_engine() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    import megatron.core.transformer.multi_latent_attention as mla

    def identity(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The engine makes split sizes Python integers only where they leave a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = identity
    # Read unconditionally by the engine, defined only where Transformer Engine imports.
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=_returning(False))
        random.activation_recompute_forward = lambda **_: contextlib.nullcontext()
        random.fp8_autocast = lambda **_: contextlib.nullcontext()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(mla.TELinear, type):
        mla.HAVE_TE = False
        mla.TELinear = type("NoTELinear", (), {})
