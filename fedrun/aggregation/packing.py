"""Sums of small integers as bytes: half a byte each for one client's, then one, then two."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 7
"""On either side of zero, of a client and of what is sent back: with zero they fit four bits."""
TYPES = {8: torch.int8, 16: torch.int16}
MOST = torch.iinfo(torch.int16).max // LEVELS  # clients whose sum fits the widest


def bits_of_sum(clients: int) -> int:
    """The bits in which the sum over this many clients is held and sent: 4 for one, 8, or 16."""
    assert clients <= MOST
    if clients <= 1:
        return 4
    return 8 if clients * LEVELS <= torch.iinfo(torch.int8).max else 16


def as_numbers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes, which may be a part of longer ones, as numbers of this type, copied."""
    # `contiguous` copies no single row, which may begin where no number of more bytes can.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Rows of integers, (rows, n), as bytes, (rows, n bits / 8)."""
    if bits != 4:
        return numbers.to(TYPES[bits]).view(torch.uint8)
    half = numbers.shape[1] // 2
    nibbles = (numbers + LEVELS).to(torch.uint8)
    return nibbles[:, :half] | (nibbles[:, half:] << 4)


def unpack(rows: Tensor, bits: int) -> Tensor:
    """The integers that `pack` has packed. The bytes may be a part of longer rows."""
    if bits != 4:
        return as_numbers(rows, TYPES[bits])
    return torch.cat([rows & 15, rows >> 4], 1).to(torch.int8).sub_(LEVELS)
