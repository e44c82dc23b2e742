"""What passed through the interfaces of machines, and what was said there."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.sites.packets import read
from tests.support.namespaces import Machine
from tests.support.runs import wait_until

_IPV4, _IPV6, _TCP, _UDP = 0x0800, 0x86DD, 6, 17
_SYN = 2


@contextmanager
def captured(machines: Mapping[str, Machine], folder: Path) -> Iterator[dict[str, Path]]:
    """Write down what passes through these machines, each in a file of its own, until the end of
    the block."""
    files = {name: folder / f"{name}.packets" for name in machines}
    with ExitStack() as stack:
        started = {}
        for name, machine in machines.items():
            log = folder / f"{name}.capture.log"
            process = started[log] = machine.start(sys.executable, "-m", "tests.sites.packets",
                                                   files[name], log=log)
            stack.callback(_end, machine, files[name], process)
        for log in started:
            wait_until(lambda log=log: "listening" in log.read_text(), 20,  # type: ignore[misc]
                       log.read_text)
        yield files


def _end(machine: Machine, file: Path, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM for the reader itself: nsenter, which started it, does not hand signals on."""
    for reader in machine.processes:
        with suppress(psutil.NoSuchProcess):
            if reader.cmdline()[-1:] == [str(file)]:
                reader.terminate()
    process.wait(timeout=20)


@dataclass
class _Stream:
    """One direction of a TCP connection at one interface."""

    last: int
    """The newest segment's sequence number, and below: where that is in the stream."""
    position: int = 0
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """Position in the stream, in the file, and length."""

    def add(self, sequence: int, start: int, size: int) -> None:
        ahead = (sequence - self.last) & 0xFFFFFFFF
        self.position += ahead - (ahead >> 31 << 32)  # sequence numbers wrap
        self.last = sequence
        self.segments.append((self.position, start, size))

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What was said, in order and once; cut where something is missing."""
        parts: list[bytes] = []
        end: int | None = None
        for position, start, size in sorted(self.segments):
            if end is None or position > end:
                if parts:
                    yield b"".join(parts)
                parts, end = [], position
            if position + size > end:
                parts.append(data[start + end - position:start + size])
                end = position + size
        if parts:
            yield b"".join(parts)


def streams(file: Path) -> Iterator[tuple[str, bytes]]:
    """What a capture holds, by a name that tells where: each direction of a TCP connection as it
    was said, whatever the order and borders of its packets; of everything else the packets that go
    the same way one after the other, without headers.

    ValueError if the capture is not complete.
    """
    data = file.read_bytes()
    talks: dict[str, _Stream] = {}
    past: list[tuple[str, _Stream]] = []
    others: dict[str, list[bytes]] = {}
    for where, protocol, start, stop in read(data, file):
        what, source, target, begin, end = _of_ip(data, protocol, start, stop)
        if what != _TCP:
            name = f"{where} {source} > {target} protocol {protocol:#x} {what}"
            others.setdefault(name, []).append(data[begin + 8 * (what == _UDP):end])
            continue
        ports = struct.unpack_from(">HH", data, begin)
        name = f"{where} {source}:{ports[0]} > {target}:{ports[1]}"
        sequence, = struct.unpack_from(">I", data, begin + 4)
        first = begin + (data[begin + 12] >> 4) * 4
        if data[begin + 13] & _SYN:  # takes a number of its own; the ports may be used again
            sequence = (sequence + 1) & 0xFFFFFFFF
            if name in talks and talks[name].segments:
                past.append((name, talks.pop(name)))
        if name not in talks:
            talks[name] = _Stream(sequence)
        if first < end:
            talks[name].add(sequence, first, end - first)
    for name, stream in (*past, *talks.items()):
        for piece in stream.pieces(data):
            yield name, piece
    for name, parts in others.items():
        yield name, b"".join(parts)


def _of_ip(data: bytes, protocol: int, start: int, stop: int) -> tuple[int, str, str, int, int]:
    """What an IP packet carries (0: it is none), from where to where, its beginning and end.
    Fragments are taken for packets of an unknown kind."""
    if protocol == _IPV4:
        length, fragment = struct.unpack_from(">2xH2xH", data, start)
        source, target = (socket.inet_ntop(socket.AF_INET, data[start + at:start + at + 4])
                          for at in (12, 16))
        what = -1 if fragment & 0x3FFF else data[start + 9]
        end = start + length if length else stop
        return what, source, target, start + (data[start] & 15) * 4, min(end, stop)
    if protocol == _IPV6:
        source, target = (socket.inet_ntop(socket.AF_INET6, data[start + at:start + at + 16])
                          for at in (8, 24))
        return data[start + 6], source, target, start + 40, stop
    return 0, "", "", start, stop
