"""The state-space-dual (SSD) scan of Mamba-2 (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

For every head the layer is the linear recurrence (their equation 2, discretised)

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T        H: (headdim, d_state)
    y_t = H_t C_t + D x_t

`ssd_step` evaluates it literally, one token at a time; `ssd_scan` evaluates a whole sequence as
batched matrix products over chunks (their Listing 1): inside a chunk as a masked attention matrix,
between chunks through the state.

Shapes: b batch, l sequence length, h heads, p headdim, n d_state, g groups of heads sharing B and
C, r = h / g heads a group, c chunks, q positions in a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
             state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: returns its output (b, h, p) and the new state (b, h, p, n).

    x: (b, h, p); dt: (b, h), after softplus; A, D: (h,), A negative; B, C: (b, g, n);
    state: (b, h, p, n), in the type that the recurrence is kept in.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(heads_per_group, dim=1)  # (b, h, n)
    C = C.repeat_interleave(heads_per_group, dim=1)  # (b, h, n)
    x = x.to(state.dtype)
    decay = torch.exp(dt * A)[..., None, None]  # (b, h, 1, 1)
    state = decay * state + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    y = (state * C[:, :, None, :]).sum(-1) + D[:, None] * x
    return y, state


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
             chunk_size: int, initial_state: Tensor | None = None,
             product_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The whole recurrence: returns the outputs (b, l, h, p) and the final state (b, h, p, n).

    x: (b, l, h, p); dt: (b, l, h), after softplus; A, D: (h,), A negative; B, C: (b, l, g, n);
    initial_state: (b, h, p, n), zero where it is None. Any l >= 1. Decays, their sums and the
    state are kept in dt's type, the matrix products take product_dtype (default: dt's).
    """
    batch, seqlen, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    per_group = heads // groups
    full, low = dt.dtype, product_dtype or dt.dtype
    q = min(chunk_size, seqlen)
    pad = -seqlen % q
    if pad:  # a padded token has dt = 0: it keeps the state and adds nothing
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, B, C))
    chunks = (seqlen + pad) // q

    x = x.reshape(batch, chunks, q, heads, headdim).to(full)
    dt = dt.reshape(batch, chunks, q, heads)
    B = B.reshape(batch, chunks, q, groups, d_state).transpose(2, 3).to(low)  # (b, c, g, q, n)
    C = C.reshape(batch, chunks, q, groups, d_state).transpose(2, 3).to(low)

    # log of the decay from the chunk's start to each position, and over the whole chunk
    log_decay = torch.cumsum(dt * A, dim=2)  # (b, c, q, h)
    log_total = log_decay[:, :, -1]  # (b, c, h)

    # 1. Within a chunk: y_i += sum_{j <= i} (C_i . B_j) exp(sum of dt A over j+1..i) dt_j x_j
    by_head = log_decay.transpose(2, 3)  # (b, c, h, q)
    difference = by_head[..., :, None] - by_head[..., None, :]  # (b, c, h, q, q)
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    decay = torch.exp(difference.masked_fill(~causal, -torch.inf))
    scores = (C @ B.transpose(-1, -2)).to(full)  # (b, c, g, q, q), once a group
    weights = scores[:, :, :, None] * decay.unflatten(2, (groups, per_group))
    dt_x = dt[..., None] * x  # (b, c, q, h, p)
    within = weights.flatten(2, 3).to(low) @ dt_x.transpose(2, 3).to(low)  # (b, c, h, q, p)

    # 2. What each chunk adds to the state at its end: one product a group, all its heads at once
    to_end = torch.exp(log_total[:, :, None] - log_decay)  # (b, c, q, h)
    weighted = (to_end[..., None] * dt_x).unflatten(3, (groups, per_group)).transpose(2, 3)
    added = (B.transpose(-1, -2) @ weighted.flatten(4).to(low)).to(full)  # (b, c, g, n, r p)
    added = added.unflatten(4, (per_group, headdim))  # (b, c, g, n, r, p)

    # 3. The recurrence over chunks
    over_chunk = torch.exp(log_total).view(batch, chunks, groups, 1, per_group, 1)
    if initial_state is None:
        state = added.new_zeros(batch, groups, d_state, per_group, headdim)
    else:
        state = initial_state.to(full).unflatten(1, (groups, per_group)).permute(0, 1, 4, 2, 3)
    entering = []
    for c in range(chunks):
        entering.append(state)
        state = over_chunk[:, c] * state + added[:, c]
    states = torch.stack(entering, dim=1)  # (b, c, g, n, r, p)

    # 4. What each position reads from the state that entered its chunk
    read = (C @ states.flatten(4).to(low)).to(full)  # (b, c, g, q, r p)
    read = read.unflatten(4, (per_group, headdim)).transpose(2, 3).flatten(3, 4)  # (b, c, q, h, p)

    y = within.transpose(2, 3).to(full) + torch.exp(log_decay)[..., None] * read + D[:, None] * x
    y = y.reshape(batch, chunks * q, heads, headdim)[:, :seqlen]
    final = state.permute(0, 1, 3, 4, 2).flatten(1, 2)  # (b, h, p, n)
    return y, final
