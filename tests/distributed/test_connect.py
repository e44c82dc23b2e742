"""How ranks find each other, and what is said where they do not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Thread

import psutil
import pytest
from torch._C._distributed_c10d import HashStore, TCPStore

from fedrun import torchrun as launcher
from fedrun.distributed import connect
from fedrun.distributed.connect import NotConnected, listen, named, reach, roll_call, serve
from fedrun.distributed.control_plane import Heartbeat
from tests.support.runs import (
    ROOT,
    SMALL,
    alive,
    children_of,
    execute,
    free_port,
    start,
    torchrun,
    wait_until,
)

SECOND = timedelta(seconds=1)


def store() -> TCPStore:
    return serve(listen("", 0, one_machine=True), timedelta(seconds=20))


# ---- where the store listens ---------------------------------------------------------------------

def test_torchruns_own_store_is_warned_of() -> None:
    """The real torchrun; one process is enough, since its launcher listens."""
    code = ("import os; from fedrun.distributed.launch import detect; "
            "from fedrun.distributed.connect import exposure; "
            "print('SAID', exposure(detect(os.environ)))")
    ended, output = execute([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--no-python", "--nproc-per-node", "1", sys.executable, "-c", code])
    assert ended == 0, output
    said = next(line for line in output.splitlines() if line.startswith("SAID"))
    assert "listens on all addresses" in said
    assert "whoever reaches it can run code as you" in said


def test_where_the_store_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with listen("nowhere.invalid", 0, one_machine=True) as one:
        assert one.getsockname()[0] == "127.0.0.1"  # the machine's name does not matter
        port = one.getsockname()[1]
        with pytest.raises(NotConnected, match=f"^MASTER_PORT {port} is in use on "):
            listen("anything", port, one_machine=True)
    with pytest.raises(NotConnected, match=r"MASTER_PORT 70000: accepted is a port number"):
        listen("", 70000, one_machine=True)
    with pytest.raises(NotConnected, match=r"MASTER_ADDR nowhere\.invalid: .* cannot resolve"):
        listen("nowhere.invalid", 0, one_machine=False)
    with pytest.raises(NotConnected, match=r"MASTER_ADDR localhost is .* GLOO_SOCKET_IFNAME"):
        listen("localhost", 0, one_machine=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with listen("localhost", 0, one_machine=False) as chosen:
        assert chosen.getsockname()[0] == "127.0.0.1"
    for address in {a.address for each in psutil.net_if_addrs().values() for a in each
                    if a.family == socket.AF_INET and not a.address.startswith("127.")}:
        with listen(address, 0, one_machine=False) as routed:
            assert routed.getsockname()[0] == address


def test_behind_a_translated_address_the_store_listens_everywhere_and_says_so(
        capfd: pytest.CaptureFixture[str]) -> None:
    with listen("192.0.2.1", 0, one_machine=False) as anywhere:
        assert anywhere.getsockname()[0] in ("::", "0.0.0.0")
    assert "MASTER_ADDR 192.0.2.1 (192.0.2.1) is no address of " in capfd.readouterr().err


def test_no_loopback_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")  # as where the interface is down
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(NotConnected, match=r"^the loopback interface \(127.0.0.1\), .* is missing"):
        listen("", 0, one_machine=True)


def test_our_torchrun_refuses_another_rendezvous_and_guesses_no_address(
        capfd: pytest.CaptureFixture[str]) -> None:
    for flags, said in ((["--standalone"], "--standalone, --rdzv-backend and --rdzv-endpoint"),
                        (["--rdzv-backend", "c10d"], "leave them out"),
                        (["--nnodes", "1:2"], "--nnodes 1:2: accepted is one number"),
                        (["--nnodes", "2", "--master-port", "1"], "--master-addr: not set")):
        assert launcher.main([*flags, "--nproc-per-node", "1", "-m", "fedrun"]) == 2
        assert said in capfd.readouterr().err


# ---- who has come --------------------------------------------------------------------------------

def test_names_of_ranks() -> None:
    assert named([3]) == "rank 3"
    assert named([5, 1, 4, 7]) == "ranks 1, 4-5, 7"
    assert named([0, 1], "machine") == "machines 0-1"


def test_a_roll_call_says_whom_it_waits_for_and_ends_naming_them(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connect, "SECONDS_OF_SILENCE", 0.2)
    server = store()
    there = reach("127.0.0.1", server.port, SECOND, served_before=True)
    other = Thread(target=roll_call, args=(there, 2, 3, timedelta(seconds=20)))
    other.start()
    with pytest.raises(NotConnected, match=r"^rank 0 of 3 did not come within 1 s: not started"):
        roll_call(server, 1, 3, SECOND)
    # Once: rank 2 leaves it to rank 1.
    assert capfd.readouterr().err == "fedrun: waits for rank 0 of 3\n"
    roll_call(reach("127.0.0.1", server.port, SECOND, True), 0, 3, SECOND)  # late is in time
    other.join(5)
    assert not other.is_alive()


def test_a_number_given_twice_is_told() -> None:
    server = store()
    server.add("here", 1)
    server.set("here/1", "")
    with pytest.raises(NotConnected, match="2 came, but machine 0 is not among them"):
        roll_call(server, 1, 2, SECOND, "machine")


def test_a_store_that_is_gone_or_deaf_holds_nobody(monkeypatch: pytest.MonkeyPatch,
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connect, "SECONDS_OF_SILENCE", 0.2)
    port, began = free_port(), time.monotonic()
    with pytest.raises(NotConnected, match="the launcher of rank 0 has ended"):
        reach("127.0.0.1", port, timedelta(minutes=5), served_before=True)
    with pytest.raises(NotConnected, match=f"MASTER_PORT {port}: rank 0's store was not reached"):
        reach("127.0.0.1", port, SECOND, served_before=False)
    with (socket.create_server(("127.0.0.1", 0)) as deaf,
          pytest.raises(NotConnected, match="does not answer as a store")):
        reach("127.0.0.1", deaf.getsockname()[1], SECOND, served_before=True)
    assert time.monotonic() - began < 10
    assert f"waits for the store of rank 0 at 127.0.0.1:{port} (" in capfd.readouterr().err


def test_two_who_look_for_silent_ranks_at_once_both_see_them(monkeypatch: pytest.MonkeyPatch
                                                             ) -> None:
    monkeypatch.setattr(Heartbeat, "SECONDS", 0.02)
    beats = Heartbeat(HashStore(), 0, 3)
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(beats.unresponsive)
            time.sleep(0.18)  # the second looks from one's middle on beyond its end
            second = pool.submit(beats.unresponsive)
            assert [first.result(), second.result()] == [[1, 2], [1, 2]]
    finally:
        beats.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("at", "said"), [
    ("reach", r"error: rank 2 of 3 did not come within 4 s: not started, stopped"),
    ("init_process_group", r"error: the ranks could not be connected: no sign of life from rank 2"),
])
def test_a_rank_that_is_stopped_while_ranks_connect_is_named(
        at: str, said: str, cache_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    agent = start(
        [*torchrun(3), "-m", "tests.support.stopped_fedrun", "fed_avg", *SMALL, "--num_clients",
         "2", "--data_dir", tmp_path, "--cache_dir", cache_dir, "--timeout", "4"], log,
        {"STOPPED_AT": at, "STOPPED_RANK": "2"})
    with children_of(agent) as ranks:
        wait_until(lambda: re.search(said, log.read_text()) is not None, 60, log.read_text)
        assert at != "reach" or "waits for rank 2 of 3\n" in log.read_text()
        for rank in ranks():  # torchrun would wait for the stopped one
            rank.kill()
        assert agent.wait(60) == 1
        assert "Traceback" not in log.read_text()


# ---- who has gone --------------------------------------------------------------------------------

def gone(**env: str) -> bool:
    """Whether a process with these variables ends as an orphan, at its very beginning."""
    code = ("from fedrun.distributed.stopping import die_with_launcher; "
            "die_with_launcher(); print('on')")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) in ((0, "on\n"), (1, "")), done
    return done.returncode == 1


def test_an_orphan_ends_whose_launcher_has_ended_before_it_looked() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    until_zombie = psutil.Process(ended.pid)
    wait_until(lambda: not alive(until_zombie), 10)
    assert gone(FEDRUN_LAUNCHER=str(ended.pid))
    ended.wait()
    assert gone(FEDRUN_LAUNCHER=str(ended.pid))
    assert not gone(FEDRUN_LAUNCHER=str(os.getpid()))
    assert not gone(FEDRUN_LAUNCHER=str(os.getppid()))  # a script that starts the rank is between
    plain = {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "nowhere.invalid"}
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = str(there.getsockname()[1])
        assert not gone(**plain, MASTER_PORT=port)
    assert gone(**plain, MASTER_PORT=port)


@pytest.mark.slow
@pytest.mark.parametrize("module", [["fedrun.torchrun"],
                                    ["torch.distributed.run", "--master-port", "PORT"]])
def test_no_rank_outlives_a_launcher_killed_as_it_starts_them(module: list[str], tmp_path: Path
                                                              ) -> None:
    for delay in (0.0, 0.02):
        flags = [str(free_port()) if word == "PORT" else word for word in module]
        agent = subprocess.Popen([sys.executable, "-m", *flags, "--nproc-per-node", "2", "-m",
                                  "fedrun", "fed_avg", *SMALL, "--data_dir", str(tmp_path)],
                                 cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ranks: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 60  # looked for without a pause: see `delay`
            while len(ranks) < 2:
                assert time.monotonic() < deadline
                ranks = psutil.Process(agent.pid).children()
            time.sleep(delay)
            agent.send_signal(signal.SIGKILL)
            gone, left = psutil.wait_procs(ranks, timeout=10)
            assert (len(gone), left) == (2, [])
        finally:
            for process in filter(alive, ranks):
                process.kill()
            agent.kill()
            agent.wait()


def test_what_the_user_has_to_change_is_not_started_again(tmp_path: Path) -> None:
    """Three restarts would tell the same three times more, and torchrun's own lines bury it."""
    done = subprocess.run(
        [*torchrun(3, restarts=3), "-m", "fedrun", "fed_avg", *SMALL, "--data_dir", str(tmp_path),
         "--dataset", str(tmp_path / "nothing.txt")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedrun: error: --dataset {tmp_path / 'nothing.txt'}: no such file")
