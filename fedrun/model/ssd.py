"""The state-space-dual (SSD) scan of Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

For every head the layer is the linear recurrence (their equation 2, discretised)

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T        H: (headdim, d_state)
    y_t = H_t C_t + D x_t

`ssd_step` evaluates it literally, one token at a time; `ssd_scan` evaluates a whole sequence as
batched matrix products over chunks (their Listing 1): inside a chunk as a masked attention matrix,
between chunks through the state.

To check the code against the paper, read `recurrence` in tests/model/test_ssd.py first: it writes
the two equations head by head and token by token, in float64, and both functions and all gradients
are tested against it.

Shapes: b batch, l sequence length, h heads, p headdim, n d_state, g groups of heads sharing B and
C, r = h / g heads a group, c chunks, q positions in a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: returns its output (b, h, p) and the new state (b, h, p, n).

    x: (b, h, p); dt: (b, h), after softplus; A, D: (h,), A negative; B, C: (b, g, n);
    state: (b, h, p, n), whose type the recurrence uses.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(heads_per_group, dim=1)  # (b, h, n)
    C = C.repeat_interleave(heads_per_group, dim=1)  # (b, h, n)
    decay = torch.exp(dt * A)[..., None, None]  # (b, h, 1, 1)
    state = decay * state + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    y = (state * C[:, :, None, :]).sum(-1) + D[:, None] * x
    return y, state


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
             chunk_size: int, initial_state: Tensor | None = None,
             matmul_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The whole recurrence: returns the outputs (b, l, h, p) and the final state (b, h, p, n).

    x: (b, l, h, p); dt: (b, l, h), after softplus; A, D: (h,), A negative; B, C: (b, l, g, n);
    initial_state: (b, h, p, n), None for zero. Any l >= 1. All tensors have the same type, which
    decays, their sums and the state keep; matrix products run in matmul_dtype (default: x's type).
    """
    batch, seqlen, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, headdim, d_state)
    q = min(chunk_size, seqlen)
    pad = -seqlen % q
    if pad:  # a padded token has dt = 0: it keeps the state and adds nothing
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    y, final = _Scan.apply(  # type: ignore[no-untyped-call]
        x.unflatten(1, (-1, q)), dt.unflatten(1, (-1, q)), A,
        B.unflatten(1, (-1, q)).transpose(2, 3), C.unflatten(1, (-1, q)).transpose(2, 3), D,
        initial_state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3),
        matmul_dtype or x.dtype)
    final = final.unflatten(3, (-1, headdim)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return y.flatten(1, 2)[:, :seqlen], final


class _Scan(torch.autograd.Function):
    """The scan in chunks. Its hand-written gradient makes a third of the passes over memory that
    autograd would make.

    x: (b, c, q, h, p); dt: (b, c, q, h); B, C: (b, c, g, q, n); initial: (b, g, n, r p).
    Returns y (b, c, q, h, p) and the final state (b, g, n, r p).

    Products over the positions of a chunk, one per head, have the layout (b, c, h, q, p). Products
    with B and C serve all heads of a group at once and have the layout (b, c, g, q, r p).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                initial: Tensor, matmul_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        groups = B.shape[2]
        B, C = B.to(matmul_dtype), C.to(matmul_dtype)
        # log of the decay from the chunk's start to each position, and over the whole chunk
        log_decay = torch.cumsum(dt * A, dim=2)  # (b, c, q, h)
        log_total = log_decay[:, :, -1:]  # (b, c, 1, h)
        dt_x = dt[..., None] * x

        # 1. Within a chunk: y_i = sum_{j <= i} (C_i . B_j) exp(sum of dt A over j+1..i) dt_j x_j
        scores = (C @ B.mT).to(x.dtype)  # (b, c, g, q, q)
        weights = _per_group(_decay_within(log_decay), groups).mul_(scores[:, :, :, None])
        dt_x_heads = _to_heads(dt_x, matmul_dtype)
        within = weights.flatten(2, 3).to(matmul_dtype) @ dt_x_heads  # (b, c, h, q, p)
        del weights

        # 2. What each chunk adds to the state at its end
        to_end = torch.exp(log_total - log_decay)  # (b, c, q, h)
        carried = _to_groups(dt_x.mul_(to_end[..., None]), groups)
        carried = carried.to(matmul_dtype)  # (b, c, g, q, r p)
        added = B.mT @ carried  # (b, c, g, n, r p)

        # 3. The recurrence over chunks
        over_chunk = _over_chunk(log_total, groups, x.shape[-1])  # (b, c, g, 1, r p)
        entering = torch.empty_like(added)
        state = initial
        for c in range(x.shape[1]):
            entering[:, c] = state
            state = torch.addcmul(added[:, c].to(x.dtype), over_chunk[:, c], state)
        del added

        # 4. What each position reads from the state that entered its chunk
        y = _from_groups(C @ entering, x).mul_(torch.exp(log_decay)[..., None])
        y.add_(within.transpose(2, 3)).addcmul_(x, D[:, None])
        ctx.save_for_backward(x, dt, A, B, C, D, log_decay, scores, dt_x_heads, carried, entering)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, log_decay, scores, dt_x_heads, carried, entering = ctx.saved_tensors
        groups, matmul_dtype = B.shape[2], B.dtype
        log_total = log_decay[:, :, -1:]
        from_start, to_end = torch.exp(log_decay), torch.exp(log_total - log_decay)
        over_chunk = _over_chunk(log_total, groups, x.shape[-1])

        # 4. Reads: y += from_start * (C @ entering)
        grad_read = grad_y * from_start[..., None]  # (b, c, q, h, p)
        grad_log_read = (_from_groups(C @ entering, x).mul_(grad_read)).sum(-1)  # (b, c, q, h)
        grad_read = _to_groups(grad_read, groups).to(matmul_dtype)
        grad_C = grad_read @ entering.mT  # (b, c, g, q, n)
        grad_entering = C.mT @ grad_read  # (b, c, g, n, r p)
        del grad_read

        # 3. The recurrence backwards: grad_added[c] is the gradient of the state after chunk c
        grad_added = torch.empty_like(grad_entering)
        grad_log_total = torch.empty_like(over_chunk[:, :, :, 0])  # (b, c, g, r p)
        grad_state = grad_final
        for c in reversed(range(x.shape[1])):
            grad_added[:, c] = grad_state
            grad_log_total[:, c] = (grad_state * entering[:, c]).sum(2)
            read = grad_entering[:, c].to(x.dtype)
            grad_state = torch.addcmul(read, over_chunk[:, c], grad_state)
        grad_log_total = _per_head(grad_log_total.mul_(over_chunk[:, :, :, 0]), x)  # (b, c, h)
        del grad_entering

        # 2. Additions: added = B^T @ carried, carried = to_end * dt * x
        grad_B = carried @ grad_added.mT  # (b, c, g, q, n)
        grad_dt_x = _from_groups(B @ grad_added, x).mul_(to_end[..., None])
        grad_log_carried = (grad_dt_x * x).sum(-1).mul_(dt)  # (b, c, q, h)
        del grad_added

        # 1. Within a chunk: y += weights @ dt_x, weights = scores * decay
        grad_heads = _to_heads(grad_y, matmul_dtype)
        decay = _decay_within(log_decay)  # (b, c, h, q, q)
        weights = _per_group(decay, groups).mul(scores[:, :, :, None]).flatten(2, 3)
        weights = weights.to(matmul_dtype)
        grad_dt_x.add_((weights.mT @ grad_heads).transpose(2, 3))
        del weights
        grad_weights = (grad_heads @ dt_x_heads.mT).to(x.dtype)  # (b, c, h, q, q)
        grad_weights = _per_group(grad_weights.mul_(decay), groups)  # (b, c, g, r, q, q)
        del decay, grad_heads
        grad_scores = grad_weights.sum(3).to(matmul_dtype)  # (b, c, g, q, q)
        grad_C += grad_scores @ B
        grad_B += grad_scores.mT @ C
        grad_log = grad_weights.mul_(scores[:, :, :, None]).flatten(2, 3)  # of the exponent i, j
        grad_log_within = (grad_log.sum(-1) - grad_log.sum(-2)).transpose(2, 3)  # (b, c, q, h)
        del grad_weights, grad_log

        # Every log is a sum of dt A: over positions up to i (reads), or after j (additions)
        until = grad_log_within.add_(grad_log_read).flip(2).cumsum(2).flip(2)
        after = grad_log_carried.cumsum(2).sub_(grad_log_carried)
        grad_dt_A = until.add_(after).add_(grad_log_total[:, :, None])
        grad_dt = torch.addcmul((grad_dt_x * x).sum(-1), grad_dt_A, A)
        grad_x = grad_dt_x.mul_(dt[..., None]).addcmul_(grad_y, D[:, None])
        grad_D = (grad_y * x).sum((0, 1, 2, 4))
        return (grad_x, grad_dt, (grad_dt_A * dt).sum((0, 1, 2)), grad_B.to(x.dtype),
                grad_C.to(x.dtype), grad_D, grad_state, None)


def _decay_within(log_decay: Tensor) -> Tensor:
    """exp(log_decay_i - log_decay_j) for i >= j, else 0: (b, c, q, h) -> (b, c, h, q, q)."""
    by_head = log_decay.transpose(2, 3)
    q = by_head.shape[-1]
    future = torch.full((q, q), -torch.inf, dtype=by_head.dtype, device=by_head.device).triu_(1)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    return (by_head[..., :, None] - by_head[..., None, :]).add_(future).exp_()


def _over_chunk(log_total: Tensor, groups: int, headdim: int) -> Tensor:
    """The decay over whole chunks, for each channel: (b, c, 1, h) -> (b, c, g, 1, r p)."""
    decay = torch.unflatten(torch.exp(log_total), 3, (groups, -1))  # (b, c, 1, g, r)
    return decay.transpose(2, 3).repeat_interleave(headdim, dim=-1)


def _per_group(t: Tensor, groups: int) -> Tensor:
    """(b, c, h, ...) -> (b, c, g, r, ...)"""
    return torch.unflatten(t, 2, (groups, -1))


def _per_head(t: Tensor, x: Tensor) -> Tensor:
    """Sum over the channels of each head: (b, c, g, r p) -> (b, c, h)."""
    return torch.unflatten(t, 3, (-1, x.shape[-1])).sum(-1).flatten(2, 3)


def _to_heads(t: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    """(b, c, q, h, p) -> (b, c, h, q, p), as a contiguous copy."""
    t = t.transpose(2, 3)
    return torch.empty(t.shape, dtype=matmul_dtype, device=t.device).copy_(t)


def _to_groups(t: Tensor, groups: int) -> Tensor:
    """(b, c, q, h, p) -> (b, c, g, q, r p)"""
    return torch.unflatten(t, 3, (groups, -1)).transpose(2, 3).flatten(4)


def _from_groups(t: Tensor, x: Tensor) -> Tensor:
    """(b, c, g, q, r p) -> (b, c, q, h, p), a copy in x's type."""
    t = torch.unflatten(t, 4, (-1, x.shape[-1])).transpose(2, 3).flatten(3, 4)
    return t.to(x.dtype)
