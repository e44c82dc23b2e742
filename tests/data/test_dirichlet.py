"""--partition dirichlet: clients whose mixes of topics differ as much as alpha says."""

from __future__ import annotations

import numpy as np
import pytest

from fedrun.data.partition import client_shards, deal_topics, shard_sizes
from fedrun.data.shard_stats import describe_shards
from fedrun.data.tokens import TokenData
from tests.support.made_data import made


def dealt_by_hand(topic: list[int], document: list[int], sizes: list[int], alpha: float,
                  random: np.random.Generator) -> list[int]:
    """Hsu et al.'s scheme without replacement, sequence by sequence, in plain Python."""
    kinds = sorted(set(topic))
    turn = random.permutation(max(document) + 1)
    piles = {k: sorted((i for i, t in enumerate(topic) if t == k),
                       key=lambda i: (turn[document[i]], i)) for k in kinds}
    prior = [len(piles[k]) / len(topic) for k in kinds]
    owner = [-1] * len(topic)
    for client in random.permutation(len(sizes)):
        mix = dict(zip(kinds, random.dirichlet([alpha * p for p in prior]), strict=True))
        wants = sizes[client]
        while wants:
            mix = {k: q for k, q in mix.items() if piles[k] and q > 0}
            if not mix:
                mix = {k: float(len(piles[k])) for k in kinds if piles[k]}
            quotas = {k: wants * (q / sum(mix.values())) for k, q in mix.items()}
            whole = {k: int(q) for k, q in quotas.items()}
            by_remainder = sorted(quotas, key=lambda k: (whole[k] - quotas[k], k))
            for k in by_remainder[:wants - sum(whole.values())]:
                whole[k] += 1
            for k, count in whole.items():
                taken, piles[k] = piles[k][:count], piles[k][count:]
                wants -= len(taken)
                for i in taken:
                    owner[i] = int(client)
    return owner


@pytest.mark.parametrize("alpha", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_dirichlet_equals_the_scheme_by_hand(alpha: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    document = np.sort(random.integers(30, size=400))
    topic = random.integers(6, size=30)[document]
    sizes = shard_sizes(400, 7, 0.8, seed)
    ours = deal_topics(topic, document, sizes, alpha, np.random.default_rng([seed, 1]))
    theirs = dealt_by_hand(topic.tolist(), document.tolist(), sizes.tolist(), alpha,
                           np.random.default_rng([seed, 1]))
    assert ours.tolist() == theirs


def test_a_large_alpha_gives_all_clients_the_mix_of_the_whole() -> None:
    data = made([40] * 90)
    topic = data.topics.of_document[data.documents.of_sequences(*data.train.shape)]
    shards = client_shards(data, 5, "dirichlet", 1e9, 0.5, 0)
    whole = np.bincount(topic) / len(topic)
    for shard in shards:
        assert np.abs(np.bincount(topic[shard], minlength=3) - len(shard) * whole).max() <= 1


def test_a_smaller_alpha_diverges_more_on_real_text(pydocs_tokens: TokenData) -> None:
    def mean_divergence(partition: str, alpha: float = 1.0) -> float:
        found = [held.divergence for seed in range(3) for held in describe_shards(
            pydocs_tokens, client_shards(pydocs_tokens, 6, partition, alpha, 0.0, seed))]
        return float(np.mean(found))

    random, mild, strong = (mean_divergence("shuffled"), mean_divergence("dirichlet", 100.0),
                            mean_divergence("dirichlet", 0.1))
    assert random < mild < strong
    assert strong > 1.5 * mild
