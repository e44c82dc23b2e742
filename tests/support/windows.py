"""A search for pieces of texts in what a run sends or writes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_HEAD = 8  # bytes by which a window is looked for first
_BITS = 22  # of a number that is made of them: places in a table that fits into a processor's cache
_AT_ONCE = 1 << 16  # bytes of a content


def windows(content: bytes, size: int, step: int = 1) -> set[bytes]:
    """All pieces of this many bytes that begin at a multiple of `step`."""
    return {content[at:at + size] for at in range(0, len(content) - size + 1, step)}


class Pieces:
    """Pieces of one size, to be looked for in many contents."""

    def __init__(self, wanted: Iterable[bytes]) -> None:
        self._pieces = frozenset(wanted)
        self._size = len(next(iter(self._pieces), b""))
        heads = b"".join({piece[:_HEAD] for piece in self._pieces})
        # Most places of a content are ruled out by one look into this table.
        self._likely = np.zeros(1 << _BITS, bool)
        self._likely[_place(np.frombuffer(heads, np.uint64))] = True

    def found(self, content: bytes) -> list[bytes]:
        """Those that are in the content, at any place."""
        if len(content) < _HEAD or not self._pieces:
            return []
        views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), _HEAD)
        there = set[bytes]()
        for begin in range(0, len(views), _AT_ONCE):
            heads = np.ascontiguousarray(views[begin:begin + _AT_ONCE]).view(np.uint64)[:, 0]
            for at in (begin + np.flatnonzero(self._likely[_place(heads)])).tolist():
                if (piece := content[at:at + self._size]) in self._pieces:
                    there.add(piece)
        return sorted(there)


def _place(heads: np.ndarray) -> np.ndarray:
    """Of each head in the table: the first bits of its product with a large odd number."""
    products: np.ndarray = heads * np.uint64(0x9E3779B97F4A7C15)
    return products >> np.uint64(64 - _BITS)
