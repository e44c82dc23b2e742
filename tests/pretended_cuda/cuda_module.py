"""What torch.cuda offers, for the pretended devices: its parts in C++ are absent from a CPU build.

Streams do all at once; their waits are counted. Times are those of the host.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAME = "pretended GPU"
MEMORY = 80 * 2**30  # bytes of a device


def visible(env: Mapping[str, str]) -> list[int]:
    """The numbers of the devices that a process with these variables sees."""
    every = list(range(int(env.get("PRETENDED_GPUS", "8"))))
    if "CUDA_VISIBLE_DEVICES" not in env:
        return every
    named = {name: number for number in every for name in (str(number), uuid_of(number))}
    chosen = (name.strip() for name in env["CUDA_VISIBLE_DEVICES"].split(","))
    # As in CUDA, a name that is none ends the list.
    return [named[name] for name in itertools.takewhile(named.__contains__, chosen)]


def uuid_of(number: int) -> str:
    return f"GPU-pretended-{number}"


def index_of(device: Any = None) -> int:
    """The index of a device, however it is named; of the current one for None and "cuda"."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def current_device() -> int:
    return int(torch.ops.pretended_cuda.current_device())


@contextmanager
def uncounted() -> Iterator[None]:
    """Nothing that is done in the block counts as launched or waited for."""
    before = torch.ops.pretended_cuda.pause(True)
    try:
        yield
    finally:
        torch.ops.pretended_cuda.pause(before)


class Event:
    """Has happened once it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        torch.ops.pretended_cuda.wait_for("event.synchronize")

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds."""
        return 1e3 * (later._at - self._at)


class Stream:
    """Has no work left when a call returns."""

    def __init__(self, device: Any = None, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", index_of(device))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.ops.pretended_cuda.wait_for("stream.synchronize")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass


def properties(device: Any = None) -> SimpleNamespace:
    number = visible(os.environ)[index_of(device)]
    return SimpleNamespace(name=NAME, uuid=uuid_of(number), multi_processor_count=132,
                           total_memory=MEMORY, major=9, minor=0)


def host_memory_stats() -> dict[str, int]:
    ops = torch.ops.pretended_cuda
    return {"allocated_bytes.current": ops.pinned(), "allocated_bytes.peak": ops.peak_pinned()}


def synchronize(device: Any = None) -> None:
    torch.ops.pretended_cuda.wait_for("synchronize")


def set_sync_debug_mode(mode: int | str) -> None:
    assert mode in (0, "default", 2, "error"), mode
    torch.ops.pretended_cuda.refuse_waits(mode in (2, "error"))


def log_use(folder: Path) -> None:
    """Leave a file there for each device that this process has kept anything on."""
    for index, number in enumerate(visible(os.environ)):
        if torch.ops.pretended_cuda.peak_allocated(index):
            (folder / uuid_of(number)).touch()


def install() -> None:
    """Replace what torch.cuda cannot do in a CPU build."""
    cuda: Any = torch.cuda
    ops = torch.ops.pretended_cuda
    count = len(visible(os.environ))
    ops.set_device_count(count)

    def memory(read: Any) -> Any:
        return lambda device=None: int(read(index_of(device)))

    def nothing() -> Any:
        """A function that does nothing: a new one each time, since torch's compiler, which
        --deterministic imports, keeps a table of the functions of torch.cuda."""
        return lambda *_, **__: None

    replaced = {
        "is_available": lambda: count > 0, "device_count": lambda: count,
        "is_initialized": lambda: count > 0, "init": nothing(), "_lazy_init": nothing(),
        "manual_seed": nothing(), "manual_seed_all": nothing(), "empty_cache": nothing(),
        "current_device": current_device,
        "set_device": lambda device: ops.exchange_device(index_of(device)),
        "_exchange_device": lambda index: int(ops.exchange_device(index)),
        "_maybe_exchange_device": lambda index: int(ops.exchange_device(index)),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "Stream": Stream, "Event": Event, "set_stream": nothing(),
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "stream": lambda stream: nullcontext(), "is_current_stream_capturing": lambda: False,
        "synchronize": synchronize, "set_sync_debug_mode": set_sync_debug_mode,
        "memory_allocated": memory(ops.allocated), "memory_reserved": memory(ops.allocated),
        "max_memory_allocated": memory(ops.peak_allocated),
        "reset_peak_memory_stats": lambda device=None: ops.reset_peak(index_of(device)),
        "mem_get_info": lambda device=None: (MEMORY - int(ops.allocated(index_of(device))), MEMORY),
        "host_memory_stats": host_memory_stats,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    tensor: Any = torch.Tensor
    tensor.record_stream = nothing()
    # A process that ends right after a backward pass would be aborted: a thread of autograd's for
    # the device still waits for Python's lock, to release what the pass has used.
    atexit.register(time.sleep, 0.05)
    if folder := os.environ.get("PRETENDED_LOG"):
        atexit.register(log_use, Path(folder))
