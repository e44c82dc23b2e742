"""What masks cost: the sum of a vector over sites, with and without, and the cipher alone.

    python -m tests.benchmarks.secure_sum                # 27 million elements; some minutes
    python -m tests.benchmarks.secure_sum --peer         # also Flower's SecAgg+ at a million

A process a site sums int32 vectors through `DataPlane.reduce`, as workers do (secure_sum_ranks.py).
Masks are made inside the timed part. Sites are machines of their own as far as the network goes:
namespaces joined by virtual cables to one switch, if this user may make them, else processes on the
loopback. Plain and masked sums take turns, so that a change in the machine's speed affects both;
numbers are medians. Seconds are from the first site's begin to the last one's end. CPU seconds are
those of all threads of a site, in user and kernel mode, the network's work included: the number to
look at on a machine that does something else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import ExactAggregator
from fedrun.config import FederatedConfig
from fedrun.flags import resolve
from fedrun.secure.identity import Identity
from fedrun.secure.masks import PIECE, Mask
from tests.benchmarks.common import machine
from tests.benchmarks.peers.environments import python_of
from tests.benchmarks.ranks import Ranks
from tests.support.sites import NAMES, Sites
from tests.support.slow_line import bare_namespaces, within

BAR = 1.8  # times the plain sum, with 3 sites
NETWORK = "10.78.0"
ENTER = ('holder=$(echo $HOLDERS | cut -d" " -f$((RANK + 1)))\n'
         'exec setpriv --pdeathsig=KILL nsenter --net=/proc/$holder/ns/net "$@"')


# ---- sites ---------------------------------------------------------------------------------------

def may_make_namespaces() -> bool:
    try:
        return os.geteuid() == 0 and not subprocess.run(
            ["unshare", "--net", "ip", "link"], capture_output=True, timeout=10).returncode
    except OSError:
        return False


@contextmanager
def namespaces(count: int, rate: str | None) -> Iterator[list[int]]:
    """Network namespaces at one switch, each with an eth0, for the time of the block; yields the
    processes that hold them. rate: what each sends at most, as tc writes it."""
    with bare_namespaces(count + 1) as (switch, *holders):
        def ip(holder: int, words: str) -> None:
            within(holder, "ip", *words.split())

        ip(switch, "link add switch type bridge")
        ip(switch, "link set switch up")
        for place, holder in enumerate(holders, 1):
            ip(switch, f"link add port{place} type veth peer name eth0 netns {holder}")
            ip(switch, f"link set port{place} master switch up")
            ip(holder, f"addr add {NETWORK}.{place}/24 dev eth0")
            ip(holder, "link set eth0 up")
            if rate:
                within(holder, "tc", *f"qdisc add dev eth0 root tbf rate {rate} burst 1mb "
                                       "latency 50ms".split())
        yield holders


@contextmanager
def running(sites: int, elements: int, apart: bool, rate: str | None = None) -> Iterator[Ranks]:
    """A process a site; apart: in namespaces."""
    command = [sys.executable, "-m", "tests.benchmarks.secure_sum_ranks", "--elements",
               str(elements)]
    with ExitStack() as stack:
        env = {}
        if apart:
            holders = stack.enter_context(namespaces(sites, rate))
            env = {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0",
                   "HOLDERS": " ".join(map(str, holders))}
            command = ["sh", "-c", ENTER, "sh", *command]
        yield stack.enter_context(Ranks(command, sites, env=env))


def measure(sites: int, elements: int, sums: int, apart: bool, rate: str | None = None
            ) -> dict[str, float]:
    """Medians of `sums` sums of each kind, after one of each to warm up."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with running(sites, elements, apart, rate) as ranks:
        for _ in range(sums + 1):
            for masked, samples in found.items():
                samples.append(ranks.ask({"masked": masked}))
    return numbers(*([samples[1:] for samples in found.values()]))


def numbers(plain: Sequence[dict[str, float]], masked: Sequence[dict[str, float]]
            ) -> dict[str, float]:
    """Medians and their ratios."""
    found: dict[str, float] = {}
    for what in ("seconds", "cpu"):
        one, other = (statistics.median(s[what] for s in samples) for samples in (plain, masked))
        found |= {f"plain {what}": one, f"masked {what}": other, f"{what} ratio": other / one}
    return found


# ---- the cipher ----------------------------------------------------------------------------------

def cpu_seconds(work: Callable[[], object], repetitions: int = 7) -> float:
    """Median CPU seconds of this thread, after one call to warm up."""
    work()
    found = []
    for _ in range(repetitions):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return statistics.median(found)


