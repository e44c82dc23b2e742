"""Device, network interface and process groups of this rank.

Topology: the control plane is a gloo group of all ranks. The data plane is a group of all workers,
NCCL on GPUs and gloo on CPUs; if workers share memory on several machines, there is also a group of
the first worker of each. Rank 0 is the server; in a run of one process it is the only worker too.
"""

from __future__ import annotations

import atexit
import itertools
import json
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
from fedrun.common.log import WARNING, log
from fedrun.distributed.connect import (
    LOOPBACK,
    NotConnected,
    answered,
    explain_wait,
    listen,
    named,
    reach,
    serve,
    served_by_launcher,
    wait_for_all,
)
from fedrun.distributed.control_plane import ControlPlane, Heartbeat, UnresponsiveRanks
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import Launch, rendezvous
from fedrun.distributed.shared_memory import machine_id

# For all ranks to connect: schedulers start machines at different times.
STARTUP_TIMEOUT = timedelta(minutes=5)
SHORTEST_STARTUP = timedelta(minutes=1)  # whatever --timeout is: imports alone take seconds
# Workers time out later than the server: its message, which names the lost rank, must come first.
EXTRA_WORKER_TIMEOUT = timedelta(seconds=20)


def device_index(launch: Launch, dedicated_server: bool, gpus: int) -> int | None:
    """The GPU of this process on its machine; None for a dedicated server, which uses no GPU.

    On the server's machine the workers' indices are therefore one lower than their local ranks. If
    the launcher makes only one GPU visible to each process, its index is 0; two workers with the
    same GPU are detected by its UUID at startup (`difference`).

    Raises:
        InputError: there are more workers than GPUs on this machine.
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
            f"{gpus + extra} processes here (--nproc-per-node {gpus + extra}), each worker then "
            "hosts more clients")
    return index


def choose_device(wanted: str, launch: Launch, dedicated_server: bool) -> torch.device:
    """The device of this process. InputError if --device asks for one that is not available."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus == 0:
        raise InputError("--device cuda: no CUDA device is available here; must be cpu or auto")
    if wanted == "cpu" or gpus == 0:
        return torch.device("cpu")
    index = device_index(launch, dedicated_server, gpus)
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def interface_to(address: str) -> str | None:
    """The network interface that routes to an address; None if unknown. Sends no packet."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            here = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(a.address == here for a in addresses)), None)


def choose_interfaces(launch: Launch, env: Mapping[str, str]) -> dict[str, str]:
    """Values for those of GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME that the user has not set.

    By default gloo binds to the address of the host name, often 127.0.1.1, which no other machine
    can reach. InputError, naming the variable, if no interface routes to MASTER_ADDR.
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
    # NCCL takes the name for a prefix, ib1 for ib10 too, unless it begins with "=".
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: chosen[name] for name in names}


def address_is_local_only(address: str) -> bool:
    """Whether a host name resolves to loopback, which other machines cannot reach."""
    try:
        return socket.gethostbyname(address).startswith("127.")
    except OSError:
        return False


_connections = itertools.count()  # of this process, and so of every rank


