"""Every client on exactly one worker, loads balanced, nobody idle who could work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedrun.placement import place


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 12))
def test_properties(sizes: list[int], workers: int) -> None:
    hosted = place(sizes, workers)
    assert len(hosted) == workers
    assert sorted(k for clients in hosted for k in clients) == list(range(len(sizes)))
    loads = [sum(sizes[k] for k in clients) for clients in hosted]
    best_possible = max(sum(sizes) / workers, max(sizes))
    assert max(loads) <= (4 / 3) * best_possible + max(sizes) / 3  # Graham's bound, loosened
    if workers <= len(sizes):
        assert all(hosted)


def test_equal_clients_are_spread_evenly() -> None:
    assert sorted(len(c) for c in place([5] * 7, 3)) == [2, 2, 3]
    assert place([5] * 4, 4) == [[0], [1], [2], [3]]
    assert place([5, 5], 4) == [[0], [1], [], []]
