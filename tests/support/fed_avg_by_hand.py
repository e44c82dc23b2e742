"""FedAvg in plain torch and float64, as a reference.

It shares nothing with the protocol but the model's forward pass and the tokens: it draws its
batches, runs torch.optim.AdamW on separate parameters, and averages dictionaries.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROUNDS, CLIENTS, LOCAL_UPDATES, BATCH, LENGTH, LR = 3, 3, 2, 2, 32, 2e-3


def fed_avg_by_hand(model: nn.Module, logits: Callable[[nn.Module, Tensor], Tensor],
                    sequences: np.ndarray) -> dict[str, Tensor]:
    """The global model after ROUNDS, by the names of its parameters: each client an own copy of the
    model, and an own AdamW that lives on.

    model: at its start, in float64; logits: those of a client's copy for tokens (b, l); sequences:
    the training text (n, LENGTH), dealt to clients in order, with seed 0.
    """
    bounds = [k * len(sequences) // CLIENTS for k in range(CLIENTS + 1)]
    shards = [sequences[a:b].astype(np.int64) for a, b in itertools.pairwise(bounds)]
    clients = [copy.deepcopy(model) for _ in shards]
    optimizers = [torch.optim.AdamW(c.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
                  for c in clients]
    orders = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, k, 0]))).permutation(
        len(shard)) for k, shard in enumerate(shards)]
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for round_ in range(ROUNDS):
        for k, client in enumerate(clients):
            with torch.no_grad():
                for name, p in client.named_parameters():
                    p.copy_(state[name])
            for update in range(LOCAL_UPDATES):
                step = round_ * LOCAL_UPDATES + update
                tokens = torch.from_numpy(shards[k][orders[k][step * BATCH:(step + 1) * BATCH]])
                predicted = logits(client, tokens)[:, :-1].double()
                loss = cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
                optimizers[k].zero_grad()
                loss.backward()
                optimizers[k].step()
        trained = [dict(client.named_parameters()) for client in clients]
        state = {name: torch.stack([len(shard) / len(sequences) * own[name].detach()
                                    for shard, own in zip(shards, trained, strict=True)]).sum(0)
                 for name in state}
    return state