@dataclass(frozen=True)
class Runtime:
    """This process in the run: its rank, its device and its communication with the other ranks."""

    launch: Launch
    device: torch.device
    workers: tuple[int, ...]
    """The ranks that host clients, in order."""
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
    """All ranks: connect them for the time of the block. `timeout` (seconds) limits every wait in
    it.

    Groups are destroyed only after success: after an error other ranks may be gone, and a
    destructor that waits for them would hide the message.

    Raises:
        NotConnected: the ranks did not find each other.
        InputError: MASTER_ADDR, MASTER_PORT or GLOO_SOCKET_IFNAME is missing or wrong.
    """
    if launch.alone:
        yield ControlPlane()
        return
    require_files(launch.world_size)
    os.environ.update(rendezvous(os.environ))
    os.environ.update(choose_interfaces(launch, os.environ))
    one_machine = launch.local_world_size == launch.world_size
    address = LOOPBACK if one_machine else os.environ["MASTER_ADDR"]
    port, by_launcher = _port(os.environ["MASTER_PORT"]), served_by_launcher()
    bound = min(STARTUP_TIMEOUT, max(timedelta(seconds=timeout), SHORTEST_STARTUP))
    served = None
    if launch.rank == 0 and not by_launcher:
        served = serve(listen(address, port, one_machine), bound)
        address = served.host
    # torchrun restarts ranks in place with the same store, which still holds the addresses of the
    # dead ones: each attempt uses keys of its own.
    # So does each run of a program that trains several times.
    prefix = f"attempt{launch.attempt}.{next(_connections)}"
    # The heartbeat has its own connection: a call that waits in a store blocks all other calls.
    store, heartbeat_store = (reach(address, port, bound, by_launcher) for _ in range(2))
    wait_for_all(PrefixStore(prefix, store), launch.rank, launch.world_size, bound)
    heartbeat = Heartbeat(PrefixStore(prefix, heartbeat_store), launch.rank, launch.world_size)
    wait = timedelta(seconds=timeout) + (EXTRA_WORKER_TIMEOUT if launch.rank else timedelta())
    with creating_groups(heartbeat):
        # all ranks, in this order
        dist.init_process_group("gloo", store=PrefixStore(prefix, store), rank=launch.rank,
                                world_size=launch.world_size, timeout=bound)
        control = ControlPlane(dist.new_group(backend="gloo", timeout=wait), heartbeat, wait,
                               first_worker=int(dedicated_server))
    try:
        yield control
    except Exception as error:
        control.fail(error)
        atexit.register(control.close)  # a program may catch the error and go on
        raise
    control.close()
    dist.destroy_process_group()
    del served  # must live until here


def _port(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"MASTER_PORT {text}: must be a port number from 1 to 65535") from None


@contextmanager
def creating_groups(heartbeat: Heartbeat | None) -> Iterator[None]:
    """All ranks wait for each other in the block. Messages name the missing ranks during the wait,
    and so does the NotConnected that is raised when it times out."""
    def unresponsive() -> list[int]:
        return heartbeat.unresponsive() if heartbeat else []

    def what() -> str:
        gone = unresponsive()
        alive = [r for r in range(heartbeat.world_size if heartbeat else 0) if r not in gone]
        first = bool(alive) and heartbeat is not None and heartbeat.rank == alive[0]
        return f"for {named(gone)}, which has no heartbeat" if gone and first else ""

    try:
        with explain_wait(what):
            yield
    except RuntimeError as error:
        if why := shortage(error):
            raise NotConnected(why) from None
        gone = unresponsive()
        who = f"no heartbeat from {named(gone)}" if gone else "some did not answer"
        raise NotConnected(f"the ranks could not be connected: {who} "
                           f"({str(error).splitlines()[0]})") from None


def build_runtime(launch: Launch, device: torch.device, control: ControlPlane,
                  identity: Mapping[str, str]) -> Runtime:
    """All ranks: check that they match, and create the data plane.

    identity: what must be equal on all ranks (digests of config, versions, corpus). Entries whose
    name starts with "worker" must be equal on the workers only. FedrunError if they are not, or if
    two workers use the same GPU.
    """
    if launch.alone:
        return Runtime(launch, device, (0,), control, DataPlane())
    workers = tuple(range(control.first_worker, launch.world_size))
    compare(control, workers, device, identity)
    # A collective's error is raised where it is waited for. By default a thread of torch's watches
    # over NCCL, and aborts the process before the ranks that are lost could be named.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # A dedicated server is not a member, so the backend that it names does not matter.
    with creating_groups(control.heartbeat):
        data = dist.new_group(list(workers), backend="nccl" if device.type == "cuda" else "gloo",
                              timeout=control.timeout)
    plane = DataPlane()
    if launch.rank in workers:
        plane = DataPlane(data, None if device.type == "cuda" else machine_id(), control)
        probe(plane, device)
    reports = control.gather({"leaders": [workers[w] for w in plane.node_leaders],
                              "cannot map on": socket.gethostname() if plane.cannot_map else ""})
    leaders = control.share(reports and reports[control.first_worker]["leaders"])
    for host in sorted({report["cannot map on"] for report in reports or []} - {""}):
        log(f"workers on {host} cannot map each other's memory and use all-reduce, which is slower",
            WARNING)
    if 1 < len(leaders) < len(workers):
        with creating_groups(control.heartbeat):  # all ranks, members or not
            plane.inter_node_group = dist.new_group(leaders, control.timeout, "gloo")
    return Runtime(launch, device, workers, control, plane)


