"""How a run of real sites is taken up again, message by message, between ranks in threads; and a
worker of such a site, which writes and loads its part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.handshake import Membership
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation import global_state
from fedrun.federation.messages import RoundReport, decode, encode
from fedrun.federation.resuming import gather_holdings, open_checkpoint
from fedrun.federation.schedule import Schedule
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.provenance import Length
from fedrun.records.run_lock import release_run_dir
from fedrun.records.site_states import SiteCheckpoint
from fedrun.start import RunRefused, decide_start
from tests.support.experiments import experiment_of
from tests.support.fake_control import FakeControl, Room, only
from tests.support.made_data import made
from tests.support.site_starts import (
    PROVENANCE,
    Start,
    flip,
    folder_at,
    saved,
)
from tests.support.site_starts import global_state as state_after


def taken_up(start: Start, spoil: Callable[[], None] = lambda: None
             ) -> tuple[list[Checkpoint | BaseException], str]:
    """What each rank has after the messages of a start, and all that was sent. spoil: called when
    the server has decided."""
    def of_rank(control: FakeControl) -> Checkpoint:
        states = start.states.get(control.rank)
        holdings = gather_holdings(control, states)
        found, step = None, None
        if holdings is not None:
            try:
                decision = decide_start(start.config, Length(start.config, 100), lambda _: "fp32",
                                        PROVENANCE, holdings)
            except RunRefused as error:
                control.share(str(error))
                raise
            assert decision.checkpoint is None  # no path of the server's is sent
            found, step = decision.open(start.config.run_dir), decision.step
            spoil()
        step = control.share(step)
        if isinstance(step, str):
            raise RunRefused(step)
        return open_checkpoint(control, states, found, step)

    room = Room(start.members)
    try:
        return room.run(of_rank), "\n".join(room.sent)
    finally:
        start.kill()
        release_run_dir(start.config.run_dir)


def test_all_ranks_take_up_the_newest_common_step(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    flip(folder_at(tmp_path, "south", 4) / "client_3.safetensors")
    start = Start(tmp_path)
    found, sent = taken_up(start)
    assert all(isinstance(one, Checkpoint) and one.step == 2 for one in found), found
    for rank in start.states:
        one = found[rank]
        assert isinstance(one, SiteCheckpoint)
        start.check(one, rank)
    for secret in (str(tmp_path), "client_", "text of", "step_0"):
        assert secret not in sent


def test_a_text_that_has_changed_ends_the_start_on_all_ranks(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 2)
    found, sent = taken_up(Start(tmp_path, texts={"east": "another"}))
    line = only(found, RunRefused)
    assert line.startswith("--resume: site east cannot go on: ")
    assert line.endswith("(its own log says more)")
    assert "--site_data: the text of this site has changed since step 2" in caplog.text
    assert "site_data" not in sent


def test_another_global_model_ends_the_start_on_all_ranks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)
    tensors = state_after(2)
    tensors["server.velocity"][0] += 1

    def spoil() -> None:
        monkeypatch.setattr(Checkpoint, "tensors", lambda self, name: tensors)

    line = only(taken_up(Start(tmp_path), spoil)[0], InputError)
    for site in ("north", "south", "east"):
        assert f"site {site} cannot take up step 2, or has recorded another global model" in line


def test_a_site_that_loses_its_files_meanwhile_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 2)

    def spoil() -> None:
        (folder_at(tmp_path, "north", 2) / "site_0.json").write_text("{}")

    line = only(taken_up(Start(tmp_path), spoil)[0], InputError)
    assert line.startswith("--resume: site north cannot take up step 2")
    assert "south" not in line


def test_the_first_worker_sends_the_state_as_announced() -> None:
    state = state_after(7) | {"server.steps": torch.arange(4, dtype=torch.bfloat16)}

    def of_rank(control: FakeControl) -> dict[str, torch.Tensor]:
        if control.rank:
            global_state.send(control, state)
            return {}
        report = decode(RoundReport, encode(RoundReport(state=global_state.layout(state))))
        return global_state.receive(control, report.state)

    received, _ = Room(Membership("run", ("", "north"))).run(of_rank)
    assert isinstance(received, dict)
    assert list(received) == list(state)
    assert all(torch.equal(received[name], vector) and received[name].dtype == vector.dtype
               for name, vector in state.items())


def test_a_vector_of_no_known_type_is_refused() -> None:
    with pytest.raises(InputError, match="model: no vector is of the type F7"):
        _ = global_state.Vector("model", 3, "F7").dtype


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_worker_of_a_site_keeps_its_clients_states_there(store: str, tmp_path: Path) -> None:
    start = Start(tmp_path, ("", "north"))
    start.begin()
    states = start.states[1]
    config = resolve("fed_momentum", {
        "config": "tiny", "num_clients": "2", "rounds": "9", "batch_size": "2", "dtype": "fp32",
        "sequence_length": "4", "device": "cpu", "client_store": store,
        "data_dir": str(tmp_path / "nowhere")})
    assert isinstance(config, FederatedConfig)
    runtime = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), DataPlane())
    experiment = experiment_of(config, made([12] * 2, vocab_size=50))
    schedule = Schedule(config, experiment.shards.sizes)

    def worker(checkpoint: Checkpoint | None = None) -> Worker:
        return Worker(config, experiment.data, experiment.shards, schedule,
                      experiment.new_model("cpu"), runtime, checkpoint, states)

    def go(worker: Worker, number: int, kept: list[int]) -> None:
        plan = dataclasses.replace(schedule.plan(number, 1.0), kept=kept)
        worker.train(plan)
        worker.aggregate(plan)

    first = worker()
    go(first, 1, [])
    report = first.announce_state(RoundReport())
    assert [vector.name for vector in report.state] == ["model", "server.momentum"]
    assert {vector.size for vector in report.state} == {first.flat.size}
    first.save(schedule.plan(1, 1.0))
    sent = {name: vector.clone() for name, vector in first.global_state.named().items()}
    (written,) = first.checkpoint_writer.written(wait=True)
    assert sorted(written) == ["step", "tag"]
    assert states.held() == {"1": [written["tag"]]}
    assert sorted(path.name for path in states.folders.step(1).iterdir()) == [
        "client_0.safetensors", "client_1.safetensors", "site_0.json"]
    assert (store == "disk") == any(states.folders.clients.iterdir())
    go(first, 2, [1])
    second = worker(states.open(1, sent))
    go(second, 2, [1])
    assert torch.equal(first.global_model, second.global_model)
    assert states.held().keys() == {"1"}
    go(second, 3, [])
    assert states.held() == {}
    for one in (first, second):
        one.store.close(10)
    assert not (tmp_path / "nowhere").exists()
    start.kill()
