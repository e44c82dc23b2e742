"""Statistics of clients' shards: sizes, topics, and divergence from the whole train split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedrun.data.tokens import TokenData

SEQUENCES_AT_ONCE = 4096


@dataclass(frozen=True)
class ShardStats:
    """The shard of one client."""

    sequences: int
    tokens: int
    documents: int
    """The number of documents with at least one sequence in the shard."""
    topics: np.ndarray
    """Tokens in sequences whose document has the topic, int64, (n_topics,)."""
    divergence: float
    """Jensen-Shannon divergence of token unigrams from the whole train split's, in bits."""
    divergence_at_random: float
    """The same for equally many sequences drawn at random: small shards diverge by chance alone."""


def describe_shards(data: TokenData, shards: Sequence[np.ndarray], seed: int = 0
                    ) -> list[ShardStats]:
    """The statistics of each shard.

    Args:
        shards: indices of rows of data.train, which together contain every sequence
        seed: of the random sequences for `divergence_at_random`
    """
    document = data.load_documents().of_sequences(*data.train.shape)
    topic = data.load_topics().of_document[document]
    unigrams = [token_counts(data, shard) for shard in shards]
    whole = np.sum(unigrams, axis=0)
    random = np.random.default_rng([seed, *b"holdings"])
    length = data.train.shape[1]
    stats = []
    for shard, counts in zip(shards, unigrams, strict=True):
        drawn = np.sort(random.choice(len(data.train), size=len(shard), replace=False))
        stats.append(ShardStats(
            len(shard), len(shard) * length, len(np.unique(document[shard])),
            length * np.bincount(topic[shard], minlength=topic.max() + 1),
            js_divergence(counts, whole), js_divergence(token_counts(data, drawn), whole)))
    return stats


def token_counts(data: TokenData, shard: np.ndarray) -> np.ndarray:
    """The number of times each token occurs in a shard; int64, (vocab_size,)."""
    counts = np.zeros(data.vocab_size, dtype=np.int64)
    for begin in range(0, len(shard), SEQUENCES_AT_ONCE):
        ids = data.train[shard[begin:begin + SEQUENCES_AT_ONCE]].ravel()
        counts += np.bincount(ids, minlength=data.vocab_size)
    return counts


def js_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions given as counts, in bits (0 to 1).

    H(M) - (H(P) + H(Q)) / 2 with M = (P + Q) / 2 and H the entropy (Lin 1991, "Divergence Measures
    Based on the Shannon Entropy", section IV, equal weights).
    """
    p, q = p / p.sum(), q / q.sum()
    return max(0.0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return -float((p * np.log2(p)).sum())
