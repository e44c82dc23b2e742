"""The gradient of a local step with --dp example (DP-SGD; Abadi et al. 2016, Algorithm 1): each
sequence's clipped by itself, in integers, with noise.

The sum is of integers, so that one sequence moves it by no more than `ExampleLevel.sensitivity` in
whatever order it is made. Which sequences are in a step, and its noise, come from a secret key; the
noise is also bound to the integers that it is added to, and so is the next step's key. So no noise
is ever added to two sums, also where a step is computed again and comes out differently.

Every sequence is a batch of its own: exact for every model, whatever its layers are.
"""

from __future__ import annotations

import numpy as np
import torch

from fedrun.aggregation.clipping import clip_
from fedrun.aggregation.slices import norm
from fedrun.federation.client import Client
from fedrun.federation.site_keys import digest_of
from fedrun.model.base import Model
from fedrun.privacy.discrete_gaussian import Stream
from fedrun.privacy.example_level import ExampleLevel
from fedrun.training.params import FlatParams

WORD = 1 << 64


def poisson_sample(stream: Stream, batch_size: int, sequences: int) -> np.ndarray:
    """Positions of the sequences, of this many, that are in a step, ascending int64: each with the
    probability batch_size / sequences, cut off after 64 bits, and independently of the others."""
    words = np.frombuffer(stream.read(8 * sequences), "<u8")
    if batch_size == sequences:
        return np.arange(sequences)
    return np.flatnonzero(words < np.uint64(batch_size * WORD // sequences))


SLICE = 1 << 16  # elements that stay in the processor's cache


class PrivateGradient:
    """Makes the gradients of a worker's clients, one client after the other."""

    def __init__(self, level: ExampleLevel, flat: FlatParams) -> None:
        self.level, self.flat = level, flat
        self.key = b""
        """Of the next step, 32 bytes; `begin` sets that of the first."""
        self.norm = 0.0
        """Of the last gradient, with its noise."""
        self._sum = torch.zeros(flat.size, dtype=torch.int64, device=flat.vector.device)
        self._scale, self._sampler = level.scale, level.sampler

    def begin(self, key: bytes) -> None:
        """Take the key of a client's first step in a round."""
        self.key = key

    def write(self, model: Model, client: Client) -> None:
        """Write the gradient of the client's next step to flat.grad; also where no sequence is in
        it, which is noise alone."""
        from fedrun.secure.noise import BLOCK, NoiseKey, stream

        key = NoiseKey(self.key)
        chosen = poisson_sample(stream(key.round_key({"of": "sample"}), 0), self.level.batch_size,
                                len(client.shard))
        self._add_up(model, client, chosen)
        self.key = key.round_key({"of": "noise", "sum": digest_of(self._sum)})
        factor = 1 / (self._scale * self.level.batch_size)
        parts = zip(self._sum.split(BLOCK), self.flat.grad.split(BLOCK), strict=True)
        for block, (part, grad) in enumerate(parts):
            drawn = self._sampler.sample(stream(self.key, block), len(part))
            part.add_(torch.from_numpy(drawn).to(part.device))
            grad.copy_(part).mul_(factor)
        self.norm = norm(self.flat.grad)

    def _add_up(self, model: Model, client: Client, chosen: np.ndarray) -> None:
        """Sum the clipped gradients of these of the client's sequences, in grid steps; zeros for
        one that is not finite, of which nobody hears."""
        self._sum.zero_()
        for number in client.shard[chosen]:
            sequence = client.sequences[number:number + 1].astype(np.int64)
            model.compute_grad(client.on_device(sequence))
            clip_(self.flat.grad, self.level.clip)
            for part, grad in zip(self._sum.split(SLICE), self.flat.grad.split(SLICE), strict=True):
                part.add_(grad.mul_(self._scale).round_().long())
