"""Device, network interface and process groups of this rank.

Topology: the control plane is a gloo group of all ranks. The data plane is a group of all workers,
NCCL on GPUs and gloo on CPUs; if workers share memory on several machines, there is also a group of
the first worker of each. If workers belong to several sites, each site has these groups for itself,
and the first workers of all sites have one: no other vector leaves a site. Rank 0 is the server; in
a run of one process it is the only worker too.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from fedrun.common.errors import FedrunError, InputError, one_line
from fedrun.common.limits import require_files, shortage
from fedrun.common.log import WARNING, log
from fedrun.distributed.comparison import compare
from fedrun.distributed.connect import (
    LOOPBACK,
    NoAnswer,
    NotConnected,
    answered,
    connecting_late,
    explain_wait,
    listen,
    named,
    port_of,
    prefix_of,
    reach,
    serve,
    served_by_launcher,
    wait_for_all,
)
from fedrun.distributed.control_plane import ControlPlane, Heartbeat, UnresponsiveRanks
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.handshake import HandshakeFailed, Membership, Proof, prove
from fedrun.distributed.launch import Launch, rendezvous
from fedrun.distributed.shared_memory import machine_id
from fedrun.distributed.waiting import wait_for_reason

# For all ranks to connect: schedulers start machines at different times.
STARTUP_TIMEOUT = timedelta(minutes=5)
SHORTEST_STARTUP = timedelta(minutes=1)  # whatever --timeout is: imports alone take seconds
# Workers time out later than the server: its message, which names the lost rank, must come first.
EXTRA_WORKER_TIMEOUT = timedelta(seconds=20)
SECONDS_FOR_NAME = 5.0  # after which the server has told who is silent


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
def connect(launch: Launch, dedicated_server: bool, timeout: float, proof: Proof | None = None
            ) -> Iterator[ControlPlane]:
    """All ranks: connect them for the time of the block. `timeout` (seconds) limits every wait in
    it. proof: of who this rank is, if the run has several owners.

    Groups are destroyed only after success: after an error other ranks may be gone, and a
    destructor that waits for them would hide the message.

    Raises:
        NotConnected: the ranks did not find each other.
        HandshakeFailed: somebody is not who they say, or did not say it in time.
        InputError: MASTER_ADDR, MASTER_PORT or GLOO_SOCKET_IFNAME is missing or wrong.
    """
    assert proof is None or dedicated_server
    if launch.alone:
        if proof is not None:
            raise InputError("--site_dir: a run of several sites has a process of the server, rank "
                             "0, and some of each site; start them with `python -m "
                             "fedrun.torchrun` on every node")
        yield ControlPlane()
        return
    require_files(launch.world_size)
    os.environ.update(rendezvous(os.environ))
    os.environ.update(choose_interfaces(launch, os.environ))
    one_machine = launch.local_world_size == launch.world_size
    address = LOOPBACK if one_machine else os.environ["MASTER_ADDR"]
    port, by_launcher = port_of(os.environ["MASTER_PORT"]), served_by_launcher()
    bound = min(STARTUP_TIMEOUT, max(timedelta(seconds=timeout), SHORTEST_STARTUP))
    served = None
    if launch.rank == 0 and not by_launcher:
        served = serve(listen(address, port, one_machine), bound)
        address = served.host
    # torchrun restarts ranks in place with the same store, which still holds the addresses of the
    # dead ones: each attempt uses keys of its own.
    # So does each run of a program that trains several times.
    prefix = prefix_of(launch, next(_connections))
    # The heartbeat has its own connection: a call that waits in a store blocks all other calls.
    store, heartbeat_store = (reach(address, port, bound, by_launcher) for _ in range(2))
    wait_for_all(PrefixStore(prefix, store), launch.rank, launch.world_size, bound)
    heartbeat = Heartbeat(PrefixStore(prefix, heartbeat_store), launch.rank, launch.world_size)
    wait = timedelta(seconds=timeout) + (EXTRA_WORKER_TIMEOUT if launch.rank else timedelta())
    with creating_groups(heartbeat):
        with connecting_late():  # all ranks, in this order; nothing is sent in the first group
            dist.init_process_group("gloo", store=PrefixStore(prefix, store), rank=launch.rank,
                                    world_size=launch.world_size, timeout=bound)
            control = ControlPlane(dist.new_group(backend="gloo", timeout=wait), heartbeat, wait,
                                   first_worker=int(dedicated_server))
        longer = EXTRA_WORKER_TIMEOUT if launch.rank else timedelta()  # the server says it first
        answered(control.meet, bound + longer, control.peer_failed)
    try:
        if proof is not None:
            control.membership = _membership(control, proof, prefix)
        yield control
    except Exception as error:
        control.fail(error)
        atexit.register(control.close)  # a program may catch the error and go on
        raise
    control.close()
    dist.destroy_process_group()
    del served  # must live until here


def _membership(control: ControlPlane, proof: Proof, attempt: str) -> Membership:
    """All ranks: `prove`. HandshakeFailed also if a rank does not answer, or not in words; then
    the others read the reason in the store, since no message would reach all of them."""
    heartbeat = control.heartbeat
    assert heartbeat is not None
    try:
        return answered(lambda: prove(control, proof, attempt), 5 * control.timeout,
                        control.peer_failed)
    except HandshakeFailed:
        raise
    except NoAnswer as error:
        raise HandshakeFailed(heartbeat.reason or f"the handshake failed: {error}") from None
    except (RuntimeError, ValueError, MemoryError) as error:
        line = f"the handshake failed: rank {control.rank}: {one_line(error)}"
        if control.rank and isinstance(error, UnresponsiveRanks):
            # Where one connection is lost all are, and the server looks for who is silent.
            wait_for_reason(control, SECONDS_FOR_NAME)
        else:
            heartbeat.report_failure(line)
            time.sleep(2 * Heartbeat.SECONDS)  # this rank may serve the store
        raise HandshakeFailed(heartbeat.reason or line) from error


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
    sites, host = control.membership, host_name(launch, control)
    compare(control, workers, device, identity, host, of_sites=sites is not None)
    # The workers that sum among themselves first: all, or those of each site.
    teams = [workers] if sites is None else [sites.workers_of(site) for site in sites.leaders]
    # A collective's error is raised where it is waited for. By default a thread of torch's watches
    # over NCCL, and aborts the process before the ranks that are lost could be named.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # A dedicated server is not a member, so the backend that it names does not matter.
    backend = "nccl" if device.type == "cuda" else "gloo"
    plane, mine = DataPlane(), next((team for team in teams if launch.rank in team), None)
    with creating_groups(control.heartbeat):  # all ranks, members or not, in this order
        groups = [dist.new_group(list(team), control.timeout, backend) for team in teams]
        leaders = None if sites is None else dist.new_group([*sites.leaders.values()],
                                                            control.timeout, "gloo")
    if mine is not None:
        plane = DataPlane(groups[teams.index(mine)],
                          None if device.type == "cuda" else machine_id(), control,
                          of_site=sites is not None)
        plane.leaders_group = leaders if plane.site_leader else None
        probe(plane, device)
    reports = control.gather({"leaders": [mine[w] for w in plane.node_leaders] if mine else [],
                              "cannot map on": host if plane.cannot_map else ""})
    senders = control.share(reports and [reports[team[0]]["leaders"] for team in teams])
    for place in sorted({report["cannot map on"] for report in reports or []} - {""}):
        log(f"workers on {place} cannot map each other's memory and use all-reduce, which is "
            "slower", WARNING)
    with creating_groups(control.heartbeat):  # all ranks, members or not, in this order
        for team, first in zip(teams, senders, strict=True):
            if 1 < len(first) < len(team):
                made = dist.new_group(first, control.timeout, "gloo")
                plane.inter_node_group = made if team == mine else plane.inter_node_group
    return Runtime(launch, device, workers, control, plane)


def host_name(launch: Launch, control: ControlPlane) -> str:
    """What the others call this machine: by its site, if the run has several owners."""
    if control.membership is not None:
        return control.membership.host(launch.rank, launch.local_rank)
    return socket.gethostname()


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
