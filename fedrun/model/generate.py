"""Text generation, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrun.model.base import Generates


@torch.no_grad()
def generate(model: Generates, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_k: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """Continue prompts (b, l); returns the new tokens (b, max_new_tokens).

    Greedy at temperature 0. Otherwise tokens are sampled from softmax(logits / temperature), among
    the top_k most likely ones if top_k > 0; raises FloatingPointError if the logits to sample from
    are not finite.
    """
    logits, state = model.prefill(input_ids)
    tokens = []
    for i in range(max_new_tokens):
        tokens.append(_choose(logits, temperature, top_k, generator))
        if i < max_new_tokens - 1:
            logits = model.step(tokens[-1], state)
    return torch.stack(tokens, dim=1)


def _choose(logits: Tensor, temperature: float, top_k: int,
            generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("its logits are not finite")
    if top_k:
        kept, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        choice = torch.multinomial(torch.softmax(kept / temperature, -1), 1, generator=generator)
        return tokens.gather(1, choice)[:, 0]
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
