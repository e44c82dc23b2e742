"""Batches: which sequences a client sees at which step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrun.data.batches import Batches

sizes = st.integers(1, 30).flatmap(
    lambda batch: st.tuples(st.integers(batch, 3 * batch + 7), st.just(batch))
)
seeds = st.integers(0, 2**32 - 1)


def stream(n_sequences: int, batch_size: int, seed: int, client: int, passes: int) -> np.ndarray:
    """The reference: the permutations of the first passes, concatenated."""
    return np.concatenate(
        [np.random.default_rng([seed, client, p]).permutation(n_sequences) for p in range(passes)]
    )


@given(size=sizes, seed=seeds, client=st.integers(0, 300))
def test_batches_are_the_stream_of_permutations(
    size: tuple[int, int], seed: int, client: int
) -> None:
    n_sequences, batch_size = size
    n_steps = 4 * n_sequences // batch_size
    batches = Batches(n_sequences, batch_size, seed, client)
    seen = np.concatenate([batches.indices(step) for step in range(n_steps)])
    expected = stream(n_sequences, batch_size, seed, client, passes=4)[: n_steps * batch_size]
    np.testing.assert_array_equal(seen, expected)
    for begin in range(0, len(seen) - n_sequences + 1, n_sequences):
        one_pass = seen[begin : begin + n_sequences]
        np.testing.assert_array_equal(np.sort(one_pass), np.arange(n_sequences))


@given(size=sizes, seed=seeds, steps=st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_a_batch_does_not_depend_on_what_was_asked_before(
    size: tuple[int, int], seed: int, steps: list[int]
) -> None:
    batches = Batches(*size, seed, client=3)
    for step in steps:
        np.testing.assert_array_equal(
            batches.indices(step), Batches(*size, seed, client=3).indices(step)
        )


def test_seeds_clients_and_passes_are_permuted_differently() -> None:
    orders = [
        tuple(Batches(50, 50, seed, client).indices(step))
        for seed in (0, 1)
        for client in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(orders)) == len(orders)


def test_read_takes_the_rows_of_the_shard() -> None:
    sequences = np.arange(20 * 3, dtype=np.uint16).reshape(20, 3)
    shard = np.array([7, 2, 9, 10, 19, 12])
    batches = Batches(len(shard), 4, seed=5, client=1)
    batch = batches.read(2, sequences, shard)
    assert batch.dtype == np.int64
    assert batch.tolist() == [[3 * shard[i] + k for k in range(3)] for i in batches.indices(2)]
    read = np.concatenate([batches.read(step, sequences, shard) for step in range(3)])
    assert sorted(read[:6, 0] // 3) == sorted(shard)


def test_a_shard_smaller_than_a_batch_names_client_and_flags() -> None:
    with pytest.raises(ValueError, match=r"client 2: .* 3 .*--batch_size.*--num_clients"):
        Batches(3, 4, seed=0, client=2)
