"""What must not be there is found where it is planted, and nowhere else."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from tests.sites.capture import streams
from tests.sites.search import Search, files, windows

SECRET = b"The patient in room 14 has asked for her letters, and for the cat to be fed at noon."


def packet(source: str, target: str, sequence: int, said: bytes, flags: int = 0x10,
           protocol: int = 6, padding: bytes = b"") -> bytes:
    """An IPv4 packet as the kernel would show it, with TCP's options, or of another protocol."""
    (here, port), (there, to) = (end.split(":") for end in (source, target))
    carried = struct.pack(">HHIIBBHHH", int(port), int(to), sequence % 2**32, 0, 8 << 4, flags, 0,
                          0, 0) + bytes(12) + said if protocol == 6 else bytes(8) + said
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(carried), 0, 0, 64, protocol, 0,
                       socket.inet_aton(here), socket.inet_aton(there)) + carried + padding


def write_capture(file: Path, packets: list[bytes], dropped: int = 0, ended: bool = True) -> Path:
    header = "<IHBB16s"
    with file.open("wb") as out:
        for one in packets:
            out.write(struct.pack(header, len(one), 0x0800, 0, 0, b"fedrun") + one)
        if ended:
            out.write(struct.pack(header, 0xFFFFFFFF, dropped, 0, 0, b""))
    return file


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@pytest.mark.parametrize("first", [1000, 2**32 - 700])
def test_a_stream_is_whole_whatever_its_packets(first: int, tmp_path: Path) -> None:
    """Cut anywhere, sent twice with other borders, in another order, past the highest number."""
    said = random_bytes(3000) + SECRET + random_bytes(3000, 1)
    rng = random.Random(first)
    cuts = sorted({0, len(said), *(rng.randrange(len(said)) for _ in range(400))})
    pieces = [(a, said[a:b]) for a, b in itertools.pairwise(cuts)]
    pieces += [(at, said[at:at + 90]) for at in range(0, len(said), 300)]
    rng.shuffle(pieces)
    way = ("10.88.0.2:40000", "10.88.0.1:29500")
    back = ("10.88.0.1:29500", "10.88.0.2:40000")
    file = write_capture(tmp_path / "capture", [
        packet(*way, first - 1, b"", flags=2),
        *(one for at, piece in pieces for one in (packet(*way, first + at, piece, padding=b"pad"),
                                                  packet(*back, 7 + at, b"yes")))])
    there = {name: data for name, data in streams(file) if len(data) > 10}
    assert there == {"fedrun in 10.88.0.2:40000 > 10.88.0.1:29500": said}


def test_streams_that_must_not_run_together(tmp_path: Path) -> None:
    """Something missing, and a second connection between the same ports."""
    way = ("10.0.0.1:5", "10.0.0.2:6")
    file = write_capture(tmp_path / "capture", [
        packet(*way, 99, b"", flags=2), packet(*way, 100, b"one "), packet(*way, 104, b"two"),
        packet(*way, 110, b"four"), packet(*way, 49, b"", flags=2), packet(*way, 50, b"again"),
        packet("10.0.0.1:0", "10.0.0.2:0", 0, b"data", protocol=17),
        packet("10.0.0.1:0", "10.0.0.2:0", 0, b"gram", protocol=17)])
    assert [said for _, said in streams(file)] == [b"one two", b"four", b"again", b"datagram"]


def test_a_capture_with_gaps_of_its_own_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 packets or more were dropped"):
        list(streams(write_capture(tmp_path / "capture", [], dropped=3)))
    with pytest.raises(ValueError, match="not ended"):
        list(streams(write_capture(tmp_path / "capture", [], ended=False)))


@pytest.mark.parametrize("size", [16, 24, 64])
def test_as_many_as_a_plain_search_finds(size: int) -> None:
    """Against `in`, on data of few different bytes, which has many windows by chance."""
    rng = np.random.default_rng(size)
    searched = windows(rng.integers(0, 256, 2400, np.uint8).tobytes(), size, 12)
    search = Search()
    assert search.add("thing", searched) == len({bytes(one) for one in searched})
    data = bytearray(rng.bytes((2 << 20) + 9999))
    for one in searched[::7]:
        at = int(rng.integers(len(data) - size))
        data[at:at + size] = bytes(one)
    border = (1 << 21) - size // 2  # between two of the pieces that are looked through
    data[border:border + size] = bytes(searched[1])
    data[:size], data[-size:] = bytes(searched[2]), bytes(searched[3])
    found = sum(bytes(one) in data for one in {bytes(one) for one in searched})
    assert found > len(searched) / 8
    assert search.find(bytes(data)) == {"thing": found}
    assert search.find(bytes(data[1:-1])) == {"thing": found - 2}
    assert search.find(random_bytes(1 << 20, 9)) == search.find(b"short") == {}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_tokens_terms_text_and_paths(dtype: type[np.generic], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 400, 500).astype(dtype)
    term = rng.normal(0, 1e-3, 3000).astype(np.float32)
    search = Search()
    assert search.add("tokens", windows(tokens, 8 * tokens.itemsize, tokens.itemsize)) > 470
    assert search.add("term", windows(term, 64, 64)) > 180
    assert search.add("text", windows(SECRET, 24, 1)) > 50
    assert search.add("path", windows(b"/srv/north/texts/letters.txt", 24, 1)) == 5
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"xyz" + tokens[100:108].tobytes() + random_bytes(99))
    (tmp_path / "b").write_bytes(random_bytes(5) + term.tobytes()[1001:1001 + 127])
    (tmp_path / "c").write_bytes(term.tobytes()[:63] + SECRET[:23] + tokens[:7].tobytes())
    (tmp_path / "srv-north-texts-letters.txt").write_text(SECRET.decode().upper())
    assert search.find_in(files(tmp_path)) == {"deep/a": {"tokens": 1}, "b": {"term": 1}}
    (tmp_path / SECRET[:40].decode()).touch()
    assert search.find_in(files(tmp_path))["names"] == {"text": 17}


def test_windows_that_say_nothing_or_are_public() -> None:
    search = Search()
    assert search.add("term", windows(np.array([0, 1, 0, -1] * 100, np.int32), 64, 4)) == 0
    assert search.find(bytes(5000)) == {}
    search.add("text", windows(SECRET, 24, 1))
    search.forget(b"All know that the cat to be fed at noon. Is it ours?")
    assert search.find(SECRET[-27:]) == {}
    assert search.find(SECRET[:30]) == {"text": 7}


@pytest.mark.slow
def test_a_large_capture_is_searched_in_time() -> None:
    """A megabyte of text and twenty of terms in 100 MB: 500 MB in a minute of a processor."""
    search = Search()
    search.add("text", windows(random_bytes(1 << 20), 24, 1))
    search.add("term", windows(random_bytes(20 << 20, 1), 64, 64))
    data = random_bytes(100 << 20, 2)
    began = time.process_time()
    assert search.find(data) == {}
    assert time.process_time() - began < 12
