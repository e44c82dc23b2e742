"""The slow line between namespaces that benchmarks use."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.support.namespaces import skip_or_fail, why_not
from tests.support.runs import ROOT
from tests.support.slow_line import (
    HEADER,
    bare_namespaces,
    enter,
    size_on_the_line,
    slow_line,
)

RATE, DELAY = 2e7, 0.02  # bits a second; seconds
SO_RCVBUFFORCE = 33  # of asm-generic/socket.h
LIMIT = 20  # seconds
TRIES = 20  # until nothing else has held up what is timed

Found = dict[str, int]  # the namespaces' processes, by address


@pytest.fixture(scope="module")
def may() -> None:
    reason = why_not("ip", "setpriv", "unshare")
    if not reason:
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR))
        except OSError as error:
            reason = f"no TUN devices: {error}"
    skip_or_fail(reason, "REQUIRE_SITES")


@pytest.fixture(scope="module")
def found(may: None) -> Iterator[Found]:
    with bare_namespaces(3) as holders:
        addresses = {holder: f"10.79.0.{place}" for place, holder in enumerate(holders, 1)}
        with slow_line(addresses, RATE, DELAY):
            yield {address: holder for holder, address in addresses.items()}


def socket_in(found: Found, address: str, kind: socket.SocketKind) -> socket.socket:
    """A socket of the namespace with this address, which it belongs to also in other threads."""
    made = []

    def make() -> None:
        enter(found[address])
        one = socket.socket(socket.AF_INET, kind)
        one.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 23)
        one.settimeout(LIMIT)
        one.bind((address, 0))
        made.append(one)

    beside(make).join(LIMIT)
    (one,) = made
    return one


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("one", "other"), [("10.79.0.1", "10.79.0.2"), ("10.79.0.3", "10.79.0.1")])
def test_there_and_back_takes_the_delay_twice(found: Found, one: str, other: str) -> None:
    with (closing(socket_in(found, one, socket.SOCK_DGRAM)) as here,
          closing(socket_in(found, other, socket.SOCK_DGRAM)) as there):
        took = []
        for _ in range(12):
            began = time.monotonic()
            here.sendto(b"there", there.getsockname())
            what, whence = there.recvfrom(100)
            assert whence == here.getsockname()
            there.sendto(what + b" and back", whence)
            assert here.recv(100) == b"there and back"
            took.append(time.monotonic() - began)
    assert 2 * DELAY <= min(took) < 2 * DELAY + 0.01


def test_packets_keep_their_order_and_the_rate(found: Found) -> None:
    """All arrive, and the last one when all have left at the rate, or a little later."""
    number, size = 400, 1400
    expected = number * size * 8 / RATE + DELAY
    with (closing(socket_in(found, "10.79.0.1", socket.SOCK_DGRAM)) as here,
          closing(socket_in(found, "10.79.0.2", socket.SOCK_DGRAM)) as there):
        def send() -> None:
            for place in range(number):  # beside headers of IP and UDP
                here.sendto(place.to_bytes(size - 28, "big"), there.getsockname())

        for _ in range(TRIES):
            began = time.monotonic()
            sending = beside(send)
            assert [int.from_bytes(there.recv(size), "big") for _ in range(number)] == [
                *range(number)]
            took = time.monotonic() - began
            sending.join(LIMIT)
            assert took >= expected
            if took < 1.05 * expected:
                return
    pytest.fail(f"{took:.3f} s at the {TRIES}th time; expected {expected:.3f}")


def test_streams_arrive_whole_at_the_rate_with_their_headers(found: Found) -> None:
    """Of two machines at once, neither of which takes the other's rate."""
    text = os.urandom(1_000_000)
    parts = len(text) / (1500 - 52)  # 20 bytes of IP, 32 of TCP with its time stamps
    least = (len(text) + 52 * parts) * 8 / RATE + DELAY
    for _ in range(TRIES):
        took = streamed(found, text, ("10.79.0.1", "10.79.0.3"), "10.79.0.2")
        assert len(took) == 2
        assert min(took) >= least
        if max(took) < 1.5 * least:  # windows grow over some round trips
            return
    pytest.fail(f"{took} s at the {TRIES}th time; expected {least:.3f}")


def streamed(found: Found, text: bytes, senders: Sequence[str], receiver: str) -> list[float]:
    """Send a text from each of these at once; when each has arrived as it was, in seconds."""
    took: list[float] = []
    with closing(socket_in(found, receiver, socket.SOCK_STREAM)) as there:
        where = there.getsockname()

        def send(address: str) -> None:
            with closing(socket_in(found, address, socket.SOCK_STREAM)) as here:
                here.connect(where)
                here.sendall(text)

        def receive(stream: socket.socket) -> None:
            arrived = bytearray()
            with closing(stream):
                while read := stream.recv(1 << 20):
                    arrived += read
            if arrived == text:
                took.append(time.monotonic() - began)

        there.listen()
        began = time.monotonic()
        threads = [beside(partial(send, address)) for address in senders]
        for _ in senders:
            stream, _ = there.accept()
            stream.settimeout(LIMIT)
            threads.append(beside(partial(receive, stream)))
        for thread in threads:
            thread.join(LIMIT)
    return took


def test_what_is_split_by_the_card_counts_with_all_its_headers() -> None:
    ip, tcp = bytes([0x45]) + bytes(19), bytes(12) + bytes([8 << 4]) + bytes(19)
    whole = HEADER.pack(0, 0, 0, 0, 0, 0) + ip + tcp + bytes(1000)
    assert size_on_the_line(whole) == 20 + 32 + 1000
    parts = HEADER.pack(1, 1, 52, 1448, 20, 16) + ip + tcp + bytes(3 * 1448 + 10)
    assert size_on_the_line(parts) == 4 * (20 + 32) + 3 * 1448 + 10


HOLDING = """
import time
from tests.support.slow_line import bare_namespaces, slow_line
with bare_namespaces(2) as holders, slow_line(
        {holder: f"10.79.1.{place}" for place, holder in enumerate(holders, 1)}, 1e6, 0.1) as relay:
    print(relay, *holders, flush=True)
    time.sleep(60)
"""


def test_nothing_is_left_where_its_process_is_killed(may: None) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDING], cwd=ROOT,
                          stdout=subprocess.PIPE) as killed:
        assert killed.stdout
        try:
            started = [psutil.Process(int(word)) for word in killed.stdout.readline().split()]
        finally:
            killed.kill()
    assert len(started) == 3
    deadline = time.monotonic() + LIMIT
    while any(map(lives, started)):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.02)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_nothing_is_left_after_the_block_or_of_one_that_cannot_be_made(may: None) -> None:
    with bare_namespaces(1) as (holder,):
        with slow_line({holder: "10.79.0.1"}, RATE, DELAY) as relay:
            with (pytest.raises(RuntimeError, match="the relay did not start"),
                  slow_line({holder: "10.79.0.2"}, RATE, DELAY)):
                pass
            assert psutil.pid_exists(relay)
        assert not psutil.pid_exists(relay)
        interfaces = Path(f"/proc/{holder}/net/dev").read_text()
        assert "eth0" not in interfaces
        assert "lo" in interfaces
