"""The language model's head: linear projection and cross-entropy, fused and chunked over tokens.

The head of a small model with a large vocabulary is most of its arithmetic and, when the logits
of a whole batch are kept, most of its memory. Here a chunk's logits are turned into its gradient
in place and used up at once: three matrix products a chunk (logits, gradient of the hidden states,
gradient of the weight), none of them repeated in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256  # measured: smaller chunks re-read the weight too often, larger ones cost memory


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies; the gradients are computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                low: torch.dtype) -> Tensor:
        ctx.set_materialize_grads(False)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        head = weight.to(low)
        loss = hidden.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            x, target = hidden[rows].to(low), targets[rows, None]
            logits = x @ head.T  # (tokens, vocab)
            if not (wants_hidden or wants_weight):
                loss += _cross_entropy(logits, target).to(loss.dtype)
                continue
            loss += _cross_entropy(logits, target).to(loss.dtype)
            grad = torch.softmax(logits, dim=-1)
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.grads = grad_hidden, grad_weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.grads
        return (None if grad_hidden is None else grad_hidden * grad_loss,
                None if grad_weight is None else grad_weight * grad_loss, None, None)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return (torch.logsumexp(logits, dim=-1, keepdim=True) - logits.gather(1, target)).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model); targets: (tokens,), integers. The matrix
    products take product_dtype (default: hidden's own), everything else hidden's.
    """
    low = product_dtype or hidden.dtype
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, low)
    return loss


@torch.no_grad()
def predictive_entropy(hidden: Tensor, weight: Tensor,
                       product_dtype: torch.dtype | None = None) -> Tensor:
    """Sum over tokens of the entropy of softmax(hidden @ weight.T), in nats: a 0-dim tensor.

    hidden: (tokens, d_model); weight: (vocab, d_model). No gradients.
    """
    low = product_dtype or hidden.dtype
    head = weight.to(low)
    entropy = hidden.new_zeros(())
    for start in range(0, len(hidden), CHUNK_TOKENS):
        logits = (hidden[start:start + CHUNK_TOKENS].to(low) @ head.T).to(hidden.dtype)
        log_p = torch.log_softmax(logits, dim=-1)
        entropy -= (log_p.exp() * log_p).sum()
    return entropy
