"""Rounds by hand, in plain torch and float64, equal rounds of fedrun.

The reference shares nothing with the protocol but the model's forward pass and the tokens: it
draws its batches, runs torch.optim.AdamW on separate parameters, and averages dictionaries.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedrun.data.tokens import TokenData, prepare
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from tests.support.runs import CORPUS, OF_SMALL, Run

ROUNDS, CLIENTS, LOCAL_UPDATES, BATCH, LENGTH, LR = 3, 3, 2, 2, 32, 2e-3


@pytest.fixture(scope="module")
def data(cache_dir: Path) -> TokenData:
    return prepare(str(CORPUS), "bpe:400", LENGTH, cache_dir, OF_SMALL)


def by_hand(data: TokenData) -> dict[str, torch.Tensor]:
    """FedAvg in float64: each client an own copy of the model and an own AdamW that lives on."""
    shape = ModelConfig(n_layer=2, d_model=64, d_state=16, headdim=16)
    assert resolve("fed_avg", {"config": "tiny"}).model == shape
    model = Mamba2LM(shape, data.vocab_size)
    model.init_weights(0)
    model = model.double()
    bounds = [k * len(data.train) // CLIENTS for k in range(CLIENTS + 1)]
    shards = [data.train[a:b].astype(np.int64) for a, b in itertools.pairwise(bounds)]
    clients = [copy.deepcopy(model) for _ in shards]
    optimizers = [torch.optim.AdamW(c.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
                  for c in clients]
    orders = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, k, 0]))).permutation(
        len(shard)) for k, shard in enumerate(shards)]
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for round_ in range(ROUNDS):
        for k, client in enumerate(clients):
            client.load_state_dict(state)
            for update in range(LOCAL_UPDATES):
                step = round_ * LOCAL_UPDATES + update
                rows = orders[k][step * BATCH:(step + 1) * BATCH]
                tokens = torch.from_numpy(shards[k][rows])
                logits = client(tokens)[:, :-1]
                loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                optimizers[k].zero_grad()
                loss.backward()
                optimizers[k].step()
        total = sum(len(shard) for shard in shards)
        state = {name: sum(len(shard) / total * client.state_dict()[name]
                           for shard, client in zip(shards, clients, strict=True))
                 for name in state}
    return state


def test_rounds_by_hand_equal_rounds_of_fedrun(run: Run, data: TokenData) -> None:
    expected = by_hand(data)
    flags = ("--rounds", ROUNDS, "--num_clients", CLIENTS, "--local_updates", LOCAL_UPDATES)
    for dtype, tolerance in (("fp64", 1e-9), ("fp32", 1e-4)):
        outcome = run("fed_avg", *flags, "--dtype", dtype, name=dtype)
        assert outcome.code == 0, outcome.output
        assert outcome.config["dtype"] == dtype
        for name, value in outcome.model.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)
