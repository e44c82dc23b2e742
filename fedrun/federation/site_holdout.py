"""The loss on what the sites hold out (--site_holdout): a sum over all sites, and no site's own.

Each site computes the losses of its own sequences under the new global model, in batches that are
the same in every world. Each is rounded to fixed point, and integers are summed as the tail of a
round is, under a mask of their own: the same bits wherever the sites are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Self

import numpy as np
import torch

from fedrun.common.perplexity import perplexity
from fedrun.federation.secure_sum import HOLDOUT, SecureSum
from fedrun.model.base import Model
from fedrun.training.evaluate import BATCH_SEQUENCES, Piece, validation_pieces

LOSS_BITS = 20
"""Bits of a sum of losses, in nats, behind the point."""
LARGEST_LOSS = 1 << 10
"""Nats a token that a batch counts as at most. So the sum of 2^32 tokens stays below 2^62, and is
not taken for a negative."""


@dataclass(frozen=True)
class SiteLosses:
    """Sums over batches, as the integers that are summed."""

    losses: int = 0
    """Sum of the losses, LOSS_BITS behind the point."""
    tokens: int = 0
    """Tokens in them."""
    clamped: int = 0
    """Batches whose loss was too large or not finite, and is in the sum as LARGEST_LOSS a token."""

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Self:
        """Those of these batches."""
        losses = tokens = clamped = 0
        for _, loss, count in pieces:
            fits = 0 <= loss < LARGEST_LOSS * count  # of NaN too
            losses += round(math.ldexp(loss if fits else LARGEST_LOSS * count, LOSS_BITS))
            tokens += count
            clamped += not fits
        return cls(losses, tokens, clamped)

    def words(self) -> list[int]:
        """Its numbers in order, to be summed over workers or sites."""
        return list(astuple(self))

    def record(self) -> dict[str, Any]:
        """What a record of the history holds of them: the mean loss in nats per token, its
        perplexity, and the number of tokens. An infinite loss if one of the batches has none."""
        loss = math.inf if self.clamped else math.ldexp(self.losses / self.tokens, -LOSS_BITS)
        return {"site_val_loss": loss, "site_val_ppl": perplexity(loss),
                "site_val_tokens": self.tokens}


def sum_of_sites(secure: SecureSum, texts: Sequence[np.ndarray], model: Model, device: torch.device,
                 between_batches: Callable[[], None]) -> list[int]:
    """Workers: the words of `SiteLosses` over all sites; the same on all of them.

    texts: of each site whose text is here, what it holds out, (n, sequence_length); its workers
    share the batches. model: the global model. between_batches: called before each batch.
    """
    plane = secure.plane
    batches = [text[start:start + BATCH_SEQUENCES] for text in texts
               for start in range(0, len(text), BATCH_SEQUENCES)]
    pieces = [piece for batch in batches[plane.worker::plane.workers]
              for piece in validation_pieces(model, batch, device, between_batches=between_batches)]
    return plane.sum_words(SiteLosses.of(pieces).words(), secure.mask(HOLDOUT, 64))
