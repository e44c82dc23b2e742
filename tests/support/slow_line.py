"""A slow and long line between network namespaces: a rate and a delay, where tc has no netem.

    with (bare_namespaces(2) as (one, other),
          slow_line({one: "10.79.0.1", other: "10.79.0.2"}, rate=1e9, delay=0.025)): ...

Each namespace has an interface eth0, a TUN device, whose other end is a file of one process, the
relay. It reads packets, looks at where they go, and writes them there `delay` seconds after they
have left. A namespace sends no faster than `rate`: its packets leave one after the other, and as
long as AHEAD seconds of them wait, the relay reads no more of them, so that they queue in the
kernel and the sender is held back, as by a network card of that rate. So nothing is lost, and each
sender's packets keep their order.

Interfaces have the MTU of Ethernet, but the kernel hands over TCP's packets as it does to a card
that splits them itself, up to 64 KB at a time (TUN_F_TSO4, with a virtio_net_hdr before each, see
linux/if_tun.h and linux/virtio_net.h). They count as the packets that they would be split into. So
Python is fast enough: 1 Gbit/s takes a third of a core.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

AHEAD = 0.02  # seconds of packets that a sender has beyond its own queue
HEADER = struct.Struct("=BBHHHH")  # virtio_net_hdr: flags, type, length of headers, of a part, ...
LARGEST = HEADER.size + 65_535  # of what is read at once
MTU = 1500
# Of linux/sched.h and linux/if_tun.h.
CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02


@contextmanager
def bare_namespaces(count: int) -> Iterator[list[int]]:
    """Network namespaces with a loopback alone, for the time of the block; yields the processes
    that hold them. They end with these, and these with this one."""
    with ExitStack() as stack:
        holders = []
        for _ in range(count):
            holder = stack.enter_context(subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sh", "-c",
                 "ip link set lo up && echo ready && exec sleep infinity"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
            stack.callback(holder.kill)
            assert holder.stdout
            assert holder.stdout.readline() == b"ready\n"
            holders.append(holder.pid)
        yield holders


def within(holder: int, *command: object) -> None:
    """Run a command, which must not fail, in the namespace of this process."""
    subprocess.run(["nsenter", f"--net=/proc/{holder}/ns/net", *map(str, command)],
                   check=True, timeout=10)


@contextmanager
def slow_line(addresses: Mapping[int, str], rate: float, delay: float) -> Iterator[int]:
    """An interface eth0 in each namespace, all of them at one line, for the time of the block;
    yields the ID of the relay, which ends with the block and with this process, however it ends.

    addresses: of one /24, by a process in the namespace, which has no eth0 yet. rate: bits a second
    that each sends at most, IP headers included. delay: seconds one way. Needs root.
    """
    command = json.dumps({"addresses": list(addresses.items()), "rate": rate, "delay": delay})
    with subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", sys.executable, "-I", "-S", __file__, command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as relaying:
        try:
            assert relaying.stdout
            if relaying.stdout.readline() != b"ready\n":
                raise RuntimeError("the relay did not start; its message is above")
            yield relaying.pid
        finally:
            relaying.kill()


# ---- the relay -----------------------------------------------------------------------------------

def enter(process: int) -> None:
    """Move this thread to the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{process}/ns/net", "rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace of process {process}")


def open_end(address: str) -> int:
    """Make eth0 in the namespace of this thread; the file of its other end."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", b"eth0", flags))
    fcntl.ioctl(end, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    for words in (f"addr add {address}/24 dev eth0", f"link set eth0 mtu {MTU} up"):
        subprocess.run(["ip", *words.split()], check=True, timeout=10)
    return end


def size_on_the_line(packet: bytes) -> int:
    """Bytes that a packet takes there, with the headers of all parts that it would be split into.
    packet: with the virtio_net_hdr before it."""
    kind: int
    part: int
    tcp: int
    _, kind, _, part, tcp, _ = HEADER.unpack_from(packet)
    size = len(packet) - HEADER.size
    if not kind:
        return size
    headers = tcp + 4 * (packet[HEADER.size + tcp + 12] >> 4)  # IP's, and TCP's by its data offset
    parts = math.ceil((size - headers) / part)
    return size + (parts - 1) * headers


def relay(ends: Sequence[int], places: Mapping[bytes, int], rate: float, delay: float) -> None:
    """Until this process is killed. places: the index of the end for an address of four bytes;
    packets to others, and those of IPv6, are dropped."""
    left = dict.fromkeys(ends, 0.0)  # when the last packet of each end has left
    empty = set(ends)  # nothing was waiting there after that
    under_way: dict[int, deque[tuple[float, int, bytes]]] = {end: deque() for end in ends}
    while True:
        now = time.monotonic()
        for queue in under_way.values():
            while queue and queue[0][0] <= now:
                _, there, packet = queue.popleft()
                os.write(there, packet)
        open_ends = [end for end in ends if left[end] - now < AHEAD]
        ready = select.select(open_ends, [], [], 0)[0]
        empty |= {end for end in open_ends if end not in ready}
        for end in ready:
            packet = os.read(end, LARGEST)
            place = places.get(packet[HEADER.size + 16:HEADER.size + 20])
            if packet[HEADER.size] >> 4 != 4 or place is None:
                continue
            # One that was waiting sets out when the last has left, also if this process is late.
            begins = max(left[end], time.monotonic()) if end in empty else left[end]
            empty.discard(end)
            left[end] = begins + 8 * size_on_the_line(packet) / rate
            under_way[end].append((left[end] + delay, ends[place], packet))
        if not ready:
            times = [queue[0][0] for queue in under_way.values() if queue]
            times += [left[end] - AHEAD for end in ends if end not in open_ends]
            pause = max(0.0, min(times) - time.monotonic()) if times else None
            select.select(open_ends, [], [], pause)


def main() -> None:
    given = json.loads(sys.argv[1])
    ends, places = [], {}
    for place, (process, address) in enumerate(given["addresses"]):
        enter(process)
        ends.append(open_end(address))
        places[socket.inet_aton(address)] = place
    print("ready", flush=True)
    relay(ends, places, given["rate"], given["delay"])


if __name__ == "__main__":
    main()
