"""Where clients' states rest changes no result, and how many of them are in memory is bounded."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun.aggregation.update import ServerUpdate
from fedrun.federation import client_store
from fedrun.federation.client import Client
from fedrun.federation.client_store import ClientStore, InMemory, OnDevice, OnDisk
from fedrun.records import checkpoint
from fedrun.records.checkpoint import GLOBAL, client_file
from fedrun.records.checkpoint_writer import CheckpointWriter
from fedrun.strategies.base import ServerRound
from tests.support.disk import no_space
from tests.support.every_store import RUNS
from tests.support.runs import (
    FAULTY,
    FLAGS,
    Outcome,
    Run,
    assert_equal,
    execute,
    fault,
    torchrun,
    without_clocks,
)

CPU = torch.device("cpu")
SECONDS = 20.0  # that an event of another thread may take
Make = Callable[[Path, dict[int, dict[str, Tensor]]], ClientStore]
STORES: dict[str, Make] = {
    "resident": lambda folder, states: OnDevice(states),
    "memory": lambda folder, states: InMemory(states, CPU, SECONDS),
    "disk": lambda folder, states: OnDisk(folder / "clients", states, CPU, SECONDS)}


def state(value: float, *names: str) -> dict[str, Tensor]:
    vectors = {name: torch.full((5,), value, dtype=torch.float64) for name in names}
    return {"steps_done": torch.tensor(int(value)), **vectors}


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])


def written(saver: CheckpointWriter) -> dict[str, Any]:
    (answer,) = saver.written(wait=True)
    return answer


# ---- one store -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", STORES)
def test_checkout_returns_what_checkin_stored(kind: str, tmp_path: Path) -> None:
    states = STORES[kind](tmp_path, {k: state(0) for k in range(3)})
    for turn in range(1, 7):
        client = turn % 3
        taken = states.checkout(client)
        assert int(taken["steps_done"]) == (turn - 3 if turn > 3 else 0)
        if turn < 6:
            states.prefetch((turn + 1) % 3)
        # A residual comes, then goes again.
        states.checkin(client, state(turn, "adamw.exp_avg", *(["residual"] if turn <= 3 else [])))
    for client, turn in ((1, 4), (2, 5), (0, 6)):
        assert_same(states.checkout(client), state(turn, "adamw.exp_avg"))
        states.checkin(client, state(9))
    states.close(SECONDS)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", STORES)
def test_a_snapshot_is_consistent_and_any_store_resumes_from_it(
        kind: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refused)
    states = STORES[kind](tmp_path, {k: state(0) for k in range(3)})
    for client in (1, 2):
        states.checkout(client)
        states.checkin(client, state(client, "parameters"))
    saver, folder = CheckpointWriter(), tmp_path / "checkpoints" / "step_000004"
    states.save(saver, folder, 4, {GLOBAL: {"model": torch.ones(2)}})
    for client in (1, 2):
        states.checkout(client)
        states.checkin(client, state(7, "parameters"))
    answer = written(saver)
    states.close(SECONDS)
    checkpoint.commit(folder, 4, {}, {}, {}, answer["files"])
    found = checkpoint.read(folder)
    assert set(found.checksums) == {GLOBAL, "server.json", *map(client_file, range(3))}
    for other in STORES.values():
        again = other(tmp_path / "again", {k: state(0) for k in range(3)})
        again.load(found)
        for client in range(3):
            expected = state(client, "parameters") if client else state(0)
            assert_same(again.checkout(client), expected)
            again.checkin(client, expected)
        saver = CheckpointWriter()  # and on from there
        again.save(saver, tmp_path / "next" / "step_000005", 5, {})
        files = written(saver)["files"]
        assert files == {name: found.checksums[name] for name in map(client_file, range(3))}
        again.close(SECONDS)
        shutil.rmtree(tmp_path / "next")


def refused(*_: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_snapshot_of_files_is_links_to_them(tmp_path: Path) -> None:
    states = STORES["disk"](tmp_path, {k: state(k) for k in range(2)})
    saver, folder = CheckpointWriter(), tmp_path / "step_000001"
    states.save(saver, folder, 1, {})
    written(saver)
    files = [tmp_path / "clients" / client_file(k) for k in range(2)]
    assert all(file.samefile(folder / file.name) for file in files)
    states.checkin(1, state(5))
    later = tmp_path / "step_000002"
    states.save(saver, later, 2, {})
    written(saver)
    # Client 0 has not trained since, but a bit that flips in one file must not be in both.
    assert not (later / files[0].name).samefile(folder / files[0].name)
    assert (later / files[0].name).read_bytes() == (folder / files[0].name).read_bytes()
    assert (later / files[1].name).samefile(files[1])
    states.close(SECONDS)
    assert not (tmp_path / "clients").exists()
    assert sorted(p.name for p in folder.iterdir()) == [client_file(0), client_file(1)]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16,
                                  torch.int64, torch.int32, torch.int16, torch.int8])
def test_files_are_what_safetensors_reads(kind: torch.dtype, tmp_path: Path) -> None:
    vectors = {"b": torch.arange(-3, 8), "a.step": torch.tensor(3), "none": torch.ones(0, 2),
               "matrix": torch.arange(12).view(3, 4).t()}
    vectors = {name: tensor.to(kind) for name, tensor in vectors.items()} | {
        "bytes": torch.arange(3, dtype=torch.int8), "steps_done": torch.tensor(2**40)}
    sums = checkpoint.write_tensors(tmp_path, {"file": vectors, "empty": {}})
    assert_same(load_file(tmp_path / "file"), vectors)
    assert_same(checkpoint.read_tensors(tmp_path / "file"), vectors)
    assert load_file(tmp_path / "empty") == {}
    for name, reported in sums.items():
        content = (tmp_path / name).read_bytes()
        assert reported == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_full_disk_is_reported_at_the_next_call(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    states = STORES["disk"](tmp_path, {k: state(0) for k in range(3)})

    def full(path: Path, *_: Any, **__: Any) -> None:
        raise no_space(path)
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    states.checkin(0, state(1))
    saver = CheckpointWriter()
    states.save(saver, tmp_path / "step_000001", 1, {})
    assert "No space left on device" in written(saver)["error"]  # and no older state of client 0
    reported = rf"--client_store disk: .* cannot be written \(No space left.*{tmp_path}/clients"
    for call in (lambda: states.checkout(1), lambda: states.checkin(1, state(1))):
        with pytest.raises(OSError, match=reported):
            call()
    states.close(SECONDS)


def test_an_unresponsive_disk_is_not_waited_for_forever(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = OnDisk(tmp_path, {0: state(0), 1: state(0)}, CPU, timeout=0.1)
    answers = threading.Event()
    monkeypatch.setattr(client_store, "read_tensors", lambda *_: answers.wait(SECONDS))
    with pytest.raises(TimeoutError, match=r"--timeout 0\.1"):
        states.checkout(0)
    answers.set()
    states.close(SECONDS)


# ---- whole runs ----------------------------------------------------------------------------------

def test_the_next_state_is_read_while_a_client_trains(run_here: Run,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """And two are in memory: a third is read into that of the one that is gone."""
    healthy_read, healthy_train = checkpoint.read_tensors, Client.train
    reads = {k: threading.Semaphore(0) for k in range(4)}
    came_early: list[bool] = []
    living: dict[int, weakref.ref[Tensor]] = {}  # a set of them would compare elements
    at_once: list[int] = []

    def read(path: Path, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = healthy_read(path, into)
        if "adamw.exp_avg" in tensors:
            vector = tensors["adamw.exp_avg"]
            living[id(vector)] = weakref.ref(vector)
        at_once.append(sum(ref() is not None for ref in living.values()))
        reads[int(path.stem.removeprefix("client_"))].release()
        return tensors

    def train(client: Client, *args: Any, **kwargs: Any) -> Any:
        if client.index == 0 and not came_early:
            reads[0].acquire()  # of the first turn of all, which nobody could expect
        if client.index < 3:
            came_early.append(reads[client.index + 1].acquire(timeout=SECONDS))
        return healthy_train(client, *args, **kwargs)

    def apply(update: ServerUpdate, model: Tensor, state: Any, context: ServerRound, *args: Any,
              **kwargs: Any) -> Any:
        if context.number < 4:  # the first client of the next round
            came_early.append(reads[0].acquire(timeout=SECONDS))
        return healthy_apply(update, model, state, context, *args, **kwargs)

    healthy_apply = ServerUpdate.apply
    monkeypatch.setattr(ServerUpdate, "apply", apply)
    monkeypatch.setattr(client_store, "read_tensors", read)
    monkeypatch.setattr(Client, "train", train)
    outcome = run_here("fed_avg", "--num_clients", 4, "--rounds", 4, "--client_store", "disk",
                       "--checkpoint_freq", 1)
    assert outcome.code == 0, outcome.output
    assert came_early == [True] * 15
    assert len(at_once) == 16  # each state once a round
    assert max(at_once) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_same_bits_in_memory_and_on_disk_in_3_and_5_processes(
        little_text: tuple[str, ...], tmp_path: Path) -> None:
    """On disk in one process and in two: the runs below that are resumed."""
    flags = (*little_text, "--num_clients", "6", "--rounds", "3")
    worlds = {"memory": (1, "memory"), **{f"disk{n}": (n, "disk") for n in (3, 5)}}
    for name, (processes, kind) in worlds.items():
        code, output = execute(
            [*torchrun(processes), "-m", "tests.support.every_store", str(tmp_path / name),
             *flags, "--client_store", kind], limit=300)
        assert code == 0, output
    seen = set()
    for name in RUNS:
        memory, *disk = (Outcome(0, "", tmp_path / world / name) for world in worlds)
        assert {outcome.bits for outcome in disk} == {memory.bits}, name
        assert all(without_clocks(outcome) == without_clocks(memory) for outcome in disk), name
        assert not any((outcome.run_dir / "clients").exists() for outcome in disk)
        seen.add(memory.bits)
    assert len(seen) == len(RUNS)


@pytest.mark.slow
def test_stopped_and_resumed_from_disk_and_memory(run: Run, tmp_path: Path) -> None:
    flags = ("--num_clients", 6, "--cohort", 4, "--rounds", 5)
    whole = run("fed_avg", *flags, name="whole")
    stopped = run("fed_avg", *flags, "--client_store", "disk", processes=3, script=FAULTY,
                  env=fault(tmp_path, "term", "record:3"))
    assert "stopped by SIGTERM" in stopped.output
    assert not (stopped.run_dir / "clients").exists()
    shutil.copytree(stopped.run_dir, tmp_path / "copy")
    memory = run("fed_avg", *flags, name="copy")
    disk = run("fed_avg", *flags, "--client_store", "disk", processes=2)
    for resumed in (memory, disk):
        assert "resuming from step" in resumed.output
        assert_equal(resumed, whole)


@pytest.mark.parametrize(("at", "goes_on"), [
    pytest.param("train:2", False, marks=pytest.mark.slow), ("after-manifest:4", True)])
def test_files_that_a_kill_left_are_not_taken(run: Run, tmp_path: Path, undisturbed: Outcome,
                                              at: str, goes_on: bool) -> None:
    killed = run("fed_avg", *FLAGS, "--client_store", "disk", script=FAULTY,
                 env=fault(tmp_path, "kill", at))
    left = sorted((killed.run_dir / "clients").glob("client_*"))
    assert len(left) == 3
    for file in left:
        file.unlink()  # some of them are a checkpoint's as well
        file.write_bytes(b"what nobody may take")
    resumed = run("fed_avg", *FLAGS, "--client_store", "disk")
    assert resumed.code == 0, resumed.output
    assert ("resuming from" in resumed.output) == goes_on
    assert_equal(resumed, undisturbed)
    assert not (resumed.run_dir / "clients").exists()


@pytest.mark.slow
def test_a_run_ends_when_the_disk_is_full(run: Run, tmp_path: Path) -> None:
    """A limit on the size of files, which a state with moments exceeds and a model does not."""
    model = run("fed_avg", "--num_clients", 3, "--rounds", 1, name="model")
    size = (model.run_dir / "model.safetensors").stat().st_size * 3 // 2
    script = tmp_path / "limited.py"
    script.write_text(f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)\n"
                      "from fedrun.__main__ import main\nmain()\n")
    full = run("fed_avg", "--num_clients", 4, "--rounds", 3, "--client_store", "disk",
               script=script, processes=3, name="full")
    assert full.code == 1
    assert "--client_store disk: a client's state cannot be written (File too large)" in full.output
    assert str(full.run_dir / "clients") in full.output
    assert not (full.run_dir / "clients").exists(), "what is of no use stays on a full disk"


# ---- memory --------------------------------------------------------------------------------------

PEAK = """
import os, re, sys
from fedrun import cli
from fedrun.federation.worker import Worker

