"""Where do I run: device, network interface and process groups of this rank.

Topology: the control plane is a gloo group of all ranks; the data plane is one group of the worker
ranks, NCCL on GPUs and gloo on CPUs, and where workers of several machines share memory on each,
one of those that send. Rank 0 is the server; alone it is the one worker as well.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from fedrun.common.errors import FedrunError, InputError
from fedrun.common.limits import require_files, shortage
from fedrun.distributed.connect import (
    LOOPBACK,
    NotConnected,
    gather_all,
    listen,
    named,
    patiently,
    reach,
    serve,
    served_by_launcher,
)
from fedrun.distributed.control_plane import ControlPlane, Heartbeat
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import Launch, rendezvous
from fedrun.distributed.shared_memory import machine

# For all ranks to appear: schedulers start nodes unevenly.
STARTUP_TIMEOUT = timedelta(minutes=5)
SHORTEST_STARTUP = timedelta(minutes=1)  # whatever --timeout says: imports alone take seconds
# Workers wait longer than the server, whose message names who is lost.
GRACE = timedelta(seconds=20)


def device_index(launch: Launch, dedicated_server: bool, gpus: int) -> int | None:
    """The GPU of this process on its machine; None for a server that owns none.

    A dedicated server takes no GPU, so on its machine the workers' indices are one lower than
    their local ranks. Where the launcher shows each process one GPU only, that is number 0; two
    workers that were shown the same one are found by their UUIDs at the start.
    """
    server_here = dedicated_server and not launch.alone and launch.on_first_node
    if server_here and launch.local_rank == 0:
        return None
    index = launch.local_rank - int(server_here)
    workers = launch.local_world_size - int(server_here)
    if gpus == 1:
        return 0
    if index >= gpus:
        extra = int(server_here)
        raise InputError(
            f"--device cuda: {workers} workers but {gpus} GPUs on {socket.gethostname()}; start "
            f"{gpus + extra} processes here (--nproc-per-node {gpus + extra}): fewer workers host "
            "more clients each")
    return index


def choose_device(wanted: str, launch: Launch, dedicated_server: bool) -> torch.device:
    """The device of this process; ValueError where --device asks for one that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus == 0:
        raise InputError("--device cuda: no CUDA device is available here; accepted is cpu or auto")
    if wanted == "cpu" or gpus == 0:
        return torch.device("cpu")
    index = device_index(launch, dedicated_server, gpus)
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def interface_to(address: str) -> str | None:
    """The network interface that routes to an address (no packet is sent); None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            here = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(a.address == here for a in addresses)), None)


def choose_interfaces(launch: Launch, env: Mapping[str, str]) -> dict[str, str]:
    """Values for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME that the user has not set.

    Left alone, gloo binds to whatever the host name resolves to, often 127.0.1.1, which no other
    machine can reach. ValueError, naming the variable, where no route to MASTER_ADDR is found.
    """
    names = [n for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if n not in env]
    one_machine = launch.local_world_size == launch.world_size
    address = "127.0.0.1" if one_machine else env.get("MASTER_ADDR", "")
    interface = interface_to(address)
    if interface is None or (not one_machine and address_is_local_only(address)):
        if "GLOO_SOCKET_IFNAME" in names:
            raise InputError(f"GLOO_SOCKET_IFNAME: no network interface routes from "
                             f"{socket.gethostname()} to MASTER_ADDR={address}; set it to the "
                             "interface that connects the machines (`ip route` shows them)")
        return {}
    return dict.fromkeys(names, interface)


def address_is_local_only(address: str) -> bool:
    """Whether a host name resolves to loopback, which other machines cannot reach."""
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False


@dataclass(frozen=True)
class Runtime:
    """This process in the run: who it is, where it computes, whom it talks to."""

    launch: Launch
    device: torch.device
    workers: tuple[int, ...]
    """Ranks that host clients, in order."""
    control: ControlPlane
    data_plane: DataPlane

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def is_server(self) -> bool:
        return self.rank == 0

    @property
    def worker(self) -> int | None:
        """Index of this process among the workers; None for a dedicated server."""
        return self.workers.index(self.rank) if self.rank in self.workers else None


@contextmanager
def connect(launch: Launch, dedicated_server: bool, timeout: float) -> Iterator[ControlPlane]:
    """Connect all ranks; inside, they can talk. `timeout` in seconds bounds every later wait.

    Groups are taken down only after success: on an error peers may be gone, and a destructor that
    waits for them would hide the message.
    """
    if launch.alone:
        yield ControlPlane()
        return
    require_files(launch.world_size)
    os.environ.update(rendezvous(os.environ))
    os.environ.update(choose_interfaces(launch, os.environ))
    one_machine = launch.local_world_size == launch.world_size
    address = LOOPBACK if one_machine else os.environ["MASTER_ADDR"]
    port, by_launcher = int(os.environ["MASTER_PORT"]), served_by_launcher()
    bound = min(STARTUP_TIMEOUT, max(timedelta(seconds=timeout), SHORTEST_STARTUP))
    served = None
    if launch.rank == 0 and not by_launcher:
        served = serve(listen(address, port, one_machine), bound)
        address = served.host
    # torchrun restarts workers in place over the same store, which still holds the addresses of the
    # dead: every attempt gets a name space of its own.
    place = f"attempt{launch.attempt}"
    store, beside = (reach(address, port, bound, by_launcher) for _ in range(2))
    gather_all(PrefixStore(place, store), launch.rank, launch.world_size, bound)
    # A call that waits in a store keeps all others from it: the heartbeat has one of its own.
    beats = Heartbeat(PrefixStore(place, beside), launch.rank, launch.world_size)
    wait = timedelta(seconds=timeout) + (GRACE if launch.rank else timedelta())
    with making_groups(beats):
        # all ranks, in this order
        dist.init_process_group("gloo", store=PrefixStore(place, store), rank=launch.rank,
                                world_size=launch.world_size, timeout=bound)
        control = ControlPlane(dist.new_group(backend="gloo", timeout=wait), beats, wait,
                          first_worker=int(dedicated_server))
    try:
        yield control
    except Exception as error:
        control.fail(error)
        raise
    control.close()
    dist.destroy_process_group()
    del served  # alive until here


@contextmanager
def making_groups(beats: Heartbeat | None) -> Iterator[None]:
    """All ranks wait for each other inside; who is missed is named, at the end and while it lasts.
    """
    def unresponsive() -> list[int]:
        return beats.unresponsive() if beats else []

    def what() -> str:
        gone = unresponsive()
        first = next((r for r in range(beats.world_size) if r not in gone), 0) if beats else 0
        return (f"for {named(gone)}, which shows no sign of life"
                if gone and beats and beats.rank == first else "")

    try:
        with patiently(what):
            yield
    except RuntimeError as error:
        if why := shortage(error):
            raise NotConnected(why) from None
        gone = unresponsive()
        who = f"no sign of life from {named(gone)}" if gone else "some did not answer"
        raise NotConnected(f"the ranks could not be connected: {who} "
                           f"({str(error).splitlines()[0]})") from None


def build_runtime(launch: Launch, device: torch.device, control: ControlPlane, identity: Mapping[str, str]
         ) -> Runtime:
    """All ranks: compare what has to be equal, and make the data plane.

    `identity` is what must be equal on all ranks (digests of config, versions, corpus); entries
    whose name begins with "worker" need to be equal on the workers only.
    """
    if launch.alone:
        return Runtime(launch, device, (0,), control, DataPlane())
    workers = tuple(range(control.first_worker, launch.world_size))
    compare(control, workers, device, identity)
    # A server without a GPU is no member, so what it names as backend does not matter.
    with making_groups(control.beats):
        data = dist.new_group(list(workers), backend="nccl" if device.type == "cuda" else "gloo",
                              timeout=control.timeout)
    plane = DataPlane(data, None if device.type == "cuda" else machine()
                      ) if launch.rank in workers else DataPlane()
    known = control.gather({"senders": [workers[w] for w in plane.node_leaders],
                            "blind on": socket.gethostname() if plane.cannot_map else ""})
    senders = control.share(known and known[control.first_worker]["senders"])
    for host in sorted({rank["blind on"] for rank in known or []} - {""}):
        print(f"fedrun: warning: workers on {host} cannot map each other's memory, and send, which "
              "is slower", flush=True)
    if 1 < len(senders) < len(workers):  # all ranks make it, members or not
        with making_groups(control.beats):
            plane.inter_node_group = dist.new_group(senders, control.timeout, "gloo")
    return Runtime(launch, device, workers, control, plane)


def compare(control: ControlPlane, workers: tuple[int, ...], device: torch.device,
            identity: Mapping[str, str]) -> None:
    """All ranks: end with one message if they were not started alike, or share a GPU."""
    gpu = {"gpu": str(torch.cuda.get_device_properties(device).uuid),
           "gpus here": str(torch.cuda.device_count())} if device.type == "cuda" else {}
    mine = {**identity, "worker device": device.type, "host": socket.gethostname(), **gpu}
    everyone = control.gather(mine)
    message = "" if everyone is None else difference(everyone, workers)
    message = control.share(message)
    if message:
        raise FedrunError(message)
    if everyone is not None:
        for warning in idle_gpus(everyone):
            print(f"fedrun: warning: {warning}", flush=True)


def difference(everyone: list[dict[str, str]], workers: tuple[int, ...]) -> str:
    """What keeps these ranks from training together, in one line; empty if nothing does."""
    for name in everyone[workers[0]]:
        if name in ("host", "gpu", "gpus here"):
            continue
        ranks = workers if name.startswith("worker") else range(len(everyone))
        values = {rank: everyone[rank].get(name) for rank in ranks}
        if len(set(values.values())) > 1:
            return f"ranks differ in {name}: {values}; start all with the same command and install"
    owner: dict[str, int] = {}
    for rank in workers:
        gpu = everyone[rank].get("gpu")
        if gpu is not None and owner.setdefault(gpu, rank) != rank:
            gpus = everyone[rank]["gpus here"]
            return (f"ranks {owner[gpu]} and {rank} were given the same GPU {gpu} on "
                    f"{everyone[rank]['host']}, which has {gpus}: start one worker per GPU "
                    f"(and the server), fewer workers host more clients each")
    return ""


def idle_gpus(everyone: list[dict[str, str]]) -> list[str]:
    """A line for each machine that has GPUs which no worker uses."""
    used: dict[str, int] = {}
    seen: dict[str, int] = {}
    for rank in everyone:
        if "gpu" in rank:
            used[rank["host"]] = used.get(rank["host"], 0) + 1
            seen[rank["host"]] = max(seen.get(rank["host"], 0), int(rank["gpus here"]))
    return [f"{seen[host] - used[host]} of {seen[host]} GPUs on {host} are idle: raise "
            f"--nproc-per-node by {seen[host] - used[host]} to use them"
            for host in used if seen[host] > max(1, used[host])]
