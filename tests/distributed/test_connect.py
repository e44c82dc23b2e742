"""How ranks find each other, and the errors when they do not."""

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
from types import SimpleNamespace

import psutil
import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from fedrun import torchrun as launcher
from fedrun.distributed import connect, control_plane
from fedrun.distributed.connect import (
    NotConnected,
    decline,
    listen,
    named,
    prefix_of,
    reach,
    roll_call,
    serve,
)
from fedrun.distributed.control_plane import Heartbeat
from fedrun.distributed.launch import Launch
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


class Gone:
    """A store whose process has ended."""

    def add(self, *_: object) -> int:
        raise RuntimeError("Connection reset by peer")


def store() -> TCPStore:
    return serve(listen("", 0, one_machine=True), timedelta(seconds=20))


# ---- where the store listens ---------------------------------------------------------------------

def test_a_warning_of_torchruns_own_store() -> None:
    """With the real torchrun. One process is enough, since its launcher listens."""
    code = ("import os; from fedrun.distributed.launch import detect; "
            "from fedrun.distributed.connect import exposure; "
            "print('WARNING', exposure(detect(os.environ)))")
    ended, output = execute([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--no-python", "--nproc-per-node", "1", sys.executable, "-c", code])
    assert ended == 0, output
    warning = next(line for line in output.splitlines() if line.startswith("WARNING"))
    assert "listens on all addresses" in warning
    assert "whoever connects to it can run code as you" in warning


def test_no_warning_of_a_store_on_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a look for it where it is not: torch prints forty lines if nothing listens."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    asked: list[int] = []
    monkeypatch.setattr(connect, "_holds", lambda port, _: asked.append(port))
    listening = [SimpleNamespace(pid=os.getppid(), status=psutil.CONN_LISTEN,
                                 laddr=SimpleNamespace(ip=ip, port=port))
                 for ip, port in (("10.88.0.1", 29500), ("127.0.0.1", 29501))]
    monkeypatch.setattr(psutil, "net_connections", lambda _: listening)
    apart = Launch(0, 4, 0, 1)
    assert connect.exposure(apart) == ""
    listening[0].laddr.ip = "0.0.0.0"
    assert connect.exposure(apart) == ""  # machines have to reach it
    assert asked == [29500]


def test_where_the_store_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with listen("nowhere.invalid", 0, one_machine=True) as one:
        assert one.getsockname()[0] == "127.0.0.1"  # whatever the machine's name
        port = one.getsockname()[1]
        with pytest.raises(NotConnected, match=f"^MASTER_PORT {port} is in use on "):
            listen("anything", port, one_machine=True)
    with pytest.raises(NotConnected, match=r"MASTER_PORT 70000: must be a port number"):
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


def test_behind_a_translated_address_the_store_listens_everywhere_with_a_warning(
        caplog: pytest.LogCaptureFixture) -> None:
    with listen("192.0.2.1", 0, one_machine=False) as anywhere:
        assert anywhere.getsockname()[0] in ("::", "0.0.0.0")
    assert "MASTER_ADDR 192.0.2.1 (192.0.2.1) is not an address of " in caplog.text


def test_a_missing_loopback_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")  # as where the interface is down
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(NotConnected, match=r"^the loopback interface \(127.0.0.1\), .* is missing"):
        listen("", 0, one_machine=True)


def test_our_torchrun_rejects_another_rendezvous_and_guesses_no_address(
        capfd: pytest.CaptureFixture[str]) -> None:
    for flags, message in ((["--standalone"], "--standalone, --rdzv-backend and --rdzv-endpoint"),
                           (["--rdzv-backend", "c10d"], "leave them out"),
                           (["--nnodes", "1:2"], "--nnodes 1:2: must be one number"),
                           (["--nnodes", "two"], "--nnodes two: must be one number"),
                           (["--nproc-per-node", "two"], "nproc_per_node"),
                           (["--nnodes", "2", "--master-port", "1"], "--master-addr: not set")):
        assert launcher.main(["--nproc-per-node", "1", *flags, "-m", "fedrun"]) == 2
        assert message in capfd.readouterr().err


# ---- who has connected ---------------------------------------------------------------------------

def test_names_of_ranks() -> None:
    assert named([3]) == "rank 3"
    assert named([5, 1, 4, 7]) == "ranks 1, 4-5, 7"
    assert named([0, 1], "machine") == "machines 0-1"


def test_a_roll_call_names_the_missing_ranks_while_it_waits_and_when_it_fails(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(connect, "SECONDS_OF_SILENCE", 0.2)
    server = store()
    there = reach("127.0.0.1", server.port, SECOND, served_before=True)
    other = Thread(target=roll_call, args=(there, 2, 3, timedelta(seconds=20)))
    other.start()
    with pytest.raises(NotConnected, match=r"^rank 0 of 3, counted from 0, did not connect within"):
        roll_call(server, 1, 3, SECOND)
    # Once: only the lowest rank that is there, rank 1, prints it.
    assert [record.message for record in caplog.records] == [
        "waiting for rank 0 of 3, counted from 0"]
    roll_call(reach("127.0.0.1", server.port, SECOND, True), 0, 3, SECOND)  # rank 2 still waits
    other.join(5)
    assert not other.is_alive()


def test_a_rank_that_is_not_coming_ends_the_wait_of_the_others(monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    server = store()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    launch, began = Launch(2, 3), time.monotonic()
    prefixed = PrefixStore(prefix_of(launch, 0), server)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(roll_call, prefixed, rank, 3, 20 * SECOND) for rank in (0, 1)]
        wait_until(lambda: prefixed.add("here", 0) == 2, 5)
        decline(launch, "site east: its key is another")
        for one in waiting:
            with pytest.raises(NotConnected, match=r"^site east: its key is another$"):
                one.result()
    assert time.monotonic() - began < 5
    del server
    for address, port in (("127.0.0.1", "none"), ("", "")):  # nobody is told, and nobody waits
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", port)
        decline(launch, "nothing")


def test_two_processes_with_the_same_rank() -> None:
    server = store()
    server.add("here", 1)
    server.set("here/1", "")
    with pytest.raises(NotConnected, match="2 connected, but not machine 0: each needs"):
        roll_call(server, 1, 2, SECOND, "machine")


def test_no_rank_hangs_on_a_store_that_is_gone_or_silent(monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture
                                                         ) -> None:
    monkeypatch.setattr(connect, "SECONDS_OF_SILENCE", 0.2)
    port, began = free_port(), time.monotonic()
    with pytest.raises(NotConnected, match="the launcher of rank 0 has ended"):
        reach("127.0.0.1", port, timedelta(minutes=5), served_before=True)
    with pytest.raises(NotConnected, match=f"MASTER_PORT {port}: could not connect to rank 0's"):
        reach("127.0.0.1", port, SECOND, served_before=False)
    with (socket.create_server(("127.0.0.1", 0)) as silent,
          pytest.raises(NotConnected, match="does not respond as a store")):
        reach("127.0.0.1", silent.getsockname()[1], SECOND, served_before=True)
    assert time.monotonic() - began < 10
    assert f"waiting for the store of rank 0 at 127.0.0.1:{port} (" in caplog.text


def test_two_threads_that_look_for_unresponsive_ranks_both_find_them(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat, "SECONDS", 0.02)
    heartbeat = Heartbeat(HashStore(), 0, 3)
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(heartbeat.unresponsive)
            time.sleep(0.18)  # the second starts in the middle of the first
            second = pool.submit(heartbeat.unresponsive)
            assert [first.result(), second.result()] == [[1, 2], [1, 2]]
    finally:
        heartbeat.stop()


def test_a_rank_whose_store_is_gone_still_says_why_it_ends(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 may end first, and its store with it: the others do not wait to see who is silent,
    and are ended by the heartbeat only if their main thread does not come to its end."""
    monkeypatch.setattr(Heartbeat, "SECONDS", 0.2)
    ended: list[int] = []
    monkeypatch.setattr(control_plane, "end_process", ended.append)
    served = HashStore()
    heartbeat = Heartbeat(served, 1, 3)
    try:
        wait_until(lambda: served.check(["beats/1"]), 5)
        monkeypatch.setattr(heartbeat, "store", Gone())
        began = time.monotonic()
        assert heartbeat.unresponsive() == []
        heartbeat.report_failure("what nobody can read any more")
        assert time.monotonic() - began < 1.2
        assert not ended
        assert not caplog.text
        wait_until(lambda: bool(ended), 5)
        assert "rank 1: rank 0 or its launcher has ended: exiting" in caplog.text
    finally:
        heartbeat.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("at", "message"), [
    ("reach", "error: rank 2 of 3, counted from 0, did not connect within 4 s: not started, stop"),
    ("init_process_group", r"error: the ranks could not be connected: no heartbeat from rank 2"),
])
def test_a_rank_that_is_stopped_while_ranks_connect_is_named(
        at: str, message: str, cache_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    agent = start(
        [*torchrun(3), "-m", "tests.support.stopped_fedrun", "fed_avg", *SMALL, "--num_clients",
         "2", "--data_dir", tmp_path, "--cache_dir", cache_dir, "--timeout", "4"], log,
        {"STOPPED_AT": at, "STOPPED_RANK": "2"})
    with children_of(agent) as ranks:
        wait_until(lambda: re.search(message, log.read_text()) is not None, 60, log.read_text)
        assert at != "reach" or "waiting for rank 2 of 3, counted" in log.read_text()
        for rank in ranks():  # torchrun would wait for the stopped one
            rank.kill()
        assert agent.wait(60) == 1
        assert "Traceback" not in log.read_text()


# ---- who has died --------------------------------------------------------------------------------

def gone(**env: str) -> bool:
    """Whether a process with these environment variables ends at its start as an orphan."""
    code = ("from fedrun.distributed.stopping import die_with_launcher; "
            "die_with_launcher(); print('on')")
    without_launcher = {k: v for k, v in os.environ.items() if k != "FEDRUN_LAUNCHER"}
    done = subprocess.run([sys.executable, "-c", code], env=without_launcher | env, cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) in ((0, "on\n"), (1, "")), done
    return done.returncode == 1


def test_an_orphan_ends_if_its_launcher_ended_before_it_started() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    until_zombie = psutil.Process(ended.pid)
    wait_until(lambda: not alive(until_zombie), 10)
    assert gone(FEDRUN_LAUNCHER=str(ended.pid))
    ended.wait()
    assert gone(FEDRUN_LAUNCHER=str(ended.pid))
    assert not gone(FEDRUN_LAUNCHER=str(os.getpid()))
    assert not gone(FEDRUN_LAUNCHER=str(os.getppid()))  # a script between the launcher and the rank
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


@pytest.mark.parametrize(("number", "message"), [
    (0, "machine 1 of 2, counted from 0, did not connect within 0.5 s"),
    (1, "could not connect to rank 0's store within 0.5 s")])
def test_machines_that_do_not_come_may_come_later(number: int, message: str) -> None:
    """A loop around the launcher goes on after exit code 1, and ends after 2."""
    port = free_port()
    code = (f"import sys; from fedrun import torchrun; torchrun.SECONDS_FOR_MACHINES = 0.5; "
            f"sys.exit(torchrun.main(['--nnodes', '2', '--node-rank', '{number}', '--master-addr',"
            f" {address_here()!r}, '--master-port', '{port}', '-m', 'fedrun']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr  # none of torch's


def address_here() -> str:
    """An address of this machine that is not the loopback's, if there is one."""
    return next((a.address for each in psutil.net_if_addrs().values() for a in each
                 if a.family == socket.AF_INET and not a.address.startswith("127.")), "192.0.2.1")


def test_no_restart_if_the_user_has_to_change_something(tmp_path: Path) -> None:
    """Three restarts would print the same error three times more, among torchrun's own lines."""
    done = subprocess.run(
        [*torchrun(3, restarts=3), "-m", "fedrun", "fed_avg", *SMALL, "--data_dir", str(tmp_path),
         "--dataset", str(tmp_path / "nothing.txt")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedrun: error: --dataset {tmp_path / 'nothing.txt'}: no such file")