healthy = Worker.__init__
def init(worker, config, *rest):
    healthy(worker, config, *rest)
    peaks.update(folder=config.run_dir, size=worker.flat.size, hosted=len(worker.clients))
Worker.__init__ = init
peaks = {}
code = cli.main()
if peaks:
    status = open("/proc/self/status").read()
    line = f"{re.search('VmHWM: *(.*) kB', status)[1]} {peaks['size']} {peaks['hosted']}"
    (peaks["folder"] / f"peak_{os.environ['RANK']}").write_text(line)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_256_clients_take_the_memory_of_16(run: Run, tmp_path: Path) -> None:
    script, model = tmp_path / "peak.py", tmp_path / "model.yaml"
    script.write_text(PEAK)
    model.write_text("model: {n_layer: 2, d_model: 160, d_state: 16, headdim: 16}\n")
    peaks: dict[int, list[int]] = {}
    for clients in (16, 256):
        outcome = run("fed_avg", "--num_clients", clients, "--rounds", 2, "--checkpoint_freq", 1,
                      "--config", model, "--client_store", "disk", "--batch_size", 1,
                      script=script, launcher=True, processes=3, name=str(clients), limit=150)
        assert outcome.code == 0, outcome.output
        reported = [list(map(int, (outcome.run_dir / f"peak_{rank}").read_text().split()))
                for rank in (1, 2)]
        peaks[clients] = [1024 * kib for kib, _, _ in reported]
        assert [hosted for _, _, hosted in reported] == [clients // 2] * 2
    slack = 0.2 * max(peaks[16])
    assert (128 - 8) * 2 * 4 * reported[0][1] > 2 * slack  # the states alone, in memory
    assert max(peaks[256]) <= max(peaks[16]) + slack
