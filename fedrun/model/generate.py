"""Generation by the recurrent form: constant time and memory a token, whatever came before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrun.model.conv import causal_conv_silu
from fedrun.model.mamba2 import Block, LayerState, Mamba2LM
from fedrun.model.ssd import ssd_step

ModelState = list[LayerState]
"""One entry a layer."""


@torch.no_grad()
def prefill(model: Mamba2LM, input_ids: Tensor) -> tuple[Tensor, ModelState]:
    """Read a prompt (b, l) in one pass: the logits of its last token (b, vocab) and the state."""
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
    """Read one token a sequence, (b,) -> logits (b, vocab); `state` is updated in place."""
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
    """Continue prompts (b, l) by max_new_tokens: returns the new tokens (b, max_new_tokens).

    Greedy at temperature 0; otherwise sampled from softmax(logits / temperature), of the top_k
    most likely tokens only where top_k is above 0. FloatingPointError where those logits are not
    finite, so that nothing can be drawn.
    """
    logits, state = prefill(model, input_ids)
    tokens = []
    for i in range(max_new_tokens):
        tokens.append(_choose(logits, temperature, top_k, generator))
        if i < max_new_tokens - 1:
            logits = step(model, tokens[-1], state)
    return torch.stack(tokens, dim=1)


def _logits(model: Mamba2LM, residual: Tensor) -> Tensor:
    # In the weight's own type whatever that of products is: one row is multiplied in the time that
    # it takes to read the weight, which a cast would do as well.
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
