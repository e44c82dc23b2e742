"""Perplexity on the validation split, and a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
import torch

from fedrun.data.tokens import TokenData
from fedrun.model.generate import generate
from fedrun.model.mamba2 import Mamba2LM

BATCH = 16  # sequences; the same in every world, so that the sums below are too
PROMPT = "Once upon a time,"
SAMPLE_TOKENS = 100

Piece = tuple[int, float, int]
"""(number of the batch, summed loss in nats, tokens)."""


@torch.no_grad()
def validation_pieces(model: Mamba2LM, sequences: np.ndarray, device: torch.device, part: int = 0,
                      parts: int = 1, between_batches: Callable[[], None] = lambda: None
                      ) -> list[Piece]:
    """The summed loss of every `parts`-th batch of the split, from batch `part` on.

    `sequences` is (n, sequence_length). Losses are kept by batch: whoever computed them, the server
    adds them in the order of the batches, and the perplexity has the same bits in every world.
    """
    losses, counts = [], []
    numbers = range(part, math.ceil(len(sequences) / BATCH), parts)
    for number in numbers:
        between_batches()
        rows = sequences[number * BATCH:(number + 1) * BATCH].astype(np.int64)
        loss, count = model.loss(torch.from_numpy(rows).to(device))
        losses.append(loss.double())
        counts.append(count)
    values = torch.stack(losses).tolist() if losses else []
    return list(zip(numbers, values, counts, strict=True))


def mean_loss(pieces: Iterable[Piece]) -> float:
    """Token-weighted mean cross-entropy in nats over all pieces, each batch exactly once."""
    ordered = sorted(pieces)
    assert [number for number, _, _ in ordered] == list(range(len(ordered)))
    return math.fsum(loss for _, loss, _ in ordered) / sum(tokens for _, _, tokens in ordered)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def sample_text(model: Mamba2LM, data: TokenData, device: torch.device) -> str:
    """100 greedy tokens after "Once upon a time,", by the recurrent step; after the first four of
    the validation split where the tokenizer has no tokens for that."""
    prompt: list[int] = []
    with suppress(Exception):  # the library raises nothing more precise for an unknown word
        prompt = data.tokenizer.encode(PROMPT, add_special_tokens=False).ids
    prompt = prompt or data.validation[0, :4].tolist()
    tokens = generate(model, torch.tensor([prompt], device=device), SAMPLE_TOKENS)
    return str(data.tokenizer.decode(tokens[0].tolist()))
