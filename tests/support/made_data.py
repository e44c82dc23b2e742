"""Token data with given documents, topics and sources, for tests of partitions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedrun.data.documents import Documents, named_documents
from fedrun.data.tokens import TokenData
from fedrun.data.topics import Topics


@dataclass(frozen=True)
class MadeData(TokenData):
    """Token data whose documents and topics are given instead of read from the cache."""

    documents: Documents
    topics: Topics

    def load_documents(self) -> Documents:
        return self.documents

    def load_topics(self) -> Topics:
        return self.topics


def made(lengths: list[int], sequence_length: int = 4, n_topics: int = 3, n_sources: int = 5,
         vocab_size: int = 50) -> MadeData:
    """Documents with these numbers of tokens; topics and sources are assigned in turn."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    numbers = np.arange(len(lengths))
    n_sequences = int(starts[-1]) // sequence_length
    train = np.random.default_rng(0).integers(vocab_size, size=(n_sequences, sequence_length),
                                              dtype=np.uint16)
    documents = named_documents("a test", starts[:-1], int(starts[-1]),
                                [f"source {n % n_sources}" for n in numbers])
    return MadeData(train, train[:1], vocab_size, {"dataset": "made"}, Path(), documents,
                    Topics(numbers % n_topics, np.arange(n_topics)[:, None]))
