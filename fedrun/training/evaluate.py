"""Loss on the validation split, and a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from fedrun.data.tokens import TokenData
from fedrun.model.base import Generates, Model
from fedrun.model.generate import generate

BATCH_SEQUENCES = 16  # the same in every world, so that each batch's loss has the same bits
PROMPT = "Once upon a time,"
SAMPLE_TOKENS = 100

Piece = tuple[int, float, int]
"""(batch number, summed loss in nats, tokens)."""


@torch.no_grad()
def validation_pieces(model: Model, sequences: np.ndarray, device: torch.device, part: int = 0,
                      parts: int = 1, between_batches: Callable[[], None] = lambda: None
                      ) -> list[Piece]:
    """The summed losses of batches `part`, `part` + `parts`, ... of the split.

    sequences: (n, sequence_length); between_batches: called before each batch. Losses are returned
    per batch, so that the server can add them in the order of the batches: the perplexity then has
    the same bits whichever worker computed which batch.
    """
    losses, counts = [], []
    numbers = range(part, math.ceil(len(sequences) / BATCH_SEQUENCES), parts)
    for number in numbers:
        between_batches()
        start = number * BATCH_SEQUENCES
        rows = sequences[start:start + BATCH_SEQUENCES].astype(np.int64)
        loss, count = model.loss(torch.from_numpy(rows).to(device))
        losses.append(loss.double())
        counts.append(count)
    values = torch.stack(losses).tolist() if losses else []
    return list(zip(numbers, values, counts, strict=True))


def mean_loss(pieces: Iterable[Piece]) -> float:
    """Token-weighted mean cross-entropy in nats; `pieces` must have every batch exactly once."""
    ordered = sorted(pieces)
    assert [number for number, _, _ in ordered] == list(range(len(ordered)))
    return math.fsum(loss for _, loss, _ in ordered) / sum(tokens for _, _, tokens in ordered)


class Prompt(NamedTuple):
    """What sample texts continue."""

    text: str
    tokens: list[int]


def sample_prompt(data: TokenData) -> Prompt:
    """PROMPT; the first four tokens of the validation split if the tokenizer cannot encode it."""
    tokens: list[int] = []
    with suppress(Exception):  # tokenizers raises plain Exception for an unknown word
        tokens = data.tokenizer.encode(PROMPT, add_special_tokens=False).ids
    if tokens:
        return Prompt(PROMPT, tokens)
    tokens = data.validation[0, :4].tolist()
    return Prompt(str(data.tokenizer.decode(tokens)), tokens)


def sample_text(model: Model, data: TokenData, device: torch.device) -> str:
    """Continue the sample prompt by SAMPLE_TOKENS greedy tokens; an empty text if the model cannot
    write."""
    if not isinstance(model, Generates):
        return ""
    prompt = torch.tensor([sample_prompt(data).tokens], device=device)
    return str(data.tokenizer.decode(generate(model, prompt, SAMPLE_TOKENS)[0].tolist()))
