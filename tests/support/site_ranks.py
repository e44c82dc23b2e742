"""Ranks of a run of several sites: python -m tests.support.site_ranks WHAT SIZES MACHINES.

SIZES: the number of workers of each site, such as 4,2,1, which have the ranks after the server's in
this order. MACHINES: of how many the ranks pretend to be. All are connected as in a run. WHAT:

sums      vectors and words, with and without masks, and who can read whose memory
stranger  the last rank has not the key of its site, and goes on as if it were not refused
silent    rank 2 never says hello
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from functools import reduce
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import chisquare
from torch import Tensor

from fedrun.common.errors import FedrunError
from fedrun.distributed import runtime
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.handshake import Proof, prove
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime, build_runtime, connect
from fedrun.secure.identity import Identity
from fedrun.secure.masks import Session
from tests.support.every_plane import signed
from tests.support.handshakes import RUN, Stranger, identity_of
from tests.support.sites import NAMES

SIZE = 70_003
TYPES = (torch.int32, torch.int64)
WORDS = [1, -1, -(1 << 62), (1 << 63) - 1, 1 << 63]


def site_names(sizes: list[int]) -> list[str]:
    """The site of each rank."""
    return ["", *(name for name, size in zip(NAMES, sizes, strict=False) for _ in range(size))]


def proof_of(rank: int, sizes: list[int]) -> Proof:
    names = site_names(sizes)
    pinned = {name: identity_of(name).public for name in dict.fromkeys(names[1:])}
    return Proof(identity_of(names[rank]), names[rank], pinned, identity_of("").public,
                 "" if rank else RUN)


def term(worker: int, dtype: torch.dtype, number: int) -> Tensor:
    """What a worker adds: small numbers, but for one, so that the sum is nearly as large as fits,
    and its bytes are anything but uniform."""
    made = torch.Generator().manual_seed(100 * number + worker)
    vector = torch.randint(-1000, 1000, (SIZE,), generator=made, dtype=dtype)
    vector[worker] = torch.iinfo(dtype).max - 1000 * (worker + 20)
    return vector


def exchange(message: Any) -> list[Any]:
    """All ranks: what each of them says."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, message)
    return found


def sessions(joined: Runtime, identity: Identity, name: str) -> Session | None:
    """All ranks: keys of the leaders."""
    membership = joined.control.membership
    assert membership is not None
    leads = joined.rank in membership.leaders.values()
    pinned = {site: identity_of(site).public for site in membership.leaders}
    session = Session(name, identity, pinned) if leads else None
    said = exchange(session and session.nonce)
    nonces = {site: said[rank] for site, rank in membership.leaders.items()}
    said = exchange(session and session.offer(membership.run, nonces, b"plan"))
    if session is not None:
        session.agree({site: said[rank] for site, rank in membership.leaders.items()})
    return session


class Spy:
    """Copies of all vectors that this process gives to a collective between sites."""

    def __init__(self, plane: DataPlane) -> None:
        self.seen = list[Tensor]()
        healthy = dist.all_reduce

        def all_reduce(vector: Tensor, *arguments: Any, **others: Any) -> Any:
            if plane.leaders_group is not None and others["group"] is plane.leaders_group:
                self.seen.append(vector.clone())
            return healthy(vector, *arguments, **others)

        patched: Any = dist
        patched.all_reduce = all_reduce

    def take(self) -> list[Tensor]:
        taken, self.seen = self.seen, []
        return taken


def uniform(vector: Tensor) -> bool:
    """Chi-square over the bytes at each place of an element."""
    width = vector.dtype.itemsize
    raw = vector.numpy().view(np.uint8).reshape(-1, width)
    return all(chisquare(np.bincount(raw[:, place], minlength=256)).pvalue > 1e-9
               for place in range(width))


def sums(joined: Runtime, sizes: list[int], machines: int) -> None:
    plane, names = joined.data_plane, site_names(sizes)
    name = names[joined.rank]
    session = sessions(joined, identity_of(name), name)
    spy = Spy(plane)
    if joined.worker is not None:
        assert plane.site_leader == (session is not None)
        check_vectors(joined, plane, session, spy, names)
        check_words(joined, plane, session, spy, names)
    check_memory(joined, names, machines)
    for site in dict.fromkeys(names[1:]):  # while all others do something else
        if name == site:
            alone_in_its_site(plane)
        exchange(None)
    assert spy.take() == []


def added(vectors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, vectors)


def check_vectors(joined: Runtime, plane: DataPlane, session: Session | None, spy: Spy,
                  names: list[str]) -> None:
    assert joined.worker is not None
    everybody = range(len(names) - 1)
    site = [w for w in everybody if names[1 + w] == names[joined.rank]]
    for number, dtype in enumerate(TYPES, 1):
        parts = plane.allocate(SIZE, dtype, torch.device("cpu"))
        assert len(parts) == len(plane.node_workers)
        expected, of_site = (added(term(w, dtype, number) for w in workers)
                             for workers in (everybody, site))
        for masked in (False, True):
            parts[plane.node_rank].copy_(term(joined.worker, dtype, number))
            mask, before = None, plane.bytes_sent
            if session is not None and masked:
                mask = session.mask(number, "vector", 8 * dtype.itemsize)
            assert torch.equal(added(plane.reduce(parts, mask)), expected), (masked, dtype)
            assert plane.bytes_sent - before == sent(plane, parts[0].nbytes)
            if session is not None:
                seen, = spy.take()
                assert torch.equal(seen, of_site) != masked
                assert uniform(seen) == masked
            plane.barrier()  # until here the others may read the result


