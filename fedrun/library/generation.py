"""Continues a text with a model that was found on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedrun.common.errors import InputError, require
from fedrun.common.log import WARNING, log
from fedrun.data.tokenizer import encode, read_tokenizer
from fedrun.library.tokenizers import need_tokenizer
from fedrun.model.generate import generate

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained


def continue_text(found: Pretrained, prompt: str, max_new_tokens: int = 100,
                  temperature: float = 0.0, top_k: int = 0, seed: int = 0,
                  tokenizer: str | None = None) -> str:
    """The prompt and its continuation.

    temperature: 0 for the most likely token every time; above 0, tokens are drawn from
        softmax(logits / temperature).
    top_k: draw from this many most likely tokens only; 0 for all.
    tokenizer: a tokenizer's folder or tokenizer.json, for a model without one.

    Raises:
        InputError: an argument is out of range, the prompt has no token, the tokenizer does not
            belong to the model, or the model has diverged.
    """
    for flag, value, low in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 0),
                             ("temperature", temperature, 0), ("seed", seed, 0)):
        require(value >= low, f"--{flag}", value, f">= {low}")
    for flag, value in (("top_k", top_k), ("seed", seed)):
        if value and not temperature:
            log(f"--{flag} {value} has no effect with --temperature 0, which draws no tokens at "
                "random", WARNING)
    path = need_tokenizer(found, tokenizer)
    words = read_tokenizer(path if path.is_file() else path / "tokenizer.json", "--tokenizer")
    ids = encode(words, [prompt], "--prompt")[0].ids
    if not ids:
        raise InputError("--prompt: must have at least one token")
    if max(ids) >= found.vocab_size:
        raise InputError(f"--tokenizer {tokenizer}: not the tokenizer of {found.folder}, whose "
                         f"vocabulary has {found.vocab_size} tokens")
    model = found.build()
    try:
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise FloatingPointError("its parameters are not finite")
        new = generate(model, torch.tensor([ids]), max_new_tokens, temperature, top_k,
                       torch.Generator().manual_seed(seed))
    except FloatingPointError as error:
        raise InputError(f"RUN {found.folder}: {error}: the model has diverged and cannot "
                         "generate text") from None
    return prompt + str(words.decode(new[0].tolist()))
