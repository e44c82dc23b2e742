"""What a CPU sees of the clients' states on a GPU: how much memory they take, and how long."""

from __future__ import annotations

import weakref
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrun.federation.client import Client, ClientState
from fedrun.federation.client_store import InMemory
from tests.support.fake_gpu import SECONDS, FakeGpu, OnGpu, on_gpu

SIZE, CLIENTS = 5000, 3
STEPS_DONE = {"steps_done": torch.tensor(0)}
MOMENTS = ("adamw.exp_avg", "adamw.exp_avg_sq")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def store() -> InMemory:
    return InMemory(dict.fromkeys(range(CLIENTS), STEPS_DONE), torch.device("cuda", 0), SECONDS)


def state(value: float, *more: str) -> dict[str, Tensor]:
    return STEPS_DONE | {"adamw.step": torch.tensor(float(value))} | {
        name: torch.full((SIZE,), float(value)) for name in (*MOMENTS, *more)}


def check_in(states: InMemory, gpu: FakeGpu, client: int, held: dict[str, Tensor]) -> None:
    """After a turn whose training is over."""
    states.checkin(client, held)
    gpu.training.events[-1].reached.set()
    states._settle()


def test_a_client_takes_eight_bytes_of_pinned_memory_a_parameter(gpu: FakeGpu) -> None:
    """And as much again for each vector more, also if that comes and goes."""
    states = store()
    assert gpu.locked == {}
    for turn in range(3):
        for client in range(CLIENTS):
            check_in(states, gpu, client, state(turn))
    moments = CLIENTS * (8 * SIZE + 4)  # and the number of steps
    assert sum(gpu.locked.values()) == moments
    for turn in range(3):
        check_in(states, gpu, 0, state(turn, "parameters"))
        check_in(states, gpu, 0, state(turn))
    assert sum(gpu.locked.values()) == moments + 4 * SIZE
    check_in(states, gpu, 1, state(7))
    held = states._read(1)
    assert sorted(held) == ["adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step", "steps_done"]
    assert all(held[name].eq(7).all() for name in MOMENTS)
    assert states._read(0)[MOMENTS[0]].eq(2).all()
    states.close(SECONDS)


def test_a_state_is_freed_as_soon_as_its_training_is_over(gpu: FakeGpu) -> None:
    """And not before. Then nothing uses its memory any more, so that no stream holds it back."""
    states, fetched = store(), Future[ClientState]()
    fetched.set_result({name: on_gpu(tensor) for name, tensor in state(3).items()})
    states._fetched = 0, fetched
    taken = dict(states.checkout(0))
    del fetched
    assert OnGpu.recorded == []
    alive = weakref.ref(taken[MOMENTS[0]])
    states.checkin(0, taken)
    del taken
    states._timeout = 0.3
    with pytest.raises(TimeoutError):
        states._settle()
    assert alive() is not None
    states._timeout = SECONDS
    gpu.training.events[-1].reached.set()
    states._settle()
    states._thread.submit(int).result(SECONDS)  # after the thread has let go of it
    assert alive() is None
    states.close(SECONDS)


def test_what_a_client_forgets_in_its_turn_is_kept_for_its_training(gpu: FakeGpu) -> None:
    """The store's stream, whose memory it is, does not know when that is over."""
    client: Any = SimpleNamespace(vectors={"parameters": on_gpu(torch.ones(3)), "residual": 0},
                                  optimizer=SimpleNamespace(reset=int))
    Client.forget(client)
    Client.forget(client)  # of one that has none
    assert client.vectors == {"residual": 0}
    assert OnGpu.recorded == [gpu.training]
