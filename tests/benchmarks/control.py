"""What a round's messages cost the server, by the number of workers: the control plane alone.

    python -m tests.benchmarks.control              # minutes, 8 GB of memory; markdown
    python -m tests.benchmarks.control 10 100       # other numbers of workers
    python -m tests.benchmarks.control --start      # until they are connected, and heartbeats

Every rank is a process, forked from one that has imported torch, so that a thousand fit a machine.
They begin together when all are there: a rank that waits is not idle, since gloo wakes a thread of
it a hundred times a second. They speak the messages of a round (federation/messages.py) over the
run's own ControlPlane and do nothing else. gloo connects two of them when they first have something
to say to each other (TORCH_GLOO_LAZY_INIT).

The seconds that count are the server's own CPU seconds, of all its threads: those of the clock are
of one machine that runs all ranks on its few cores.

--start: by the run's own `connect`, with the store in a process of its own, as launchers have it.
With TORCH_GLOO_LAZY_INIT=0 in the environment all ranks connect to all.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from fedrun.common.limits import require_files
from fedrun.distributed.connect import LOOPBACK, listen, serve
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch
from fedrun.distributed.runtime import connect
from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    clients_of,
    encode,
    gather,
    share,
)
from fedrun.strategies.base import ClientReport
from tests.benchmarks.common import machine

ROUNDS = 3  # that are measured, after one in which ranks connect
LIMIT = timedelta(seconds=300)  # for all of them to be ready, and then for their rounds
SECONDS_OF_BEATS = 6
MEMORY_OF_A_RANK = 8 << 20  # bytes
HEADER = """\
| workers | CPU ms of the server a round | ms of the clock | the plan (kB) |
|---|---|---|---|"""
START = """\
| workers | store (CPU s) | all ranks (CPU s) | connections of the server | of a worker \
| heartbeats (% of the store's core) |
|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("workers", nargs="*", type=int)
    parser.add_argument("--start", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the ranks with it
    gc.freeze()  # the ranks share what is there
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}\n\n{START if args.start else HEADER}",
          flush=True)
    if args.start:
        for workers in args.workers or [20, 60, 120]:
            start = measure_start(workers)
            print(f"| {workers:,} | {start['store']:.2f} | {start['ranks']:.1f} "
                  f"| {start['server']} | {start['worker']} | {100 * start['beats']:.1f} |",
                  flush=True)
        return
    os.environ |= {"TORCH_GLOO_LAZY_INIT": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = {}
    for workers in args.workers or [10, 100, 300, 1000]:
        one = measure(workers)
        found[workers] = statistics.median(one["cpu"])
        print(f"| {workers:,} | {1e3 * found[workers]:.1f} "
              f"| {1e3 * statistics.median(one['clock']):.0f} | {one['plan'] / 1e3:.1f} |",
              flush=True)
    if len(found) > 1:
        each, once = fit(found)
        print(f"\n{1e6 * each:.0f} us a worker and round, and {1e3 * once:.1f} ms besides: "
              f"by that line {1000 * each + once:.2f} s with a thousand workers and "
              f"{10_000 * each + once:.1f} s with ten thousand")


def fit(found: dict[int, float]) -> tuple[float, float]:
    """Seconds a worker, and besides, of the line with the least squared relative errors: each
    number of workers counts as much."""
    weights = [1 / seconds**2 for seconds in found.values()]
    x, y = [*found], [*found.values()]
    total = sum(weights)
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    each = (sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
            / sum(w * (a - mean_x)**2 for w, a in zip(weights, x, strict=True)))
    return each, mean_y - each * mean_x


# ---- the ranks -----------------------------------------------------------------------------------

def measure(workers: int) -> dict[str, Any]:
    """Of the server, by round: CPU seconds (`cpu`) and seconds of the clock (`clock`); bytes of the
    `plan`."""
    require_room(workers)
    listening = listen(LOOPBACK, 0, one_machine=True)
    port = listening.getsockname()[1]
    out, into = os.pipe()

    def works() -> Iterator[Callable[[], None]]:
        yield lambda: rank_of(0, workers, serve(listening, LIMIT), into)
        listening.close()
        os.close(into)
        for rank in range(1, workers + 1):
            yield partial(worker_of, rank, workers, port)

    with together(works()):
        found: dict[str, Any] = json.loads(line_from(out, workers))
        return found


def measure_start(workers: int) -> dict[str, float]:
    """CPU seconds of the `store` and of all `ranks` until they are connected; TCP connections of
    the `server` and of the last `worker`; and the store's CPU seconds a second, for their
    heartbeats, from then on (`beats`)."""
    require_room(workers)
    listening = listen(LOOPBACK, 0, one_machine=True)
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(listening.getsockname()[1]),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the launcher serves it
    out, into = os.pipe()

    def works() -> Iterator[Callable[[], None]]:
        yield lambda: keep(serve(listening, LIMIT))
        listening.close()
        yield lambda: start_of(0, workers, into)
        os.close(into)
        for rank in range(1, workers + 1):
            yield partial(start_of, rank, workers)

    with together(works()) as (store, *ranks):
        line_from(out, workers)
        found = {"store": cpu_of(store), "ranks": sum(map(cpu_of, ranks)),
                 "server": connections_of(ranks[0]), "worker": connections_of(ranks[-1])}
        began, before = time.monotonic(), cpu_of(store)
        time.sleep(SECONDS_OF_BEATS)
        return found | {"beats": (cpu_of(store) - before) / (time.monotonic() - began)}


def require_room(workers: int) -> None:
    """Exits, with what is missing, if this machine has not enough memory or files for that many."""
    require_files(workers + 1)
    if (free := psutil.virtual_memory().available) < workers * MEMORY_OF_A_RANK:
        sys.exit(f"{workers} workers take {workers * MEMORY_OF_A_RANK >> 20} MiB of memory, and "
                 f"{free >> 20} are free")


def line_from(out: int, workers: int) -> str:
    """What the server says, or exits with one line."""
    if not select.select([out], [], [], LIMIT.seconds)[0]:
        sys.exit(f"{workers} workers: no answer of the server within {LIMIT.seconds} s")
    with os.fdopen(out) as answer:
        line = answer.readline()
    return line or sys.exit(f"the server of {workers} workers ended without an answer")


def cpu_of(process: int) -> float:
    used = psutil.Process(process).cpu_times()
    return used.user + used.system


def connections_of(process: int) -> int:
    return sum(found.status == psutil.CONN_ESTABLISHED
               for found in psutil.Process(process).net_connections("tcp"))


@contextmanager
def together(works: Iterable[Callable[[], None]]) -> Iterator[list[int]]:
    """A process for each of these, all of which begin when all are there. At the end of the block
    they are killed."""
    gate, closed = os.pipe()
    processes: list[int] = []
    try:
        for work in works:
            processes.append(fork(work, gate, closed))
        os.close(closed)  # opens the gate
        yield processes
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
        for process in processes:
            os.waitpid(process, 0)
        os.close(gate)


def fork(work: Callable[[], None], gate: int, closed: int) -> int:
    """The ID of a process that does this, when the other end of a pipe is closed, and ends.

    gate: the end that it reads. closed: the other one.
    """
    if process := os.fork():
        return process
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(2 * LIMIT.seconds)
        os.close(closed)
        os.read(gate, 1)
        work()
    finally:
        os._exit(0)


def keep(_: TCPStore) -> None:
    """The process that has forked this one ends it, and with it what it serves."""
    time.sleep(LIMIT.seconds)


def start_of(rank: int, workers: int, answer: int | None = None) -> None:
    """A rank's process that only connects, and then has a heartbeat."""
    launch = Launch(rank, workers + 1, rank, workers + 1)
    with connect(launch, dedicated_server=True, timeout=LIMIT.seconds) as control:
        control.gather(None)
        if answer is not None:
            os.write(answer, b"connected\n")
        time.sleep(LIMIT.seconds)


def worker_of(rank: int, workers: int, port: int) -> None:
    rank_of(rank, workers, TCPStore(LOOPBACK, port, None, False, LIMIT, wait_for_workers=False))


def rank_of(rank: int, workers: int, store: TCPStore, answer: int | None = None) -> None:
    """A rank's process. answer: where the server writes what it has measured."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers + 1, timeout=LIMIT)
    control = ControlPlane(dist.group.WORLD, timeout=LIMIT, first_worker=1)
    found = dict[str, list[float]](cpu=[], clock=[])
    for number in range(ROUNDS + 1):
        began = time.process_time(), time.perf_counter()
        plan = round_of(control, rank, workers, number)
        if number:
            found["cpu"].append(time.process_time() - began[0])
            found["clock"].append(time.perf_counter() - began[1])
    if answer is not None:
        size = len(json.dumps(encode(plan)))
        os.write(answer, json.dumps({**found, "plan": size}).encode() + b"\n")
    time.sleep(LIMIT.seconds)  # the process that has forked this one ends it


def round_of(control: ControlPlane, rank: int, workers: int, number: int) -> RoundPlan:
    """All ranks: the messages of a round that is evaluated, with a client on each worker."""
    serves = rank == 0
    plan = share(control, RoundPlan, RoundPlan(
        number, 8, 8 * number, list(range(workers)), [1 / workers] * workers, bound=1e-3,
        gradient_bound=1.0, entropy_reference=0.0, start_from_global=True, evaluate=True,
        save=False, last=False) if serves else None)
    clients = [] if serves else [ClientReport(rank - 1, 2048, 8765.4321 + number,
                                              weight=1 / workers, norm=0.123456789)]
    trained = gather(control, WorkerReport(clients, bytes=10**8, local_training_seconds=1.25))
    if serves:
        clients_of(plan, trained)
    share(control, RoundDecision, RoundDecision() if serves else None)
    gather(control, RoundReport(0.25, 0.5, {"mean_norm": 0.1, "step_norm": 0.1}, [
        (rank, 5432.1, 4096)], {"model": 16 * "0"}))
    share(control, RoundDecision, RoundDecision() if serves else None)
    return plan


if __name__ == "__main__":
    main()
