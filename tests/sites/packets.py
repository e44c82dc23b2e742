"""Write down what passes through the interfaces of a machine: `python -m tests.sites.packets FILE`
does so until SIGTERM, and `read` reads it. Starts at once, since it imports little.

A packet socket sees every interface of its namespace, the loopback and the tunnel too, behind the
encryption and before it. FILE holds the packets from the IP header on, each after a header of ours,
and at its end how many the kernel had to drop.
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("<IHBB16s")  # length, protocol, type, nothing, interface
_LAST = 0xFFFFFFFF  # as a length: the protocol is the number of packets that were dropped
_ETH_P_ALL, _SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 3, 33, 263, 6
_KERNEL_BUFFER = 256 << 20  # bytes
_MOST = 4 << 30  # bytes in a file


def record(file: Path) -> None:
    """Write down all packets of this network namespace until SIGTERM."""
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: over.append(number))
    with file.open("wb") as out, socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)) as packets:
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KERNEL_BUFFER)
        packets.settimeout(0.1)
        print("listening", flush=True)
        buffer = bytearray(1 << 17)
        while out.tell() < _MOST:
            try:
                size, (interface, protocol, kind, *_) = packets.recvfrom_into(buffer)
            except TimeoutError:
                if over:
                    break
                continue
            out.write(_HEADER.pack(size, protocol, kind, 0, interface.encode()))
            out.write(memoryview(buffer)[:size])
        _, dropped = struct.unpack("II", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        out.write(_HEADER.pack(_LAST, min(dropped + (not over), 0xFFFF), 0, 0, b""))


def read(data: bytes, file: Path) -> Iterator[tuple[str, int, int, int]]:
    """Where each packet passed, its protocol, and where it begins and ends in the data, which is
    what the file holds. ValueError if the capture is not complete."""
    at = 0
    while at < len(data):
        size, protocol, kind, _, interface = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        if size == _LAST:
            if protocol:
                raise ValueError(f"{file}: {protocol} packets or more were dropped")
            return
        way = "out" if kind == socket.PACKET_OUTGOING else "in"
        yield f"{interface.rstrip(bytes(1)).decode()} {way}", protocol, at, at + size
        at += size
    raise ValueError(f"{file}: the capture was not ended")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
