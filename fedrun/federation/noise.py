"""--dp client on the workers: noise that hides each client in a round's sum, which nobody sees
without it. (That of --dp example is in sequence_noise.py.)

Every worker adds the noise of some blocks of elements to its own term, in whole steps of the grid.
The sum of integers is the same whoever adds them, so bits do not depend on the processes. The first
worker makes the keys of the noise, and notes what was released: see noise_keeper.py.

    noise.clip(client, update)                  # for each client, after its training
    noise.add_to(aggregator, plan, model)       # workers <-> workers; before the sum
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.clipping import clip_
from fedrun.aggregation.exact import ExactAggregator
from fedrun.common.errors import FedrunError, explain
from fedrun.common.log import ERROR, log
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise_keeper import (
    Keeper,
    Level,
    NoiseRefused,
    TooMuchSpent,
    digest,
)
from fedrun.federation.site_keys import RoundRefused, digest_of

WORDS = 4  # of 64 bits, in a digest or a key
REFUSALS: dict[int, type[RoundRefused]] = {1: NoiseRefused, 2: TooMuchSpent}


class Noise:
    """A worker's part in hiding the clients of each round."""

    def __init__(self, level: Level, plane: DataPlane, keeper: Keeper | None) -> None:
        """keeper: on the first worker."""
        self.level, self._plane, self._keeper = level, plane, keeper
        self.charged = False
        """Whether the server has to count the last round; on the first worker."""
        self._terms = [0] * WORDS
        self._sampler = level.sampler

    def clip(self, client: int, update: Tensor) -> bool:
        """Clip a client's update, (size,), in place, and note it, since the noise is bound to it;
        whether it was finite."""
        finite = clip_(update, self.level.clip)
        self.note(client, digest_of(update))
        return finite

    def note(self, client: int, of_term: str) -> None:
        """Note what stands for a client's term. Digests are added up, modulo 2^64: it does not
        matter who notes which."""
        own = words_of(bytes.fromhex(digest(client, of_term)))
        self._terms = [(a + b) % (1 << 64) for a, b in zip(self._terms, own, strict=True)]

    def add_to(self, aggregator: Aggregator, plan: RoundPlan, model: Tensor) -> None:
        """Workers: add the round's noise to what is summed next. model: the global one, (size,).

        RoundRefused on all of them if there is no noise: then nothing may be summed.
        """
        assert isinstance(aggregator, ExactAggregator)
        keys = self._keys(plan, model)
        from fedrun.secure.noise import BLOCK, stream

        assert aggregator.scale == self.level.scale
        term = aggregator.buffer[:aggregator.size]
        for block in range(self._plane.worker, -(-len(term) // BLOCK), self._plane.workers):
            part = term[block * BLOCK:(block + 1) * BLOCK]
            for key in keys:
                drawn = self._sampler.sample(stream(key, block), len(part))
                part.add_(torch.from_numpy(drawn).to(part.device, part.dtype))

    def _keys(self, plan: RoundPlan, model: Tensor) -> list[bytes]:
        """Workers: the keys of all noise that is added to this round's sum; from the first of
        them."""
        terms, self._terms = self._plane.sum_words(self._terms), [0] * WORDS
        key, refused = self._released(plan, model, terms)
        status = 0 if refused is None else next(
            n for n, kind in REFUSALS.items() if isinstance(refused, kind))
        status, *words = self._plane.sum_words([status, *words_of(key)])  # the others wait for it
        if status:
            raise refused or REFUSALS[status](f"round {plan.round}: the first worker has no noise")
        return [bytes_of(words)]

    def _released(self, plan: RoundPlan, model: Tensor, terms: Sequence[int]
                  ) -> tuple[bytes, RoundRefused | None]:
        """The key from this worker's keeper (zeros if it has no keeper), and the reason, which has
        been logged, if the keeper refused to give one."""
        refused: RoundRefused
        try:
            if self._keeper is None:
                return bytes(8 * WORDS), None
            key, self.charged = self._keeper.release(plan, digest_of(model), terms)
        except RoundRefused as error:
            refused = error
        except (FedrunError, OSError) as error:
            refused = NoiseRefused(explain(error))
        else:
            return key, None
        log(str(refused), ERROR)
        return bytes(8 * WORDS), refused


def words_of(raw: bytes) -> list[int]:
    """Bytes as words of 64 bits."""
    return [int(word) for word in np.frombuffer(raw, "<u8")]


def bytes_of(words: Sequence[int]) -> bytes:
    """The bytes of such words, each modulo 2^64."""
    return b"".join((word % (1 << 64)).to_bytes(8, "little") for word in words)
