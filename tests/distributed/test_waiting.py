"""A worker that waits for the others in a sum learns who is lost, whatever the library does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from fedrun.distributed import waiting
from fedrun.distributed.control_plane import ControlPlane, Heartbeat, UnresponsiveRanks
from fedrun.distributed.handshake import Membership
from fedrun.distributed.waiting import wait_for
from tests.support.runs import SMALL, children_of, error_lines, fault, start, torchrun, wait_until


class Peers(ControlPlane):
    """The other ranks, as the heartbeat would see them."""

    def __init__(self, timeout: float = 60, failed: bool = False, *looks: list[int]) -> None:
        super().__init__(timeout=timedelta(seconds=timeout))
        self.failed, self.looks = failed, list(looks)

    def peer_failed(self) -> bool:
        return self.failed

    def lost_peers(self) -> list[int]:
        time.sleep(0.01)
        return self.looks.pop(0) if len(self.looks) > 1 else (self.looks or [[]])[0]


class Work:
    """A collective that ends after some time, or never; with an error, or well."""

    def __init__(self, seconds: float = 1e9, error: str = "") -> None:
        self.end, self.error, self.waited = time.monotonic() + seconds, error, False

    def is_completed(self) -> bool:
        return time.monotonic() > self.end

    def wait(self) -> None:
        self.waited = True
        if self.error:
            raise RuntimeError(self.error)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS_BEFORE_LOOKING", 0.05)
    monkeypatch.setattr(waiting, "SECONDS_BETWEEN_LOOKS", (0.01, 0.1))


def wait(work: Any, control: ControlPlane, polled: bool = True) -> None:
    wait_for(work, control, polled)


def test_a_collective_that_ends() -> None:
    work = Work(0.3)
    wait(work, Peers(60, False, [2], []))  # rank 2 was silent in one look only
    assert work.waited  # for the GPU's next kernels


def test_an_error_of_this_ranks_own_gpu_is_not_called_a_lost_peer() -> None:
    class Failed(Work):
        def is_completed(self) -> bool:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        wait(Failed(), Peers())


def test_what_has_ended_is_not_waited_for() -> None:
    wait(None, Peers())


def test_a_rank_that_failed_ends_the_wait_at_once() -> None:
    with pytest.raises(UnresponsiveRanks, match="rank 0 waits for a sum over the workers"):
        wait(Work(), Peers(60, True))


def test_a_rank_that_is_silent_in_two_looks_is_named() -> None:
    with pytest.raises(UnresponsiveRanks,
                       match=r"no heartbeat from rank 2; rank 0 waits for a sum"):
        wait(Work(), Peers(60, False, [], [1, 2], [2]))


def test_a_lost_rank_is_named_with_its_site() -> None:
    peers = Peers(0.2, False, [2, 0])
    peers.membership = Membership("run", ("", "north", "south"))
    with pytest.raises(UnresponsiveRanks,
                       match=r"no heartbeat from rank 0 \(the server\), 2 \(south\); rank"):
        wait(Work(), peers)


def test_nobody_waits_for_longer_than_the_timeout() -> None:
    with pytest.raises(UnresponsiveRanks, match=r"it has taken longer than --timeout \(0.2 s\)"):
        wait(Work(), Peers(0.2))


@pytest.mark.parametrize("polled", [True, False])
def test_a_timeout_of_the_library_names_who_is_lost(polled: bool) -> None:
    work = Work(0, "Timed out\nand more")
    with pytest.raises(UnresponsiveRanks, match=r"no heartbeat from rank 1; rank 0 waits for a sum "
                                                r"over the workers .*: Timed out$"):
        wait(work, Peers(0, False, [1]), polled)


@pytest.mark.parametrize("polled", [True, False])
def test_a_closed_connection_is_told_at_once(monkeypatch: pytest.MonkeyPatch, polled: bool) -> None:
    """Looking who is silent takes seconds, in which the launcher would end the server."""
    def slow() -> list[int]:
        raise AssertionError("no time for that")

    monkeypatch.setattr(waiting, "SECONDS_FOR_REASON", 0.05)
    peers = Peers(60)
    monkeypatch.setattr(peers, "lost_peers", slow)
    with pytest.raises(UnresponsiveRanks, match=r"^rank 0 waits for a sum .*: Connection closed$"):
        wait(Work(0, "Connection closed"), peers, polled)


@pytest.fixture
def heartbeat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    """That of rank 0; rank 1 beats every 0.8 s, as one whose lock a compiler holds."""
    monkeypatch.setattr(Heartbeat, "SECONDS", 0.05)
    store, over = HashStore(), Event()

    def beat() -> None:
        while not over.wait(0.8):
            store.add("beats/1", 1)

    mine, thread = Heartbeat(store, 0, 2), Thread(target=beat)
    thread.start()
    yield mine
    over.set()
    thread.join()
    mine.stop()


def test_while_kernels_are_compiled_a_rank_may_be_silent_for_longer(heartbeat: Heartbeat) -> None:
    control = ControlPlane(heartbeat=heartbeat)
    assert control.lost_peers() == [1]  # between 0.3 and 0.6 s after a beat
    control.compiling(True)
    assert control.lost_peers() == []
    control.compiling(False)
    assert heartbeat.silent_beats == Heartbeat.LOST


@pytest.mark.slow
@pytest.mark.parametrize("server", ["dedicated", "colocated"])
def test_a_worker_that_is_lost_in_a_sum_is_named(server: str, cache_dir: Path, tmp_path: Path
                                                 ) -> None:
    """Long before the timeout, by workers that poll; also where the server is one of them."""
    log = tmp_path / "log"
    command = [*torchrun(4), "-m", "tests.support.as_if_gpus", "fed_avg", *SMALL, "--data_dir",
               str(tmp_path), "--cache_dir", str(cache_dir), "--run_name", "run", "--rounds", "9",
               "--num_clients", "4", "--timeout", "600", "--server", server]
    launcher = start(command, log, fault(tmp_path, "stop", "reduce:2", rank=2))
    with children_of(launcher):
        wait_until(lambda: (tmp_path / "struck").exists(), 60, log.read_text)
        wait_until(lambda: "no heartbeat from rank 2" in log.read_text(), 40, log.read_text)
        assert error_lines(log.read_text())
