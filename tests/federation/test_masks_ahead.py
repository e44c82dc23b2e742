"""Masks that are made beside the training: where a core and memory are free, for one sum alone, and
with the same bits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedrun.data.sites import Sites
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import VECTOR, SecureSum
from fedrun.federation.site_keys import Leader
from fedrun.secure import Replayed
from fedrun.secure.masks import Mask
from tests.support.runs import Run
from tests.support.site_runs import SITES, config_with, make_leaders, make_sites

SIZE = 100_003
MODEL = torch.zeros(SIZE)
TYPES = {32: np.int32, 64: np.int64}


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return make_sites(tmp_path, 1, 1, 1)


@pytest.fixture
def leaders(tmp_path: Path, sites: Sites) -> dict[str, Leader]:
    return make_leaders(tmp_path, sites, "run 1")


@pytest.fixture
def made_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which masks are made, as they are."""
    threads: list[str] = []
    healthy = Mask.add_to

    def add_to(mask: Mask, vector: np.ndarray) -> None:
        healthy(mask, vector)
        threads.append(threading.current_thread().name)

    monkeypatch.setattr(Mask, "add_to", add_to)
    return threads


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def busy(leader: Leader) -> threading.Event:
    """Keep the leader's thread from its work until the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait(20)

    leader._pool.submit(wait)
    assert begun.wait(20)
    return go_on


def sum_with(leaders: dict[str, Leader], number: int, bits: int) -> None:
    """North's masked term and those of the others, masked now, sum to the plain ones."""
    random = np.random.default_rng(number)
    terms = random.integers(-1000, 1000, (len(leaders), SIZE), TYPES[bits])
    sent = terms.copy()
    for leader, vector in zip(leaders.values(), sent, strict=True):
        leader.mask(number, VECTOR, bits).add_to(vector)
    assert not np.array_equal(sent[0], terms[0])
    assert np.array_equal(sent.sum(0, TYPES[bits]), terms.sum(0, TYPES[bits]))


@pytest.mark.parametrize(("cores", "threads", "processes", "free", "ahead"), [
    (2, 1, 1, 1.0, True), (4, 1, 3, 1.0, True), (1, 1, 1, 1.0, False), (2, 2, 1, 1.0, False),
    (2, 1, 2, 1.0, False), (9, 3, 3, 1.0, False), (2, 1, 1, 1e-3, False)])
