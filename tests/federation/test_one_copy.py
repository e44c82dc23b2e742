"""The federated part of a round, its local training left out: what a worker allocates and copies.

Allocations are the allocator's own record of them, which sees into every operation; copies are the
operations that are asked to make one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation import client_measures
from fedrun.federation.client import Client, LocalLosses
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from tests.support import experiments
from tests.support.made_data import made

CLIENTS = 3
DATA = made([400] * CLIENTS, vocab_size=3000)  # so that a model is some slices of the sums long


def train(client: Client, _model: Any, steps: int, first_step: int, *_: Any,
          fisher: Any = None, **__: Any) -> LocalLosses:
    """No training, but of AdamW's moments and of the Fisher diagonal what they leave behind."""
    client.flat.grad.fill_(0.01 * (client.index + 1))
    client.optimizer.step(first_step)
    client.steps_done += steps
    if fisher:
        fisher.diagonal.add_(1e-3)
        fisher._batches += steps
    return LocalLosses(torch.zeros((), dtype=torch.float64), 4)


def gradient(client: Client, _model: Any, _gradients: Any) -> LocalLosses:
    client.flat.grad.fill_(0.01 * (client.index + 1))
    return LocalLosses(torch.zeros((), dtype=torch.float64), 4)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "train", train)
    monkeypatch.setattr(Client, "gradient", gradient)
    monkeypatch.setattr(client_measures, "mean_entropy", lambda *_: 5.0)


def worker_of(method: str, flags: dict[str, str], plane: DataPlane | None = None) -> Worker:
    """Alone, of all clients; every round is evaluated, so that its norms are taken."""
    config = resolve(method, {"config": "tiny", "num_clients": str(CLIENTS), "rounds": "9",
                              "batch_size": "2", "sequence_length": "4", "val_freq": "1",
                              "dtype": "fp32", "device": "cpu", **flags})
    assert isinstance(config, FederatedConfig)
    runtime = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), plane or DataPlane())
    return experiments.worker_of(config, DATA, runtime)


def go_round(worker: Worker, number: int) -> None:
    plan = worker.schedule.plan(number, worker.strategy.first_entropy_reference(3000, CLIENTS))
    clients = worker.train(plan).clients
    assert all(not client.left_out and client.weight > 0 for client in clients)
    worker.aggregate(plan)


class Copies(TorchDispatchMode):
    """Counts the operations that copy a whole vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "clone", "_to_copy"):
            self.count += isinstance(out, Tensor) and out.numel() >= self.size
        return out


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes that torch holds more than at the start, after each time that it takes some inside;
    when it is over."""
    taken: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield taken
    assert seen.profiler is not None
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in seen.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    taken += accumulate(change for _, change in changes)


CASES = [
    ("fed_avg", {}, 1), ("fed_avg", {"client_moments": "reset"}, 1),
    ("fed_avg", {"client_moments": "average"}, 1), ("fed_avg", {"aggregation": "float"}, 1),
    ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": "1"}, 1),
    ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": "1", "moments_every": "3,2"}, 1),
    ("fed_avg", {"client_moments": "average_rows", "grad_clip": "1"}, 1),
    ("fed_avg", {"sync": "epoch"}, 2),  # the clients' own models, kept and loaded
    ("fed_momentum", {}, 1), ("diloco", {}, 1), ("fed_adam", {}, 1), ("fed_yogi", {}, 1),
    ("fed_adagrad", {}, 1), ("fed_entropy", {}, 1), ("fed_fisher", {}, 1),
    ("fed_avg", {"aggregation": "int8"}, 1), ("fed_avg", {"aggregation": "int4"}, 1),
    ("fed_avg", {"aggregation": "int8", "client_moments": "average_sqrt", "grad_clip": "1",
                 "moments_every": "2,1"}, 1),
    ("fed_fisher", {"fisher_floor_mode": "relative"}, 1), ("fed_sgd", {}, 1)]


@pytest.mark.parametrize(("method", "flags", "copies"), CASES)
def test_a_round_copies_a_vector_once_a_client_and_allocates_none(
        method: str, flags: dict[str, str], copies: int, no_training: None) -> None:
    worker = worker_of(method, flags)
    size = worker.flat.size
    assert size > 3 * worker.aggregator._scratch.shape[1]
    buffer = worker.aggregator.buffer.data_ptr()
    for number in (1, 2):
        go_round(worker, number)
    before = worker.global_model.clone()
    with allocations() as taken:
        go_round(worker, 3)
    assert taken, "the allocator is not seen"
    assert max(taken) < 4 * size
    with Copies(size) as copied:
        go_round(worker, 4)
    assert copied.count == copies * CLIENTS
    assert worker.aggregator.buffer.data_ptr() == buffer
    assert not torch.equal(worker.global_model, before)


def test_the_counters_of_copies_and_allocations_count() -> None:
    """Inside of operations too: a norm in another type than its vector's takes a copy."""
    vector = torch.ones(1000)
    with allocations() as taken, Copies(1000) as copied:
        vector.double()
        torch.linalg.vector_norm(vector, dtype=torch.float64)
    assert 8000 <= max(taken) < 8100  # with the norm itself
    assert copied.count == 1
    with allocations() as both:
        kept = vector.double(), vector.double()
    assert max(both) == sum(v.nbytes for v in kept) == 16_000


def test_on_one_worker_no_collective_runs(no_training: None, monkeypatch: pytest.MonkeyPatch
                                          ) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")
    for name in ("all_reduce", "all_gather", "broadcast", "send", "recv", "isend", "irecv"):
        monkeypatch.setattr(dist, name, forbidden)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    group: Any = object()
    for plane in (DataPlane(), DataPlane(group, machine=1)):
        worker = worker_of("fed_avg", {}, plane)
        go_round(worker, 1)
        assert plane.bytes_sent == 0
