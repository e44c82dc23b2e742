"""Batches: the order in which a client trains on its shard (partition.py makes the shards)."""

from __future__ import annotations

import numpy as np

from fedrun.common.errors import InputError


class Batches:
    """The batches of one client: an endless concatenation of permutations of its shard.

    The permutation of pass p is seeded with (seed, client, p), so that a batch depends on (seed,
    client, step) alone, not on the rank or on earlier batches. Each pass visits every sequence
    exactly once; a batch may contain the end of one pass and the beginning of the next.

    Raises:
        InputError: the shard has fewer sequences than a batch.
    """

    def __init__(self, n_sequences: int, batch_size: int, seed: int, client: int) -> None:
        assert batch_size > 0
        if n_sequences < batch_size:
            raise InputError(
                f"client {client}: its shard has {n_sequences} sequences, fewer than a batch of "
                f"{batch_size}; use a smaller --batch_size, --num_clients or --size_skew"
            )
        self.n_sequences = n_sequences
        self.batch_size = batch_size
        self.seed = seed
        self.client = client
        self._permutations: dict[int, np.ndarray] = {}  # by pass, for the last batch

    def indices(self, step: int) -> np.ndarray:
        """The positions within the shard of the sequences of batch `step` (0, 1, ...).

        Returns:
            int64, (batch_size,)
        """
        assert step >= 0
        n, begin = self.n_sequences, step * self.batch_size  # in the endless stream
        end = begin + self.batch_size
        passes = range(begin // n, (end - 1) // n + 1)  # one or two
        self._permutations = {p: self._permutation(p) for p in passes}
        return np.concatenate(
            [self._permutations[p][max(begin - p * n, 0) : end - p * n] for p in passes]
        )

    def read(self, step: int, sequences: np.ndarray, shard: np.ndarray) -> np.ndarray:
        """The sequences of batch `step`.

        Args:
            sequences: all sequences, (n, sequence_length)
            shard: indices of rows of `sequences`, those of this client

        Returns:
            int64, (batch_size, sequence_length): a copy
        """
        assert len(shard) == self.n_sequences
        batch: np.ndarray = sequences[shard[self.indices(step)]]
        return batch.astype(np.int64)

    def _permutation(self, pass_: int) -> np.ndarray:
        if pass_ in self._permutations:
            return self._permutations[pass_]
        entropy = np.random.SeedSequence([self.seed, self.client, pass_])
        return np.random.Generator(np.random.PCG64(entropy)).permutation(self.n_sequences)


class DrawnBatches(Batches):
    """The batches of one client, drawn with replacement.

    The draw of batch `step` is seeded with (seed, client, step).
    """

    def indices(self, step: int) -> np.ndarray:
        entropy = np.random.SeedSequence([self.seed, self.client, step])
        generator = np.random.Generator(np.random.PCG64(entropy))
        return generator.integers(self.n_sequences, size=self.batch_size)


def make_batches(sampling: str, n_sequences: int, batch_size: int, seed: int, client: int
                 ) -> Batches:
    """The batches of a client, for a value of --sampling: shuffle or replacement."""
    kind = {"shuffle": Batches, "replacement": DrawnBatches}[sampling]
    return kind(n_sequences, batch_size, seed, client)
