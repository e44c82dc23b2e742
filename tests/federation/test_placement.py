"""Every client on exactly one worker, loads balanced, nobody idle who could work."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation.placement import Placement, assign_clients
from fedrun.flags import resolve
from tests.support.experiments import worker_of
from tests.support.made_data import made


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 12))
def test_every_client_has_one_worker_and_loads_are_balanced(sizes: list[int], workers: int) -> None:
    hosted = assign_clients(sizes, workers)
    assert len(hosted) == workers
    assert sorted(k for clients in hosted for k in clients) == list(range(len(sizes)))
    loads = [sum(sizes[k] for k in clients) for clients in hosted]
    best_possible = max(sum(sizes) / workers, max(sizes))
    assert max(loads) <= (4 / 3) * best_possible + max(sizes) / 3  # Graham's bound, loosened
    if workers <= len(sizes):
        assert all(hosted)


def test_equal_clients_are_spread_evenly() -> None:
    assert sorted(len(c) for c in assign_clients([5] * 7, 3)) == [2, 2, 3]
    assert assign_clients([5] * 4, 4) == [[0], [1], [2], [3]]
    assert assign_clients([5, 5], 4) == [[0], [1], [], []]


@given(st.integers(1, 40), st.integers(1, 7), st.data(), st.booleans())
def test_every_client_of_a_cohort_has_one_worker(clients: int, workers: int, data: st.DataObject,
                                                 stateless: bool) -> None:
    placement = Placement(workers, None if stateless else assign_clients([1] * clients, workers))
    cohort = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
    turns = placement.turns(cohort)
    assert len(turns) == workers
    assert sorted(k for one in turns for k in one) == cohort
    assert max(map(len, turns)) <= placement.most(len(cohort))
    if stateless:
        assert max(map(len, turns)) - min(map(len, turns)) <= 1


def test_a_client_with_a_long_shard_does_not_train_longer() -> None:
    """A round is as many local updates for each, so that each of two workers has half of them."""
    config = resolve("fed_avg", {"config": "tiny", "num_clients": "8", "size_skew": "2",
                                 "rounds": "1", "batch_size": "1", "sequence_length": "4",
                                 "seed": "0", "dtype": "fp32", "device": "cpu"})
    assert isinstance(config, FederatedConfig)
    runtime = Runtime(detect({}), torch.device("cpu"), (0, 1), ControlPlane(), DataPlane())
    data = made([8000])
    worker = worker_of(config, data, runtime)
    assert len(assign_clients(worker.shards.sizes, 2)[0]) != 4, "these shards would do either way"
    assert len(worker.clients) == 4