def rates(size: int = 1 << 26) -> dict[str, float]:
    """Bytes a CPU second of a keystream, and of a mask of one stream with its addition."""
    zeros, memory, key = memoryview(bytes(PIECE)), bytearray(PIECE + 15), bytes(range(32))
    vector = np.zeros(size // 4, np.int32)

    def stream(mode: Any) -> None:
        cipher = Cipher(algorithms.AES256(key), mode).encryptor()
        for _ in range(size // PIECE):
            cipher.update_into(zeros, memory)

    return {
        "keystream of AES-256-GCM, as masks are made": size / cpu_seconds(
            lambda: stream(modes.GCM(bytes(12)))),
        "keystream of AES-256-CTR": size / cpu_seconds(lambda: stream(modes.CTR(bytes(16)))),
        "a mask's stream, with its addition": size / cpu_seconds(
            lambda: Mask([(True, key)], 32).add_to(vector))}


# ---- Flower --------------------------------------------------------------------------------------

CLIENTS = 3
BOUND = 2.0**-6  # of an element of the vectors that both sum


def vectors(elements: int) -> np.ndarray:
    """(CLIENTS, elements) float32: updates, all within the bound."""
    normal = np.random.default_rng(0).standard_normal((CLIENTS, elements), np.float32)
    return (normal * np.float32(BOUND / 8)).clip(-BOUND, BOUND)


def ours(updates: np.ndarray, repetitions: int) -> dict[str, float]:
    """The mean of the updates from masked sums, in this process: CPU seconds of a client and of the
    sum, and its largest differences from the sum without masks and from the mean in float64."""
    clients, sums, size = [], [], updates.shape[1]
    config = resolve("fed_avg", {})
    assert isinstance(config, FederatedConfig)
    with tempfile.TemporaryDirectory(prefix="fedrun-benchmark-") as folder:
        identities = {name: Identity.create(Path(folder) / name) for name in NAMES[:CLIENTS]}
    sites = Sites(identities).agree()
    aggregator = ExactAggregator(config.strategy, size, torch.zeros(1), exact=True)
    total = aggregator.buffer
    for number in range(1, repetitions + 2):
        sent, plain = [], np.zeros(size + 1, np.int32)
        for session, update in zip(sites.sessions.values(), updates, strict=True):
            vector = torch.from_numpy(update)
            aggregator.begin(Bounds(BOUND))
            began = time.thread_time()
            aggregator.add({"delta": vector}, 1 / CLIENTS)
            made = time.thread_time() - began
            plain += aggregator.buffer.numpy()
            sent.append(aggregator.buffer.numpy().copy())
            began = time.thread_time()
            session.mask(number, "vector", 32).add_to(sent[-1])
            clients.append(made + time.thread_time() - began)
        began = time.thread_time()
        np.sum(sent, 0, np.int32, out=total.numpy())
        mean = torch.cat([aggregator.means(a, b, aggregator.total_weight())[0]["delta"].clone()
                          for _, a, b in aggregator.slices.own()])
        sums.append(time.thread_time() - began)
    return {"client": statistics.median(clients[CLIENTS:]), "sum": statistics.median(sums[1:]),
            "masks": float(np.abs(plain.astype(float) - total.numpy()).max()),
            "difference": difference(mean.numpy(), updates)}


def difference(mean: np.ndarray, updates: np.ndarray) -> float:
    """The largest between a mean of the updates and the one in float64."""
    return float(np.abs(mean - updates.mean(0, np.float64)).max())


def flower(updates: np.ndarray, repetitions: int) -> dict[str, dict[str, float]]:
    """Flower's numbers, by its clipping range."""
    with tempfile.TemporaryDirectory(prefix="fedrun-benchmark-") as name:
        file = Path(name) / "updates.npy"
        np.save(file, updates)
        command = [python_of("flower"), "-m", "tests.benchmarks.peers.flower_secagg",
                   str(file), str(repetitions)]
        with Ranks(command, 1) as side:
            return {label: side.ask(clip) for label, clip in (
                ("Flower, SecAgg+ as it is set", 0),
                ("Flower, clipped at the bound", BOUND))}


def peer_table(elements: int, repetitions: int) -> str:
    updates = vectors(elements)
    rows = {"fedrun": ours(updates, repetitions)} | flower(updates, repetitions)
    lines = [f"Mean of {CLIENTS} vectors of {elements:,}, in one process:\n",
             "| | a client (CPU s) | the sum (CPU s) | what masks change | largest difference "
             "from the mean in float64 |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {one['client']:.4f} | {one['sum']:.4f} | {one['masks']:g} "
              f"| {one['difference']:.1e} |" for name, one in rows.items()]
    return "\n".join(lines)


# ---- tables --------------------------------------------------------------------------------------

HEADER = """\
| sites | elements | plain (s) | masked (s) | ratio | plain, CPU s of a site | masked | ratio |
|---|---|---|---|---|---|---|---|"""


def row(sites: int, elements: int, found: dict[str, float]) -> str:
    cells = [f"{found[f'plain {what}']:.3f} | {found[f'masked {what}']:.3f} "
             f"| {found[f'{what} ratio']:.2f}" for what in ("seconds", "cpu")]
    return f"| {sites} | {elements:,} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--elements", type=int, default=27_000_000)
    parser.add_argument("--sums", type=int, default=20, help="of each kind")
    parser.add_argument("--loopback", action="store_true", help="no namespaces")
    parser.add_argument("--rate", help="what a site sends at most, between namespaces: 1gbit")
    parser.add_argument("--peer", action="store_true", help="also Flower's SecAgg+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    apart = not arguments.loopback and may_make_namespaces()
    if arguments.rate and not apart:
        parser.error("--rate: needs namespaces, which this user may not make")
    where = "network namespaces joined by virtual cables" if apart else "processes on the loopback"
    where += f" at {arguments.rate}" if apart and arguments.rate else ""
    load = os.getloadavg()[0]
    print(f"{machine()}; between {where}; load {load:.1f}\n\n"
          "| one core | GB a CPU second |\n|---|---|\n"
          + "\n".join(f"| {name} | {rate / 1e9:.1f} |" for name, rate in rates().items())
          + f"\n\n{HEADER}", flush=True)
    ratios: dict[int, dict[str, Any]] = {}
    for sites in arguments.sites:
        ratios[sites] = measure(sites, arguments.elements, arguments.sums, apart, arguments.rate)
        print(row(sites, arguments.elements, ratios[sites]), flush=True)
    if 3 in ratios:
        found = ratios[3]
        print(f"\nWith 3 sites {found['seconds ratio']:.2f} times the plain sum, in CPU time "
              f"{found['cpu ratio']:.2f} times; at most {BAR} is wanted.")
    if arguments.peer:
        print("\n" + peer_table(1_000_000, 7))


if __name__ == "__main__":
    main()
