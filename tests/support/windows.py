"""A search for pieces of texts in what a run sends or writes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_HEAD = 8  # bytes by which a window is looked for first


def windows(content: bytes, size: int, step: int = 1) -> set[bytes]:
    """All pieces of this many bytes that begin at a multiple of `step`."""
    return {content[at:at + size] for at in range(0, len(content) - size + 1, step)}


def found(content: bytes, wanted: Iterable[bytes]) -> list[bytes]:
    """Those of the wanted pieces, of one size, that are in the content, at any place."""
    pieces = set(wanted)
    if len(content) < _HEAD or not pieces:
        return []
    size = len(next(iter(pieces)))
    views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), _HEAD)
    heads = np.frombuffer(b"".join({piece[:_HEAD] for piece in pieces}), np.uint64)
    places = np.flatnonzero(np.isin(np.ascontiguousarray(views).view(np.uint64)[:, 0], heads))
    return sorted({piece for at in places if (piece := content[at:at + size]) in pieces})