def test_where_a_core_and_memory_are_free(
        tmp_path: Path, sites: Sites, leaders: dict[str, Leader], made_in: list[str],
        monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, processes: int, free: float,
        ahead: bool) -> None:
    """free: memory, in GB, for a mask of 0.4 MB."""
    config = config_with(tmp_path, flags={"threads": str(threads)})
    schedule = Schedule(config, [20] * 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    memory: Any = type("Memory", (), {"available": free * 1e9, "total": 64e9})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    secure = SecureSum(config, sites, schedule, 50, DataPlane(), 0, leaders["north"], processes)
    secure.begin(schedule.plan(1, config.strategy.first_entropy_reference(50, 3)), MODEL)
    secure.make_ahead(SIZE, 32)
    if ahead:
        wait_until(lambda: made_in)  # before anybody asks for it
    assert len(made_in) == ahead
    sum_with(leaders, 1, 32)
    north, *others = made_in
    assert north.startswith("fedrun-site") == ahead
    assert others == [threading.main_thread().name] * 2
    for leader in leaders.values():
        leader.close()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("begun", [True, False])
def test_the_bits_are_those_of_masks_made_when_they_are_added(
        leaders: dict[str, Leader], made_in: list[str], bits: int, begun: bool) -> None:
    """begun: whether the thread has come to it; else it is made by whom asks for it."""
    north = leaders["north"]
    go_on = busy(north)
    for number in (1, 2, 5):
        north.make_ahead(number, VECTOR, SIZE, bits)
        if begun:
            go_on.set()
            wait_until(lambda: made_in)
        sum_with(leaders, number, bits)
        assert made_in.pop(0).startswith("fedrun-site") == begun
        made_in.clear()
    go_on.set()
    north.close()


@pytest.mark.parametrize("begun", [True, False])
def test_it_is_added_once(leaders: dict[str, Leader], made_in: list[str], begun: bool) -> None:
    north = leaders["north"]
    go_on = busy(north)
    north.make_ahead(1, VECTOR, SIZE, 32)
    if begun:
        go_on.set()
        wait_until(lambda: made_in)
    mask = north.mask(1, VECTOR, 32)
    mask.add_to(np.zeros(SIZE, np.int32))
    again = np.zeros(SIZE, np.int32)
    with pytest.raises(Replayed):
        mask.add_to(again)
    with pytest.raises(Replayed):
        north.mask(1, VECTOR, 32)
    with pytest.raises(Replayed):
        north.make_ahead(1, VECTOR, SIZE, 32)
    assert not again.any()
    go_on.set()
    north.close()


@pytest.mark.parametrize(("made", "dtype"), [(1, np.int32), (SIZE, np.int64)])
def test_it_is_added_to_no_other_vector(leaders: dict[str, Leader], made_in: list[str], made: int,
                                        dtype: type) -> None:
    """numpy would add one number to all elements, and 32 bits to 64."""
    leaders["north"].make_ahead(1, VECTOR, made, 32)
    wait_until(lambda: made_in)
    vector: np.ndarray = np.zeros(SIZE, dtype)
    with pytest.raises(TypeError, match="the mask is of int32"):
        leaders["north"].mask(1, VECTOR, 32).add_to(vector)
    assert not vector.any()
    leaders["north"].close()


def test_another_sum_has_its_own_mask(tmp_path: Path, sites: Sites, leaders: dict[str, Leader],
                                      made_in: list[str]) -> None:
    """What was made for a round that made no sum, or at a start with other keys, is left."""
    north = leaders["north"]
    north.make_ahead(1, VECTOR, SIZE, 32)
    wait_until(lambda: made_in)
    sum_with(leaders, 2, 32)  # by a mask of round 2, or the others' would not cancel it
    assert made_in[1:] == [threading.main_thread().name] * 3
    north.make_ahead(3, VECTOR, SIZE, 32)
    resumed = make_leaders(tmp_path, sites, "run 1")
    sum_with(resumed, 3, 32)
    fewer = Sites(sites.run_name, sites.server, sites.sites[1:])
    with pytest.raises(Exception, match="2 sites: a secure sum needs 3"):
        make_leaders(tmp_path, fewer, "run 1")
    for leader in (*leaders.values(), *resumed.values()):
        leader.close()


def site_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()
            if thread.name.startswith("fedrun-site")]


def test_the_thread_ends_with_the_run(leaders: dict[str, Leader], made_in: list[str]) -> None:
    before = len(site_threads())
    north, *_ = leaders.values()
    go_on = busy(north)
    north.make_ahead(1, VECTOR, SIZE, 32)
    assert len(site_threads()) == before + 1
    north.close()  # waits for nothing
    go_on.set()
    wait_until(lambda: len(site_threads()) == before)
    assert not made_in, "what had not begun is not made"


def test_a_run_that_fails_in_training_ends_it(
        tmp_path: Path, sites: Sites, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[SecureSum] = []
    monkeypatch.setattr(SecureSum, "close", lambda secure: closed.append(secure))

    def train(*_: Any, **__: Any) -> None:
        raise RuntimeError("a client fails")

    monkeypatch.setattr(Client, "train", train)
    texts = tmp_path / "texts"
    for name in sites.names:
        (texts / name).mkdir(parents=True)
        (texts / name / "a.txt").write_text(f"{name} has a text of its own. " * 200)
    ended = run_here("fed_avg", "--sites", tmp_path / SITES, "--site_data",
                     texts / "{site}" / "*.txt", "--secure_sum", "--rounds", 1,
                     "--local_updates", 2)
    assert ended.code == 1
    assert "a client fails" in ended.output
    assert len(closed) == 1
