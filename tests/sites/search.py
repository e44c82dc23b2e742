"""Search for many things at once in much data: every window of what must not be there, at every
byte of what is looked through.

A window of the data is a candidate if two tables have the hash of its first 16 bytes, and found if
the 64-bit hash of all of it is known. By numpy alone: 500 MB take half a minute of a processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np

_PREFIX = 16  # bytes
_CHUNK = 1 << 21  # bytes
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
                 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3],
                np.uint64)
_FEWEST_VALUES = 4
"""Of the first 16 bytes of a window. With fewer it says nothing: such windows are everywhere."""


def windows(data: bytes | np.ndarray, size: int, step: int) -> np.ndarray:
    """The windows of `size` bytes that begin at every `step` bytes of the data, (n, size) uint8."""
    raw = np.frombuffer(data if isinstance(data, bytes) else data.tobytes(), np.uint8)
    if len(raw) < size:
        return np.empty((0, size), np.uint8)
    return np.lib.stride_tricks.sliding_window_view(raw, size)[::step]


class Search:
    """Looks for windows of some kinds."""

    def __init__(self) -> None:
        self._hashes: dict[str, np.ndarray] = {}
        self._sizes: dict[str, int] = {}
        self._prefixes = np.empty(0, np.uint64)
        self._tables: list[np.ndarray] = []

    def add(self, kind: str, found: np.ndarray) -> int:
        """Look for these windows too, (n, size) uint8, with size a multiple of 8 from 16 on, the
        same for all of a kind. Returns how many of them are new and can be told from noise."""
        size = self._sizes.setdefault(kind, found.shape[1])
        assert found.shape[1] == size >= _PREFIX
        assert size % 8 == 0
        sorted_bytes = np.sort(found[:, :_PREFIX], axis=1)
        values = 1 + (sorted_bytes[:, 1:] != sorted_bytes[:, :-1]).sum(axis=1)
        words = np.ascontiguousarray(found[values >= _FEWEST_VALUES]).view("<u8")
        before = self._hashes.get(kind, np.empty(0, np.uint64))
        self._hashes[kind] = np.union1d(before, _hash(words))
        self._prefixes = np.union1d(self._prefixes, _hash(words[:, :_PREFIX // 8]))
        self._tables = []
        return len(self._hashes[kind]) - len(before)

    def forget(self, public: bytes) -> None:
        """Look no more for what is in this data, which anybody may know."""
        for kind, found in self._found(public):
            self._hashes[kind] = np.setdiff1d(self._hashes[kind], found)

    def find(self, data: bytes) -> dict[str, int]:
        """How many different windows of each kind are in the data; kinds without any are left
        out."""
        found: dict[str, np.ndarray] = {}
        for kind, hashes in self._found(data):
            found[kind] = np.union1d(found.get(kind, np.empty(0, np.uint64)), hashes)
        return {kind: len(hashes) for kind, hashes in sorted(found.items())}

    def find_in(self, named: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, int]]:
        """`find` in each, by its name; those without anything are left out. What has been looked
        through before, as what arrives after what was sent, is not again."""
        known: dict[bytes, dict[str, int]] = {}
        there = {}
        for name, data in named:
            digest = sha256(data).digest()
            if digest not in known:
                known[digest] = self.find(data)
            if known[digest]:
                there[name] = known[digest]
        return there

    def _found(self, data: bytes) -> Iterator[tuple[str, np.ndarray]]:
        """The hashes of the windows that are in the data, by kind, piece by piece."""
        longest = max(self._sizes.values(), default=_PREFIX)
        bits = max(16, len(self._prefixes).bit_length() + 4)
        shift = np.uint64(64 - bits)
        if not self._tables:
            for hashes in (self._prefixes, self._prefixes * _ODD[-1]):
                self._tables.append(np.zeros(1 << bits, bool))
                self._tables[-1][hashes >> shift] = True
        first, second = self._tables
        for begin in range(0, len(data), _CHUNK):
            chunk = data[begin:begin + _CHUNK + longest - 1]
            raw = np.frombuffer(chunk, np.uint8)
            for offset in range(8):
                words = np.frombuffer(chunk[offset:len(chunk) - (len(chunk) - offset) % 8], "<u8")
                if len(words) < _PREFIX // 8:
                    continue
                prefixes = words[:-1] * _ODD[0]
                prefixes += words[1:] * _ODD[1]
                places = np.flatnonzero(first[prefixes >> shift])
                places = places[second[(prefixes[places] * _ODD[-1]) >> shift]]
                candidates = places * 8 + offset
                for kind, known in self._hashes.items():
                    size = self._sizes[kind]
                    starts = candidates[candidates + size <= len(raw)]
                    if len(starts) and len(known):
                        there = raw[starts[:, None] + np.arange(size)].view("<u8")
                        hashes = _hash(there)
                        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                        if len(hits := hashes[known[at] == hashes]):
                            yield kind, np.unique(hits)


def _hash(words: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of words, (n, w) -> (n,); its highest bits are the best."""
    total = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        total += words[:, column] * _ODD[column % 8]
        if column % 2:  # the first two words alone are the table's hash
            total = total if column == 1 else (total ^ (total >> np.uint64(29))) * _ODD[2]
    return total


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All files below a folder, and as one more the names of all of them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    yield "names", "\n".join(str(path.relative_to(folder)) for path in paths).encode()
    for path in paths:
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
