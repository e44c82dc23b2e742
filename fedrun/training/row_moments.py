"""How large AdamW's second moment is in each row of a parameter: what clients average with
--client_moments average_rows.

A row is what the last dimension counts: of an embedding the numbers of one token, of a vector all
of it. Of v, corrected for its bias, a client reports one number for each row, and scales the row to
their mean over clients:

    s_k = sqrt(mean of v_k over the row);  S = sum_k p_k s_k / sum_k p_k;  v_k <- v_k (S / s_k)^2

So clients agree on how far AdamW moves a row, which depends on how often its token is in their
texts; within the row each keeps what it knows. Liu et al. (2025), "FedAdamW", arXiv:2510.27486,
average means of v over blocks, with which the next round begins in place of each element.

The moments of a client that was left out of a round are zeros again. It trains the next round
without scaling them, and scales them after the next average.

A row's v may shrink by that, and m does not: it is cut to what AdamW's could be beside such a v, as
where averages of whole moments are loaded, so no step is longer than its bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedrun.training.optimizer import LocalOptimizer, between
from fedrun.training.params import FlatParams, ParamSlice


def count_rows(flat: FlatParams, muon: bool) -> int:
    """Rows of the shared parameters that AdamW updates; with Muon these are not the matrices."""
    parts = between(flat) if muon else iter([slice(0, flat.size)])
    return sum(math.prod(one.shape[:-1]) for part in parts for one in _within(flat, part))


def row_roots(optimizer: LocalOptimizer) -> Tensor:
    """s_k after local training, (rows,): at most --grad_clip, but for rounding."""
    squares = torch.cat([rows.mean(1) for rows in _rows(optimizer)])
    return squares.div_(1 - optimizer.config.beta2**optimizer.steps).sqrt_()


def scale_rows(optimizer: LocalOptimizer, means: Tensor) -> None:
    """Scale second moments to S, (rows,), where it is not 0. A row of zeros gets S^2 everywhere; a
    client that has made no step stays as it is. Overwrites flat.grad."""
    steps = optimizer.steps
    if steps == 0:
        return
    corrected = 1 - optimizer.config.beta2**steps
    start = 0
    for rows in _rows(optimizer):
        wanted = means[start:start + len(rows), None]
        start += len(rows)
        given, own = wanted > 0, rows.mean(1, keepdim=True)
        # By the mean first: no quotient is larger than a row is long.
        rows.div_(torch.where(given & (own > 0), own, 1.0))
        rows.add_(torch.where(given & (own == 0), 1.0, 0.0))
        rows.mul_(torch.where(given, wanted.square() * corrected, 1.0))
    optimizer.cut_first_moment(steps)


def _rows(optimizer: LocalOptimizer) -> Iterator[Tensor]:
    """Of each shared parameter that AdamW updates its second moment, (rows, width): a view."""
    for part, squares in optimizer.shared_squares():
        for one in _within(optimizer.flat, part):
            width = one.shape[-1] if one.shape else 1
            yield squares[one.start - part.start:one.stop - part.start].view(-1, width)


def _within(flat: FlatParams, part: slice) -> Iterator[ParamSlice]:
    """The shared parameters in this part of the vector."""
    return (one for one in flat.slices
            if part.start <= one.start and one.stop <= min(part.stop, flat.shared_size))