def probe(plane: DataPlane, device: torch.device) -> None:
    """Workers: whether they can sum vectors, before any of them trains. FedrunError, naming the
    device, if not."""
    library = "NCCL" if device.type == "cuda" else "gloo"
    said = f"for {library} to connect the workers" if plane.worker == 0 else ""
    try:
        with explain_wait(lambda: said):
            # In a thread: connecting has no timeout of its own in NCCL.
            wrong = answered(lambda: plane.probe(device), STARTUP_TIMEOUT)
            why = wrong and f"{wrong} is wrong"
    except (UnresponsiveRanks, torch.AcceleratorError):  # the latter is of this rank's own GPU
        raise
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    if why:
        advice = "; NCCL_DEBUG=WARN shows more" if device.type == "cuda" else ""
        raise FedrunError(f"--device {device.type}: {library} failed between the workers, on "
                          f"{device} of {socket.gethostname()}: {why}{advice}")


def compare(control: ControlPlane, workers: tuple[int, ...], device: torch.device,
            identity: Mapping[str, str]) -> None:
    """All ranks: raise the same FedrunError if ranks do not match, or if two use the same GPU."""
    # Not on a machine whose GPUs are none of this run's business: asking for them opens them.
    seen = gpus_seen() if identity.get("--device") != json.dumps("cpu") else []
    gpu = {"gpu": seen[device.index], "gpus here": str(len(seen))} if device.type == "cuda" else {}
    mine = {**identity, "worker device": device.type, "host": socket.gethostname(), **gpu,
            "gpus seen": " ".join(seen)}
    everyone = control.gather(mine)
    message = "" if everyone is None else difference(everyone, workers)
    message = control.share(message)
    if message:
        raise FedrunError(message)
    if everyone is not None:
        for warning in idle_gpus(everyone):
            log(warning, WARNING)


def gpus_seen() -> list[str]:
    """The UUIDs of the GPUs that this process may use, by index. A dedicated server uses none, and
    sees those that its launcher has given to it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = (torch.device("cuda", index) for index in range(count))
    return [str(torch.cuda.get_device_properties(device).uuid) for device in devices]


def difference(everyone: list[dict[str, str]], workers: tuple[int, ...]) -> str:
    """Why these ranks cannot train together, in one line; empty if they can."""
    for name in everyone[workers[0]]:
        if name in ("host", "gpu", "gpus here", "gpus seen"):
            continue
        ranks = workers if name.startswith("worker") else range(len(everyone))
        values = {rank: everyone[rank].get(name) for rank in ranks}
        if len(set(values.values())) > 1:
            return (f"ranks differ in {name}: {values}; use the same command and the same "
                    "installation on all ranks")
    owner: dict[str, int] = {}
    for rank in workers:
        gpu = everyone[rank].get("gpu")
        if gpu is not None and owner.setdefault(gpu, rank) != rank:
            gpus = everyone[rank]["gpus here"]
            return (f"ranks {owner[gpu]} and {rank} use the same GPU {gpu} on "
                    f"{everyone[rank]['host']}, which has {gpus}: start one worker per GPU (and "
                    "the server); each worker then hosts more clients")
    return ""


def idle_gpus(everyone: list[dict[str, str]]) -> list[str]:
    """A warning for each machine with GPUs that no worker uses, if workers use GPUs at all."""
    used: dict[str, set[str]] = {}  # by host
    seen: dict[str, set[str]] = {}
    for rank in everyone:
        used.setdefault(rank["host"], set()).update({rank["gpu"]} if "gpu" in rank else ())
        seen.setdefault(rank["host"], set()).update(rank["gpus seen"].split())
    found = []
    for host in seen if any(used.values()) else ():
        idle, there = seen[host] - used[host], len(seen[host])
        if idle == {everyone[0]["gpus seen"]}:  # as srun --gpus-per-task 1 gives them out
            found.append(f"1 of {there} GPUs on {host} is idle, the only one that the server sees: "
                         "--server colocated uses it")
        elif idle:
            found.append(f"{len(idle)} of {there} GPUs on {host} are idle: raise --nproc-per-node "
                         f"by {len(idle)} to use them")
    return found