def sent(plane: DataPlane, nbytes: int) -> int:
    """What a worker of a site sends for one vector of the site's."""
    if plane.node_rank:
        return 0
    places = len(plane.node_leaders)
    return nbytes * ((places > 1) + (2 if places > 1 else 1) * plane.site_leader)


def check_words(joined: Runtime, plane: DataPlane, session: Session | None, spy: Spy,
                names: list[str]) -> None:
    def wrapped(workers: Iterable[int]) -> list[int]:
        return signed([sum(word + w for w in workers) for word in WORDS])

    assert joined.worker is not None
    everybody = range(len(names) - 1)
    site = [w for w in everybody if names[1 + w] == names[joined.rank]]
    for masked in (False, True):
        mask = session.mask(9, "tail", 64) if session is not None and masked else None
        found = plane.sum_words([word + joined.worker for word in WORDS], mask)
        assert found == wrapped(everybody)
        if session is not None:
            seen, = spy.take()
            assert all((a == b) != masked
                       for a, b in zip(seen.tolist(), wrapped(site), strict=True))


def check_memory(joined: Runtime, names: list[str], machines: int) -> None:
    """All ranks: workers share memory if they are of one site and one machine, and no others."""
    plane = joined.data_plane
    kept = plane.allocate(1 << 16, torch.int32, torch.device("cpu")) if joined.worker is not None \
        else ()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        inodes = {line.split()[4] for line in maps if "memfd:fedrun" in line}
    everyone = exchange((names[joined.rank], joined.rank % machines, inodes))
    for rank, (name, machine, mapped) in enumerate(everyone):
        for other, (others_name, others_machine, others_mapped) in enumerate(everyone):
            together = rank != other and name != "" and (name, machine) == (
                others_name, others_machine)
            assert rank == other or bool(mapped & others_mapped) == together, (rank, other)
    exchange(len(kept))  # until all have looked


def alone_in_its_site(plane: DataPlane) -> None:
    """Workers of one site, while the others wait for something else."""
    for _ in range(3):
        plane.barrier()
    vector = torch.arange(10.0)
    copy = plane.replicated(vector)
    plane.write(copy, vector + 1)
    mine = plane.section(10)
    copy[mine.start:mine.stop] += 1
    plane.barrier()
    assert torch.equal(copy, vector + 2)


def tell(control: ControlPlane) -> None:
    """The server's first words of a run."""
    control.share({"plan": "a secret plan"})
    control.share_vector(torch.full((1000,), 7.0) if control.rank == 0 else None, 1000,
                         torch.float32)


def stranger(control: ControlPlane) -> None:
    """The last rank, which does not end when it is refused."""
    told: list[Any] = []
    assert control.heartbeat is not None
    control.heartbeat.stop()  # which would end this process soon after the server
    try:
        told += [control.share(), control.share_vector(None, 1000, torch.float32)]
    except FedrunError as error:
        sys.stdout.write(f"stranger was told {told}: {error}\n")


def main() -> None:
    what, sizes, machines = sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3])
    torch.set_num_threads(1)
    launch = detect(os.environ)
    rank, last, healthy = launch.rank, launch.rank == launch.world_size - 1, prove
    proof, timeout, changed = proof_of(rank, sizes), 60.0, dict[str, Any]()
    changed["machine_id"] = lambda: 1 + rank % machines
    if what == "silent":
        timeout = 4.0
        if rank == 2:
            changed["prove"] = lambda *_: time.sleep(30)
    if what == "stranger" and last:
        proof = Stranger(identity_of("mallory"), proof.name, proof.sites, proof.server, "")

        def deaf(control: ControlPlane, proof: Proof, attempt: str) -> None:
            try:
                healthy(control, proof, attempt)
            except FedrunError as error:
                sys.stdout.write(f"rank {rank}: {error}\n")

        changed["prove"] = deaf
    began = time.monotonic()
    try:
        with (patch.multiple(runtime, **changed),
              connect(launch, True, timeout, proof) as control):
            if what == "stranger" and last:
                stranger(control)
                return
            if what != "sums":
                tell(control)
                return
            joined = build_runtime(launch, torch.device("cpu"), control, {})
            sums(joined, sizes, machines)
    except FedrunError as error:
        sys.stdout.write(f"rank {rank}: {error}\n")
        sys.exit(3)
    if rank == 0:
        sys.stdout.write(f"all the same, after {time.monotonic() - began:.1f} s\n")


if __name__ == "__main__":
    main()
