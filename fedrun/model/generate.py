"""Text generation with the recurrent form: time and memory per token do not grow with length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrun.model.conv import causal_conv_silu
from fedrun.model.mamba2 import Block, LayerState, Mamba2LM
from fedrun.model.ssd import ssd_step

ModelState = list[LayerState]
"""One entry per layer."""


@torch.no_grad()
def prefill(model: Mamba2LM, input_ids: Tensor) -> tuple[Tensor, ModelState]:
    """Read prompts (b, l) in one pass: logits of the last tokens (b, vocab), and the state."""
    residual = F.embedding(input_ids, model.backbone.embedding.weight)
    state: ModelState = []
    for block in model.backbone.layers:
        assert isinstance(block, Block)
        mixed, layer_state = block.mixer(block.norm(residual))
        residual = residual + mixed
        state.append(layer_state)
    return _logits(model, residual[:, -1]), state


@torch.no_grad()
def step(model: Mamba2LM, tokens: Tensor, state: ModelState) -> Tensor:
    """Read one token per sequence: (b,) -> logits (b, vocab). Updates `state` in place."""
    residual = F.embedding(tokens, model.backbone.embedding.weight)  # (b, d)
    for layer, block in enumerate(model.backbone.layers):
        assert isinstance(block, Block)
        mixer = block.mixer
        past, ssm_state = state[layer]
        z, xbc, dt = mixer.project(block.norm(residual))
        window = torch.cat([past, xbc[:, None]], dim=1)  # (b, d_conv, i + 2 g n)
        convolved = causal_conv_silu(window, mixer.conv1d.weight, mixer.conv1d.bias)[:, 0]
        x, B, C = mixer.split(convolved)
        y, ssm_state = ssd_step(x, dt, -torch.exp(mixer.A_log), B, C, mixer.D, ssm_state)
        state[layer] = window[:, 1:], ssm_state
        residual = residual + mixer.finish(y, z)
    return _logits(model, residual)


@torch.no_grad()
def generate(model: Mamba2LM, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_k: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """Continue prompts (b, l); returns the new tokens (b, max_new_tokens).

    Greedy at temperature 0. Otherwise tokens are sampled from softmax(logits / temperature), among
    the top_k most likely ones if top_k > 0; raises FloatingPointError if the logits to sample from
    are not finite.
    """
    logits, state = prefill(model, input_ids)
    tokens = []
    for i in range(max_new_tokens):
        tokens.append(_choose(logits, temperature, top_k, generator))
        if i < max_new_tokens - 1:
            logits = step(model, tokens[-1], state)
    return torch.stack(tokens, dim=1)


def _logits(model: Mamba2LM, residual: Tensor) -> Tensor:
    # Not cast to matmul_dtype: for one token per sequence the product takes as long as reading the
    # weight, and a cast would have to read it too.
    return F.linear(model.backbone.norm_f(residual), model.lm_head.weight)


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
