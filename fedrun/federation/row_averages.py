"""With --client_moments average_rows: the mean over a cohort of how large clients' second moments
are in each row of a parameter (see training/row_moments.py), beside the sum of their updates.

    rows.begin(averages)                # whether this round averages them
    rows.scale(client)                  # before its training: to the last means
    left_out = rows.take(client)        # after it
    rows.add(weight)                    # unless it is left out
    rows.reduce(secure)                 # workers <-> workers
    rows.renew(total_weight)

No number exceeds --grad_clip, so the grid is known before training: integers are summed, and the
means have the same bits in any world. Rounding changes each client's number by half a step of the
grid at most. An integer has 32 bits if all clients of a cohort together lose no more than half of
--eps by it, since AdamW adds --eps to each root. Otherwise it has 64 bits, as in float64 and where
weights are not known ahead. Where a mean is 0, clients leave the row as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedrun.aggregation.slices import max_abs
from fedrun.common.errors import require
from fedrun.config import FederatedConfig
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.federation.secure_sum import ROWS, SecureSum
from fedrun.training.params import FlatParams
from fedrun.training.row_moments import count_rows, row_roots, scale_rows

ROOM = 1 + 2**-10  # for rounding, above --grad_clip; the grid has room for twice as much


class RowAverages:
    """A worker's part of it. Between `begin` and `renew` it does nothing in rounds that do not
    average rows."""

    def __init__(self, config: FederatedConfig, flat: FlatParams, plane: DataPlane) -> None:
        assert config.grad_clip is not None, "checked with the config"
        self._clip, self._plane = config.grad_clip, plane
        count = count_rows(flat, config.local_optimizer == "muon")
        require(count > 0, "--personal", config.personal, "fewer names with --client_moments "
                "average_rows: AdamW updates nothing that clients share")
        headroom = config.strategy.weight_headroom
        largest = headroom + math.ceil(math.log2(self._clip))  # of a sum, in bits
        narrow = (flat.vector.dtype == torch.float32 and not headroom
                  and config.cohort_size * 2.0 ** (largest - 30) <= config.eps)
        self._type, self._bits = (torch.int32, 32) if narrow else (torch.int64, 64)
        self._grid = 2.0 ** (self._bits - 2 - largest)
        self._buffers = plane.allocate(count, self._type, flat.vector.device)
        self._reduced = self._buffers
        self.means = plane.replicated(flat.vector.new_zeros(count))
        """The last means, (rows,), the same on every worker, and part of the global state; 0 before
        the first."""
        self._roots, self._averages = self.means, False

    @property
    def buffer(self) -> Tensor:
        """The sum over this worker's clients so far, (rows,)."""
        return self._buffers[self._plane.node_rank]

    @property
    def bytes_sent(self) -> int:
        """Payload of this round for a worker that sends; as much comes back."""
        return self.buffer.nbytes if self._averages else 0

    def begin(self, averages: bool) -> None:
        """Start a round."""
        self._averages = averages
        self.buffer.zero_()

    def scale(self, client: Client) -> None:
        """Scale the second moments of a client that is about to train."""
        scale_rows(client.optimizer, self.means)

    def take(self, client: Client) -> str:
        """Take what a client that has trained reports; why it is left out, or an empty string."""
        if not self._averages:
            return ""
        self._roots = row_roots(client.optimizer)
        peak = max_abs(self._roots)
        if not math.isfinite(peak):
            return "second moment not finite"
        return "second moment exceeds --grad_clip" if peak > ROOM * self._clip else ""

    def add(self, weight: float) -> None:
        """Add what was taken last, times the client's weight."""
        if self._averages:
            terms = torch.mul(self._roots, weight * self._grid).round_()
            self.buffer.add_(terms.to(self._type))

    def reduce(self, secure: SecureSum | None) -> None:
        """Workers: sum over all of them."""
        if self._averages:
            self._reduced = self._plane.reduce(
                self._buffers, None if secure is None else secure.mask(ROWS, self._bits))

    def renew(self, weight: float) -> None:
        """Workers: write this one's section of the means, for this total weight. The others' are
        done after the next barrier."""
        if self._averages:
            mine = self._plane.section(len(self.means))
            total = torch.stack([part[mine.start:mine.stop] for part in self._reduced]).sum(
                0, dtype=self._type)
            self.means[mine.start:mine.stop] = total.to(self.means.dtype).div_(self._grid * weight)
