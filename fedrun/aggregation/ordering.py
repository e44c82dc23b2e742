"""What a robust rule makes of rows of integers, each row a client's: element by element, and exact,
so that no result depends on an order of clients or on who computed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW_BITS = 15
"""A grid step's lower bits. The upper ones, with the sign, are 16 of 32 bits: products of either
with either are at most 2^30 in size, and a float64 adds up 2^22 of them exactly."""


def in_order(rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows' elements in ascending order: of all rows' elements at a place, the k-th row of the
    result has the k-th smallest.

    By neighbours that change places (odd-even transposition, Knuth 1998, "Sorting and Searching",
    section 5.3.4): as many steps as there are rows, each a minimum and a maximum of whole rows.
    That is many times faster than torch's sort of so few numbers.
    """
    found = list(rows)
    for step in range(len(found)):
        for k in range(step % 2, len(found) - 1, 2):
            found[k], found[k + 1] = (torch.minimum(found[k], found[k + 1]),
                                      torch.maximum(found[k], found[k + 1]))
    return found


def trimmed_mean(rows: Sequence[Tensor], cut: int) -> tuple[Tensor, list[Tensor]]:
    """The mean of the rows, element by element, without the `cut` lowest and the `cut` highest,
    rounded to integers; and of each row how many of its elements, 0-dim, were not cut off. One that
    is equal to the last that is taken was not."""
    if not cut:
        return rounded_mean(rows), [torch.tensor(row.numel()) for row in rows]
    ordered = in_order(rows)
    lowest, highest = ordered[cut], ordered[-1 - cut]
    taken = [((row >= lowest) & (row <= highest)).sum() for row in rows]
    return rounded_mean(ordered[cut:len(rows) - cut]), taken


def rounded_mean(rows: Sequence[Tensor]) -> Tensor:
    """The mean of rows of at most 2^30 in size, as integers of 64 bits; halves to the even one."""
    total = torch.stack(list(rows)).sum(0, dtype=torch.int64)
    return (total.double() / len(rows)).round().long()


def products(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs of rows, each row cut into its upper and its lower bits first:
    (2 rows, 2 rows), of 64 bits, the upper parts first. Such sums over parts of the rows can be
    added up: of 2^32 elements they fit."""
    whole = torch.stack(list(rows))
    parts = torch.cat([whole >> LOW_BITS, whole & ((1 << LOW_BITS) - 1)]).double()
    return (parts @ parts.T).long()


def squared_distances(found: Sequence[Sequence[int]]) -> list[list[int]]:
    """The squared distance between each two of the rows, from their `products`."""
    count = len(found) // 2

    def product(i: int, j: int) -> int:
        upper, lower = found[i], found[count + i]
        return ((upper[j] << 2 * LOW_BITS) + ((upper[count + j] + lower[j]) << LOW_BITS)
                + lower[count + j])

    return [[product(i, i) + product(j, j) - 2 * product(i, j) for j in range(count)]
            for i in range(count)]
